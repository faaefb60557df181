"""System calls on memory and files as far as this package makes them itself: numbers, structures, advice.

Numbers differ between architectures for calls older than 5.0 or so (arch/x86/entry/syscalls/syscall_64.tbl,
scripts/syscall.tbl for arm64).
"""

from __future__ import annotations

import platform
from ctypes import c_int, c_int64, c_uint64
from typing import NamedTuple

from guest_memfd.errors import HostUnavailable
from guest_memfd.uapi.words import Words


class Numbers(NamedTuple):
    """Numbers of the system calls that the C library has no function for, or an old one."""

    timer_create: int
    timer_settime: int
    timer_delete: int
    tgkill: int
    cachestat: int = 451
    memfd_secret: int = 447


_BY_MACHINE = {"x86_64": Numbers(222, 223, 226, 234), "aarch64": Numbers(107, 110, 111, 131)}


def numbers() -> Numbers:
    """Those of this machine. Raises HostUnavailable for an architecture that is not in the table."""
    machine = platform.machine()
    if machine not in _BY_MACHINE:
        raise HostUnavailable(f"system call numbers of {machine} are not known here, only {', '.join(_BY_MACHINE)}")
    return _BY_MACHINE[machine]


class CachestatRange(Words):
    """struct cachestat_range, bytes; `len` 0 is to the end of the file."""

    _fields_ = [("off", c_uint64), ("len", c_uint64)]


class Cachestat(Words):
    """struct cachestat of cachestat(2): all five counts are pages, not bytes."""

    _fields_ = [("nr_cache", c_uint64), ("nr_dirty", c_uint64), ("nr_writeback", c_uint64), ("nr_evicted", c_uint64),
                ("nr_recently_evicted", c_uint64)]


class Iovec(Words):
    """struct iovec: an address of this process, and a length in bytes."""

    _fields_ = [("base", c_uint64), ("len", c_uint64)]


class Sigevent(Words):
    """struct sigevent of 64 bytes, for `SIGEV_THREAD_ID`."""

    _fields_ = [("value", c_uint64), ("signo", c_int), ("notify", c_int), ("tid", c_int), ("pad", c_int * 11)]


class Itimerspec(Words):
    """struct itimerspec: seconds and nanoseconds of the interval, then of the first expiration."""

    _fields_ = [("interval_sec", c_int64), ("interval_nsec", c_int64), ("sec", c_int64), ("nsec", c_int64)]


SIGEV_THREAD_ID = 4
