"""What this machine needs for the operations that designs are counted in, one round after the other until the time is up.

In each round every kind of memory has its turn, so that what disturbs one disturbs the others. A cost is a difference in
one round: memfd_secret beside memfd is the direct map. Rounds in which leaves were split are kept apart: a leaf that was
split stays so until the next boot, and its pages come back in the next round.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from contextlib import ExitStack
from errno import EAGAIN
from functools import partial
from typing import NamedTuple

from guest_memfd.errors import GuestMemfdError, HostUnavailable, SyscallFailed
from guest_memfd.linux import syscall
from guest_memfd.linux.mapping import PAGE
from guest_memfd.linux.secret import Secret
from guest_memfd.linux.system import System
from guest_memfd.linux.touch import Touched, direct_map, memfd, splits, timed, touched
from guest_memfd.uapi.kvm import GET_API_VERSION, SHARED

PAGES, FEWEST = 256, 16
"""Pages of each kind in a round, and what is not worth a round."""
ROUNDS = 5
"""There are as many, however little time there is."""
CALLS = 500
"""System calls in a round."""


class Samples(NamedTuple):
    """Microseconds, one figure a round. Of a page: `fault`, `clear`, `zap`, `restore`; one `call`.

    fault: of memfd, with the zeroing. gmem_fault: of guest_memfd, and ioctl: of /dev/kvm, none without a KVM that has it.
    zap: out of the direct map, and the flush. restore: back into it. split: for one leaf, of rounds that had some.
    pages: in a round; why: what is missing, in words, "" for nothing.
    """

    fault: list[float]
    clear: list[float]
    call: list[float]
    zap: list[float]
    restore: list[float]
    split: list[float]
    gmem_fault: list[float]
    ioctl: list[float]
    pages: int
    why: str


def measured(seconds: float, pages: int = PAGES, clock: Callable[[], float] = time.monotonic) -> Samples:
    """Rounds until *seconds* are over, ROUNDS at least. HostUnavailable, SyscallFailed: memfd_secret is refused."""
    pages = _allowed(pages)
    size, end = pages * PAGE, clock() + seconds
    seen = Samples([], [], [], [], [], [], [], [], pages, "")
    buffer = ctypes.create_string_buffer(size)
    with ExitStack() as stack:
        vm, why = None, ""
        try:
            system = stack.enter_context(System())
            vm = stack.enter_context(system.create_vm())
            vm.create_guest_memfd(size, SHARED).close()
        except GuestMemfdError as error:
            vm, why = None, str(error)
        while len(seen.fault) < ROUNDS or clock() < end:
            plain = touched(memfd(size), size)
            before = direct_map()
            secret = touched(Secret(size), size)
            split = splits(before, direct_map())
            seen.fault.append(plain.fault(pages))
            seen.clear.append(timed(1, lambda: ctypes.memset(buffer, 0, size)) / pages * 1e6)
            _beside(seen, plain, secret, split)
            seen.call.append(_call(syscall.libc.getppid))
            if vm is not None:
                seen.gmem_fault.append(touched(vm.create_guest_memfd(size, SHARED), size).fault(pages))
                seen.ioctl.append(_call(partial(syscall.libc.ioctl, system.fileno(), GET_API_VERSION, None)))
    return seen._replace(why=why)


def _beside(seen: Samples, plain: Touched, secret: Touched, split: int) -> None:
    pages = seen.pages
    zap = secret.fault(pages) - plain.fault(pages)
    seen.restore.append(secret.freed(pages) - plain.freed(pages) - seen.clear[-1])
    if not split:
        seen.zap.append(zap)
    elif seen.zap:
        seen.split.append((zap - seen.zap[-1]) * pages / split)


# Less what Python takes for a call that enters no kernel.
def _call(call: Callable[[], object]) -> float:
    return max(timed(CALLS, call) - timed(CALLS, partial(syscall.libc.labs, 0)), 0.0) * 1e6


# How many pages RLIMIT_MEMLOCK leaves: memfd_secret counts against it when it is mapped.
def _allowed(pages: int) -> int:
    while True:
        with Secret(pages * PAGE) as file:
            try:
                file.mmap().close()
            except SyscallFailed as error:
                if error.errno != EAGAIN:
                    raise
                if pages // 2 < FEWEST:
                    raise HostUnavailable(f"RLIMIT_MEMLOCK (ulimit -l) leaves no room for {FEWEST} pages of memfd_secret, "
                                          f"{FEWEST * PAGE >> 10} KiB") from error
            else:
                return pages
        pages //= 2

