"""What /dev/kvm answers in one release and not in another, as far as guest_memfd goes; and what x86 answers otherwise.

-EEXIST for a range bound twice, and the bind's offset as an unsigned number, are of the 7.2 cycle (merge 06ba195f136a).
7.3.2 split the bind in two ("Split bind() into prepare()+commit()", "Establish bindings after memslot"): what the
architecture refuses comes between the file's checks and -EEXIST. "guest_memfd: In-place conversion" is reported applied for
7.4 (v13 of the series). A default VM of x86 has no private memory, and takes a file without GUEST_MEMFD_FLAG_MMAP all the
same (kvm_mmu_faultin_pfn() in arch/x86/kvm/mmu/mmu.c); arm64 refuses such a slot (kvm_arch_prepare_memory_region() in
arch/arm64/kvm/mmu.c). What an architecture answers to an ioctl that it does not have: kvm_arch_vm_ioctl() of each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from errno import EEXIST, EFAULT, EINVAL, ENOTTY

from guest_memfd.errors import UnknownName
from guest_memfd.machine.el2.kvm.guest import IPA_BITS


@dataclass(frozen=True)
class KvmRules:
    """The rules of *release* on one architecture.

    twice: errno of a bind that meets another one; late: that is looked at after what the architecture refuses. converts:
    KVM_SET_MEMORY_ATTRIBUTES2 is there, attributes belong to the file, and every slot of a guest_memfd is served from it.

    Of the architecture: nr_slots; user_end, the end of a process's addresses; guest_bits of a guest's address; beyond, the
    errno of a slot that ends after them. no_ioctl: errno of an ioctl that a VM does not have. fault_info:
    KVM_CAP_MEMORY_FAULT_INFO. unmappable: where nothing converts, a slot takes a file without MMAP, and the guest gets what
    is at userspace_addr.
    """

    release: str
    twice: int
    late: bool
    converts: bool
    nr_slots: int = 32767
    user_end: int = 1 << 48
    guest_bits: int = IPA_BITS
    beyond: int = EFAULT
    no_ioctl: int = EINVAL
    fault_info: int = 0
    unmappable: bool = False


_RELEASES = {each.release: each for each in (
    KvmRules("6.18", EINVAL, False, False), KvmRules("7.2", EEXIST, False, False), KvmRules("7.3", EEXIST, True, False),
    KvmRules("7.4", EEXIST, True, True))}
RELEASES = tuple(_RELEASES)
"""The releases whose answers are known, each called after the first that gives them."""


def rules(release: str, architecture: str) -> KvmRules:
    """Those of *release* with the checks of *architecture*, arm64 or x86_64; raises UnknownName."""
    if release not in _RELEASES:
        raise UnknownName("release of /dev/kvm", release, RELEASES)
    found = _RELEASES[release]
    if architecture == "x86_64":
        return replace(found, nr_slots=32764, user_end=(1 << 47) - 4096, guest_bits=52, beyond=EINVAL, unmappable=True,
                       no_ioctl=ENOTTY, fault_info=1)
    if architecture != "arm64":
        raise UnknownName("architecture of /dev/kvm", architecture, ("arm64", "x86_64"))
    return found
