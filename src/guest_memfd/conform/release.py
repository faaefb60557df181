"""Whose answers this kernel gives, by experiment: stable trees get fixes, so its own number is not asked."""

from __future__ import annotations

from collections.abc import Callable
from errno import EEXIST, EINVAL, ENOTTY
from functools import partial

from guest_memfd.errors import HostUnavailable, SyscallFailed
from guest_memfd.linux.system import System
from guest_memfd.uapi.kvm import SHARED, MemFlag, MemoryAttributes2
from guest_memfd.words.units import PAGE, Ipa

_FAR = 1 << 62


def shown(path: str) -> str:
    """The release of dev/kvm/release.py whose answers the KVM at *path* gives; raises HostUnavailable where it is none."""
    with System(path) as system:
        if why := system.lacks_shared():
            raise HostUnavailable(why)
        with system.create_vm() as vm, vm.create_guest_memfd(PAGE, int(SHARED)) as file:
            # A size of 0: who has the call refuses it with EINVAL, and nothing is converted on any kernel.
            if _errno_of(lambda: file.set_memory_attributes2(MemoryAttributes2(0, 0, 0))) != ENOTTY:
                return "7.4"
            vm.set_user_memory_region2(0, MemFlag.GUEST_MEMFD, Ipa(0), PAGE, guest_memfd=file)
            again = partial(vm.set_user_memory_region2, 1, MemFlag.GUEST_MEMFD, memory_size=PAGE, guest_memfd=file)
            # *far* is wrong in two ways: the page is bound already, and no guest address is that high. Which one is told
            # shows the order of the checks, and that order is what 7.3.2 changed.
            near, far = (_errno_of(partial(again, guest_phys_addr=Ipa(gpa))) for gpa in (PAGE, _FAR))
    if near not in (EEXIST, EINVAL):
        raise HostUnavailable(f"{path}: a page that is bound twice is answered with errno {near}, as by no known release")
    return "6.18" if near == EINVAL else "7.2" if far == EEXIST else "7.3"


def _errno_of(call: Callable[[], object]) -> int:
    try:
        call()
    except SyscallFailed as error:
        return error.errno
    return 0
