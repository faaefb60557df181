"""When the memory of a guest_memfd is given back: every order of closing VM, vCPU, file and mapping."""

from __future__ import annotations

import os
import re
from itertools import permutations
from pathlib import Path

from guest_memfd.probe.calls import KEEP_SIZE, call
from guest_memfd.probe.here import SHARED, Here, bind
from guest_memfd.probe.row import Row, among
from guest_memfd.probe.rows.slots import GMEM, GPA

SIZE = 16 << 20
"""Bytes of the file: far more than /proc/meminfo is wrong by."""


def _unevictable() -> int:
    found = re.search(r"^Unevictable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    return int(found[1]) << 10 if found else 0


def closes(here: Here, *order: str) -> str:
    """Close one after another; with which of them the memory goes."""
    fd, vm, vcpu = here.gmem(SHARED, SIZE), here.vm, here.vcpu()
    bind(vm, 0, GMEM, GPA, SIZE, 0, fd)
    address = here.map(fd, SIZE)
    before = _unevictable()
    call("fallocate", fd, KEEP_SIZE, 0, SIZE)
    full = _unevictable()
    if full - before < SIZE * 3 // 4:
        return "the memory is not counted as unevictable"
    descriptors = {"vm": vm, "vcpu": vcpu, "file": fd}
    freed = "none of them"
    for name in order:
        held = _unevictable()
        if name == "mapping":
            call("munmap", address, SIZE)
        else:
            os.close(descriptors[name])
        if held - _unevictable() > SIZE // 2:
            freed = name
    return f"freed with {freed}"


def _row(order: tuple[str, ...]) -> Row:
    last = max(("file", "mapping"), key=order.index)
    return Row(f"close.{'-'.join(order)}", f"closing {', '.join(order)}: the memory goes with the last of file and mapping",
               closes,
               order, f"freed with {last}")


ROWS = among(("slots", "vcpu", "flag 1", "flag 2", "memory 512M"),
             map(_row, permutations(("vm", "vcpu", "file", "mapping"))))
