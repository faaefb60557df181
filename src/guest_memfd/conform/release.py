"""Whose answers this kernel gives, by experiment: stable trees get fixes, so its own number is not asked."""

from __future__ import annotations

from errno import EEXIST, EINVAL, ENOTTY

from guest_memfd.errors import HostUnavailable, SyscallFailed
from guest_memfd.linux.system import System
from guest_memfd.uapi.kvm import SHARED, MemFlag, MemoryAttributes2
from guest_memfd.words.units import Ipa

_PAGE = 4096


def shown(path: str) -> str:
    """The release of dev/kvm/release.py whose answers the KVM at *path* gives; raises HostUnavailable where it is none."""
    with System(path) as system:
        if why := system.lacks_shared():
            raise HostUnavailable(why)
        with system.create_vm() as vm, vm.create_guest_memfd(_PAGE, int(SHARED)) as file:
            try:
                file.set_memory_attributes2(MemoryAttributes2(0, 0, 0))
                converts = 0
            except SyscallFailed as error:
                converts = error.errno
            if converts != ENOTTY:
                return "7.4"
            vm.set_user_memory_region2(0, MemFlag.GUEST_MEMFD, Ipa(0), _PAGE, guest_memfd=file)
            try:
                vm.set_user_memory_region2(1, MemFlag.GUEST_MEMFD, Ipa(_PAGE), _PAGE, guest_memfd=file)
                twice = 0
            except SyscallFailed as error:
                twice = error.errno
    found = {EEXIST: "7.2", EINVAL: "6.18"}.get(twice)
    if found is None:
        raise HostUnavailable(f"{path}: a page that is bound twice is answered with errno {twice}, as by no known release")
    return found
