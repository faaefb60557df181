"""How much memory this process uses, and how much there is: an exploration ends before the kernel has to kill it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MOST = 0.9
"""The part of what is available that is taken, if nobody says how much."""


class Full(Exception):  # noqa: N818 - a limit, not an error
    """What comes next needs more memory than there may be used."""


def used() -> int:
    """Bytes of memory that this process has, what it shares with others included; 0 where nobody tells (no Linux)."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def share(memory: int | None, processes: int) -> int | None:
    """Bytes that each of *processes* may have, if all may have *memory*; None: nearly all that there is, if known."""
    if memory is not None:
        return memory // processes
    left = min(_left(), default=None)
    return None if left is None else used() + int(left * MOST) // processes


# Of the machine, and of the control group that we may be in (Documentation/admin-guide/cgroup-v2.rst).
def _left() -> Iterator[int]:
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        yield int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) << 10
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        most, now = ((group / f"memory.{what}").read_text(encoding="ascii") for what in ("max", "current"))
        yield max(int(most) - int(now), 0)
