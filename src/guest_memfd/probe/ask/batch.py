"""Many rows in one child: under emulation to fork and to end takes longer than most rows.

This is for machines that are made for the probe. What a row does to its process may reach the next one, so only a result
that is expected counts; everything else is tried again in a process of its own (child.py).
"""

from __future__ import annotations

import json
import os
import resource
import select
from collections.abc import Callable, Sequence
from contextlib import suppress

from guest_memfd.probe.ask.calls import FAILED, name_of
from guest_memfd.probe.ask.child import Slate, Unfit, begin, end

_WELL = b"end"
"""The child's last word, if it was not cut short."""
_LIMITS = resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK


def together(acts: Sequence[Callable[[Slate], object]], slate: Slate, timeout: float) -> list[str | None]:
    """What *acts* came to, one after the other in one child, None where that is no result; *timeout*: seconds for each.

    There are fewer where one changed what the next ones would build on, or was the end of the child: then the last is None.
    """
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        _child(acts, slate, theirs)
    os.close(theirs)
    data = bytearray()
    try:
        # Each answer starts the time anew, so it is a row's and not the batch's.
        while select.select([ours], [], [], timeout * slate.patience)[0]:
            got = os.read(ours, 1 << 16)
            if not got:
                break
            data += got
    finally:
        os.close(ours)
        end(pid)
    *said, last = bytes(data).split(b"\n")
    return [*map(json.loads, said), *([] if last == _WELL else [None])]


def _child(acts: Sequence[Callable[[Slate], object]], slate: Slate, pipe: int) -> None:
    try:
        begin()
        before, files = _kept(), _open_files()
        for act in acts:
            slate.wipe()
            result: str | None
            try:
                said = act(slate)
                result = "ok" if said is None else str(said)
            except Unfit:
                result = None
            except FAILED as error:
                result = name_of(error)
            # The answer first: the row that has changed the process is done, it is the next one that must not run here.
            os.write(pipe, json.dumps(result).encode() + b"\n")
            if _kept() != before:
                break
            # As the end of a process would do: else memory runs out, and numbers below RLIMIT_NOFILE.
            for fd in _open_files() - files:
                with suppress(OSError):
                    os.close(fd)
        os.write(pipe, _WELL)
    finally:
        os._exit(0)


# What a row may change of its process, and that the next one would go by.
def _kept() -> tuple[object, ...]:
    return os.geteuid(), *(resource.getrlimit(limit) for limit in _LIMITS)


# Without the one by which the folder is read.
def _open_files() -> set[int]:
    files = set()
    for fd in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):
            os.fstat(fd)
            files.add(fd)
    return files
