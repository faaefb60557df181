"""What the tests of linux share: errnos, limits, and children that are waited for with an end."""

from __future__ import annotations

import gc
import os
import platform
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from guest_memfd.errors import HostUnavailable, SyscallFailed
from guest_memfd.linux.system import System
from guest_memfd.probe.left import DEBUGFS

SECONDS = 300.0
"""After which a child hangs, however busy the machine."""


def no_kvm() -> str:
    """Why there is no KVM to test with; nothing if there is."""
    try:
        with System() as system, system.create_vm():
            return ""
    except (HostUnavailable, SyscallFailed) as error:
        return str(error)


def no_guests() -> str:
    """Why the tests' x86 guests cannot run in memory of a guest_memfd; nothing if they can."""
    if why := no_kvm():
        return why
    if platform.machine() != "x86_64":
        return "the guest programs are x86's"
    with System() as system:
        return system.lacks_shared()


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


def opened() -> list[str]:
    """Descriptors of this process and, where debugfs tells, its VMs; mappings of VMs, vCPUs and their files."""
    gc.collect()
    links = (Path("/proc/self/fd") / fd for fd in os.listdir("/proc/self/fd"))
    found = [os.readlink(link) for link in links if link.is_symlink()]
    with suppress(OSError):                             # not mounted, or not for us
        found += [f"VM {name}" for name in os.listdir(DEBUGFS) if name.startswith(f"{os.getpid()}-")]
    return sorted(found + [line for line in Path("/proc/self/maps").read_text().splitlines() if "kvm" in line])


@contextmanager
def nothing_stays_open() -> Iterator[None]:
    """The block opens nothing that is still open afterwards."""
    before = opened()
    yield
    assert opened() == before


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
