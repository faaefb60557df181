"""When the memory of a guest_memfd is given back: every order of closing VM, vCPU, file and mapping."""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections import Counter
from contextlib import suppress
from itertools import permutations
from pathlib import Path

from guest_memfd.probe.ask.calls import KEEP_SIZE, call
from guest_memfd.probe.ask.child import Unfit
from guest_memfd.probe.ask.here import Here, bind
from guest_memfd.probe.ask.row import Row, among
from guest_memfd.probe.rows.slots import GMEM, GPA
from guest_memfd.uapi.kvm import SHARED

SIZE = 16 << 20
"""Bytes of the file: far more than /proc/meminfo is wrong by."""


def _unevictable() -> int:
    found = re.search(r"^Unevictable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    return int(found[1]) << 10 if found else 0


def closes(here: Here, *order: str) -> str:
    """With which of them the memory goes: told by a counter of the whole machine, so it is looked at more than once."""
    _alone(here.kvm)
    seen: Counter[str] = Counter()
    for _ in range(10):
        freed = _once(here, order)
        seen[freed] += 1
        # What others free looks like ours, but hardly twice at the same step.
        # What they allocate hides ours, so "none" takes more.
        if seen[freed] == (2 if freed in order else 4):
            return f"freed with {freed}"
    raise Unfit("memory of others came and went meanwhile")


# Another probe that does the same at the same time would be counted with us.
def _alone(device: int) -> None:
    for _ in range(100):
        with suppress(BlockingIOError):
            fcntl.flock(device, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.01)
    raise Unfit("another probe is at work")


def _once(here: Here, order: tuple[str, ...]) -> str:
    here.adopt(here.another_vm())
    vm, vcpu, fd = here.vm, here.vcpu(), here.gmem(SHARED, SIZE)
    bind(vm, 0, GMEM, GPA, SIZE, 0, fd)
    address = here.map(fd, SIZE)
    call("fallocate", fd, KEEP_SIZE, 0, SIZE)
    descriptors = {"vm": vm, "vcpu": vcpu, "file": fd}
    freed = []
    for name in order:
        held = _unevictable()
        if name == "mapping":
            call("munmap", address, SIZE)
        else:
            os.close(descriptors[name])
        if held - _unevictable() > SIZE // 2:
            freed.append(name)
    return " and ".join(freed) or "none of them"


def _row(order: tuple[str, ...]) -> Row:
    last = max(("file", "mapping"), key=order.index)
    return Row(f"close.{'-'.join(order)}", f"closing {', '.join(order)}: the memory goes with the last of file and mapping",
               closes, order, f"freed with {last}")


ROWS = among(("slots", "vcpu", "flag 1", "flag 2", "memory 512M"),
             map(_row, permutations(("vm", "vcpu", "file", "mapping"))))
