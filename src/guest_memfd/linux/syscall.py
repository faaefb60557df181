"""The one place that enters the kernel. Rules of this file: errno is never lost, and EINTR is the caller's to decide.

Calls go through ctypes: fcntl.ioctl() with bytes copies the argument and forgets a returned descriptor, and Python has none
of the other calls. The interpreter's lock is released meanwhile. A call that fails raises SyscallFailed with its name.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import c_int, c_int64, c_long, c_size_t, c_uint64, c_ulong, c_void_p
from errno import EFAULT, EINTR, ENOSYS
from typing import Any, Final

from guest_memfd.errors import BadInput, HostUnavailable, SyscallFailed
from guest_memfd.linux.abi.memory import Cachestat, CachestatRange, Iovec, numbers

libc: Any = ctypes.CDLL(None, use_errno=True)
"""The C library; tests put another object in its place."""

libc.ioctl.argtypes, libc.ioctl.restype = (c_int, c_ulong, c_void_p), c_int
libc.mmap.restype = c_void_p
libc.munmap.argtypes, libc.munmap.restype = (c_void_p, c_size_t), c_int
libc.madvise.argtypes, libc.madvise.restype = (c_void_p, c_size_t, c_int), c_int
# Converting arguments by argtypes takes longer than the shortest of these calls; they get theirs converted.
libc.fallocate.restype = c_int
libc.process_vm_readv.restype = libc.process_vm_writev.restype = libc.syscall.restype = c_long

MOST = 1 << 30
"""Bytes copied by one call; the kernel stops short at MAX_RW_COUNT, 2 GiB less a page, which would look like a fault."""

_INT_END: Final = 1 << 31
_MAP_FAILED: Final = c_void_p(-1).value
_TwoIovecs = c_uint64 * 4
_REMOTE: Final = ctypes.sizeof(Iovec)
_ONE, _NONE = c_ulong(1), c_ulong(0)


def failed(call: str, why: str = "") -> SyscallFailed:
    """The error of the call that has just returned -1."""
    return SyscallFailed(ctypes.get_errno(), call, why)


@contextmanager
def named(call: str, why: str = "") -> Iterator[None]:
    """The block makes *call* by way of Python's library: its OSError is a SyscallFailed here."""
    try:
        yield
    except OSError as error:
        raise SyscallFailed(error.errno or 0, call, why) from error


def ioctl(fd: int, request: int, argument: Any = 0, *, call: str, why: str = "") -> int:
    """ioctl(2): what it returns. *argument*: a number, or a ctypes object that the kernel gets the address of.

    A signal is SyscallFailed(EINTR); see `until_done`. *call* and *why* are for the message.
    """
    if isinstance(argument, int):
        word = argument if 0 <= argument < _INT_END else _word("argument", argument).value
    else:
        word = ctypes.addressof(argument)               # `argument` lives until it returns
    ret = libc.ioctl(fd, request, word)
    if ret < 0:
        raise failed(call, why)
    return int(ret)


def _word(name: str, value: int) -> c_int64:
    if not -1 << 63 <= value < 1 << 64:
        raise BadInput(f"{name} {value:#x} does not fit 64 bits")
    return c_int64(value)


def until_done(step: Callable[[], int]) -> int:
    """*step* again for as long as it fails with EINTR: for a call that has done nothing then.

    Python's own signal handlers run in between, and what they raise ends it.
    """
    while True:
        try:
            return step()
        except SyscallFailed as error:
            if error.errno != EINTR:
                raise


def raw(number: int, *arguments: Any, call: str, why: str = "") -> int:
    """syscall(2) for what the C library does not wrap; arguments as for `ioctl`, and EINTR as there."""
    words = [c_long(x) if isinstance(x, int) else c_void_p(ctypes.addressof(x)) for x in arguments]
    ret = libc.syscall(c_long(number), *words)
    if ret < 0:
        raise failed(call, why)
    return int(ret)


def fallocate(fd: int, mode: int, offset: int, nr: int) -> None:
    """fallocate(2), bytes. EINTR: a guest_memfd keeps the pages that it had allocated by then."""
    # ctypes passes an int as C's int, which libffi extends to the register's 64 bits (src/x86/ffi64.c, src/aarch64/ffi.c).
    # What fits goes that way: converting both takes half as long as the shortest of these calls.
    if not 0 <= mode < _INT_END:
        raise BadInput(f"mode {mode:#x} does not fit an int")
    if libc.fallocate(fd, mode, offset if 0 <= offset < _INT_END else _word("offset", offset),
                      nr if 0 <= nr < _INT_END else _word("length", nr)):
        raise failed("fallocate", f"mode {mode:#x}, {nr:#x} bytes at {offset:#x}")


def mmap(fd: int, offset: int, nr: int, protection: int, flags: int) -> int:
    """mmap(2) of *nr* bytes of *fd* from byte *offset* on; the address. Raises SyscallFailed."""
    address = libc.mmap(None, _word("length", nr), protection, flags, fd, _word("offset", offset))
    if address == _MAP_FAILED:
        raise failed("mmap", f"{nr:#x} bytes at {offset:#x}")
    return int(address)


def munmap(address: int, nr: int) -> None:
    """munmap(2) of *nr* bytes at *address*; raises SyscallFailed."""
    if libc.munmap(address, nr):
        raise failed("munmap")


def madvise(address: int, nr: int, advice: int) -> None:
    """madvise(2) of *nr* bytes at *address*, with an `uapi.memory.Advice`; raises SyscallFailed."""
    if libc.madvise(address, nr, advice):
        raise failed("madvise", f"advice {advice}, {nr:#x} bytes at {address:#x}")


def cachestat(fd: int, offset: int, nr: int) -> Cachestat:
    """cachestat(2) of [offset, offset+nr) bytes, 0 bytes being all the rest. Raises HostUnavailable before 6.5."""
    found = Cachestat()
    try:
        raw(numbers().cachestat, fd, CachestatRange(offset, nr), found, 0, call="cachestat")
    except SyscallFailed as error:
        if error.errno == ENOSYS:
            raise HostUnavailable("cachestat(2) is not in this kernel; it came with 6.5") from error
        raise
    return found


def copy_from(address: int, to: int, nr: int) -> int:
    """Copy memory of this process that may refuse: how many of *nr* bytes came before the one that did.

    process_vm_writev(2) on ourselves, with *address* as the local side: that side is copied by copy_from_user(), which takes
    any page that a load would get, and stops where a load would be a signal. (The remote side is taken by get_user_pages(),
    which refuses memfd_secret; it is our own buffer.)
    """
    return _copied("process_vm_writev", libc.process_vm_writev, address, to, nr)


def copy_to(address: int, data: int, nr: int) -> int:
    """`copy_from` the other way: *nr* bytes at *data* to *address*, by process_vm_readv(2)."""
    return _copied("process_vm_readv", libc.process_vm_readv, address, data, nr)


def _copied(call: str, function: Any, suspect: int, ours: int, nr: int) -> int:
    done = 0
    while done < nr:
        asked = min(nr - done, MOST)
        iovecs = _TwoIovecs(suspect + done, asked, ours + done, asked)          # local, remote
        ret = function(os.getpid(), iovecs, _ONE, ctypes.byref(iovecs, _REMOTE), _ONE, _NONE)
        if ret < 0:
            error = failed(call)
            # EFAULT comes only for the very first byte. From then on the call says how far it came.
            if error.errno != EFAULT:
                raise error
            break
        done += ret
        if ret < asked:
            break
    return done
