"""gmem as a process of its own, and what tests of it ask for when any result will do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from guest_memfd.laws import LAWS

ALL = sum(not law.promised for law in LAWS.values())
LOAD = ["--parties", "vcpu,zeropad"]
"""The smallest scenario there is to see something in; each test that only needs some result uses it."""


def run(*argv: str, path: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """gmem as a process of its own, with *path* before all other places to import from."""
    places = [str(path)] if path else []
    places += [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    return subprocess.run(
        [sys.executable, "-m", "guest_memfd.cli.main", *argv], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places), **env}, check=False)
