"""What the tests of hosts/linux share: errnos, limits, and children that are waited for with an end."""

from __future__ import annotations

import os
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from guest_memfd.errors import SyscallFailed

SECONDS = 10.0
"""What a child may take."""


@contextmanager
def fails(errno: int) -> Iterator[None]:
    """The block raises SyscallFailed with *errno*."""
    with pytest.raises(SyscallFailed) as caught:
        yield
    assert caught.value.errno == errno, caught.value


def errno_of(action: Callable[[], object]) -> int:
    """What *action* fails with; 0 if it does not."""
    try:
        action()
    except SyscallFailed as error:
        return error.errno
    return 0


@contextmanager
def limit(which: int, soft: int) -> Iterator[None]:
    """A lower soft limit."""
    old = resource.getrlimit(which)
    resource.setrlimit(which, (soft, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(which, old)


def lowest_free() -> int:
    """The number that the next descriptor gets; as RLIMIT_NOFILE, it makes that EMFILE."""
    fd = os.dup(0)
    os.close(fd)
    return fd


def in_child(action: Callable[[], int]) -> int:
    """What *action* returns in a forked child, 0..255; 255 if it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)         # 3.12: a fork beside other threads; ours takes no lock
        pid = os.fork()
    if not pid:
        try:
            os._exit(action())
        finally:
            os._exit(255)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("the child does not end")
