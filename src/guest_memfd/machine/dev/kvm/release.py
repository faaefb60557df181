"""What /dev/kvm answers in one release and not in another, as far as guest_memfd goes; and what x86 answers otherwise.

Commits: -EEXIST for a range bound twice, and the bind's offset as an unsigned number, are of the 7.2 cycle (merge
06ba195f136a). "guest_memfd: In-place conversion" is reported applied for 7.4 (v13 of the series). That a default VM of
x86 has no private memory, and takes a file without GUEST_MEMFD_FLAG_MMAP all the same, is of 6.18 (kvm_mmu_faultin_pfn() in
arch/x86/kvm/mmu/mmu.c); arm64 refuses such a slot (kvm_arch_prepare_memory_region() in arch/arm64/kvm/mmu.c).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from errno import EEXIST, EFAULT, EINVAL

from guest_memfd.errors import UnknownName
from guest_memfd.machine.el2.kvm.guest import IPA_BITS


@dataclass(frozen=True)
class KvmRules:
    """The rules of *release* on one architecture.

    twice: errno of a bind that meets another one. converts: KVM_SET_MEMORY_ATTRIBUTES2 is there, attributes belong to the
    file, and every slot of a guest_memfd is served from it. Of the architecture: nr_slots; user_end, the end of a process's
    addresses; guest_bits of a guest's address; beyond, the errno of a slot that ends after them, which was bound by then.
    unmappable: where nothing converts, a slot takes a file without MMAP, and the guest gets what is at userspace_addr.
    """

    release: str
    twice: int
    converts: bool
    nr_slots: int = 32767
    user_end: int = 1 << 48
    guest_bits: int = IPA_BITS
    beyond: int = EFAULT
    unmappable: bool = False


_RELEASES = {each.release: each for each in (
    KvmRules("6.18", EINVAL, False), KvmRules("7.2", EEXIST, False), KvmRules("7.4", EEXIST, True))}
RELEASES = tuple(_RELEASES)
"""The releases whose answers are known, each called after the first that gives them."""


def rules(release: str, architecture: str) -> KvmRules:
    """Those of *release* with the checks of *architecture*, arm64 or x86_64; raises UnknownName."""
    if release not in _RELEASES:
        raise UnknownName("release of /dev/kvm", release, RELEASES)
    found = _RELEASES[release]
    if architecture == "x86_64":
        return replace(found, nr_slots=32764, user_end=(1 << 47) - 4096, guest_bits=52, beyond=EINVAL, unmappable=True)
    if architecture != "arm64":
        raise UnknownName("architecture of /dev/kvm", architecture, ("arm64", "x86_64"))
    return found
