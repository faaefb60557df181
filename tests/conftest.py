"""What all tests share: a way to run Python as a process of its own, with the same places to import from."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

Python = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def python() -> Python:
    def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
        places = os.pathsep.join(path for path in sys.path if path)
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False,
                              env={**os.environ, "PYTHONPATH": places, **env})

    return run
