"""bench/linux.py runs: every row that it promises is there, with C beside it. Its times are not judged."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from linux_driver import no_guests

BENCH = Path(__file__).parent.parent / "bench" / "linux.py"


REASON = no_guests() or ("" if shutil.which("gcc") else "needs gcc")


@pytest.mark.skipif(bool(REASON), reason=REASON)
def test_every_row_is_there() -> None:
    run = subprocess.run([sys.executable, BENCH, "--quick", "--rounds", "1", "--secret-pages", "2"], capture_output=True,
                         text=True, timeout=600, check=False,
                         env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)})
    assert run.returncode == 0, run.stderr
    for row in ("create, close", "fallocate, a page", "punch, nothing", "fallocate and punch", "bind, unbind",
                "KVM_RUN to an MMIO exit", "read 4 KiB", "write 64 MiB", "memfd ", "guest_memfd ", "memfd_secret"):
        assert row in run.stdout, row
