"""bench/linux.py runs: every row that it promises is there, with C beside it. Its times are not judged."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from guest_memfd.errors import HostUnavailable, SyscallFailed
from guest_memfd.hosts.linux.system import System
from guest_memfd.hosts.uapi.kvm import Cap

BENCH = Path(__file__).parent.parent / "bench" / "linux.py"


def why_not() -> str:
    if shutil.which("gcc") is None:
        return "needs gcc"
    if platform.machine() != "x86_64":
        return "its guest program is x86's"
    try:
        with System() as system:
            return "" if system.check_extension(Cap.GUEST_MEMFD_FLAGS) & 3 == 3 else "needs a guest_memfd that can be mapped"
    except (HostUnavailable, SyscallFailed) as error:
        return str(error)


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_every_row_is_there() -> None:
    run = subprocess.run([sys.executable, BENCH, "--quick", "--rounds", "1", "--secret-pages", "2"], capture_output=True,
                         text=True, timeout=120, check=False,
                         env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)})
    assert run.returncode == 0, run.stderr
    for row in ("create, close", "fallocate, a page", "punch, nothing", "fallocate and punch", "bind, unbind",
                "KVM_RUN to an MMIO exit", "read 4 KiB", "write 64 MiB", "memfd ", "guest_memfd ", "memfd_secret"):
        assert row in run.stdout, row
