"""Memory slots: which part of which file is where in the guest. Here is what KVM_SET_USER_MEMORY_REGION2 refuses.

Checks in the order of virt/kvm/kvm_main.c check_memory_region_flags() and kvm_set_memory_region(), of virt/kvm/guest_memfd.c
kvm_gmem_bind() and, after that, of arch/arm64/kvm/mmu.c kvm_arch_prepare_memory_region(). The process has no memory but
guest_memfd, so a slot without a file is refused, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from errno import EBADF, EEXIST, EFAULT, EINVAL
from typing import TYPE_CHECKING, NoReturn

from guest_memfd.errors import SyscallFailed
from guest_memfd.machine.el2.kvm.guest import IPA_BITS
from guest_memfd.machine.hw.ram import PAGE
from guest_memfd.uapi.kvm import MemFlag, UserspaceMemoryRegion2
from guest_memfd.uapi.memory import GuestMemory
from guest_memfd.words.units import Gfn, Index, Ipa, gpa_to_gfn

if TYPE_CHECKING:
    from guest_memfd.machine.dev.kvm.memory import KvmMemoryFile

CALL = "KVM_SET_USER_MEMORY_REGION2"
NR_SLOTS = 32767
_MAX_PAGES = (1 << 31) - 1
_USER = 1 << 48


@dataclass(frozen=True)
class Memslot:
    """Guest frames [gfn, gfn+nr) are pages from *start* on of *file*."""

    gfn: Gfn
    nr: int
    file: KvmMemoryFile
    start: Index

    def page(self, gfn: Gfn) -> Index:
        """The page of the file that *gfn* is."""
        return self.start + (gfn - self.gfn)


def refuse(errno: int, why: str) -> NoReturn:
    """Fail KVM_SET_USER_MEMORY_REGION2 with *errno*, by raising SyscallFailed."""
    raise SyscallFailed(errno, CALL, why)


class Memslots:
    """The slots of one VM by id; *owns* says whether a file was made by this VM."""

    def __init__(self, owns: Callable[[GuestMemory], bool]) -> None:
        self.by_id: dict[int, Memslot] = {}
        self._owns = owns

    def find(self, gfn: Gfn) -> Memslot | None:
        """The slot that covers *gfn*."""
        return next((s for s in self.by_id.values() if s.gfn <= gfn < s.gfn + s.nr), None)

    def covers(self, ipa: Ipa) -> bool:
        """Whether a slot covers the guest physical address *ipa*."""
        return self.find(gpa_to_gfn(ipa)) is not None

    def check(self, region: UserspaceMemoryRegion2, file: GuestMemory | None) -> None:
        """Raise SyscallFailed for what is refused before anything is changed."""
        self._check_numbers(region)
        # A size of 0 deletes, and the other members are not looked at then.
        if not region.memory_size:
            if region.slot not in self.by_id:
                refuse(EINVAL, f"there is no slot {region.slot} to delete")
            return
        # A slot with a guest_memfd is made and deleted, never moved: the guest's pages are bound by their gfn.
        if region.slot in self.by_id:
            refuse(EINVAL, f"slot {region.slot} is there, and one with a guest_memfd is never changed")
        gfn, nr = region.guest_phys_addr // PAGE, region.memory_size // PAGE
        # Two slots on one gfn: a fault could not tell which page is meant.
        if any(s.gfn < gfn + nr and gfn < s.gfn + s.nr for s in self.by_id.values()):
            refuse(EEXIST, "another slot covers part of these guest addresses")
        if not region.flags & MemFlag.GUEST_MEMFD:
            refuse(EINVAL, "this process has no memory but guest_memfd")
        self._check_file(region, file)

    @staticmethod
    def _check_numbers(region: UserspaceMemoryRegion2) -> None:
        flags, size = region.flags, region.memory_size
        valid = MemFlag.GUEST_MEMFD if flags & MemFlag.GUEST_MEMFD else MemFlag.LOG_DIRTY_PAGES | MemFlag.READONLY
        if flags & ~int(valid):
            refuse(EINVAL, f"flags {flags:#x}")
        if (size | region.guest_phys_addr | region.userspace_addr) % PAGE or region.userspace_addr + size > _USER:
            refuse(EINVAL, "an address or the size is no multiple of a page")
        offset = region.guest_memfd_offset
        if flags & MemFlag.GUEST_MEMFD and (offset % PAGE or offset + size >= 1 << 64):
            refuse(EINVAL, f"offset {offset:#x}")
        if region.slot >= NR_SLOTS:
            refuse(EINVAL, f"slot {region.slot:#x}")
        if region.guest_phys_addr + size >= 1 << 64 or size // PAGE > _MAX_PAGES:
            refuse(EINVAL, f"{size:#x} bytes at {region.guest_phys_addr:#x}")

    @staticmethod
    def check_reach(slot: Memslot) -> None:
        """Raise SyscallFailed(EFAULT) for one that is not within the guest's addresses; it has been bound by then."""
        if slot.gfn + slot.nr > 1 << IPA_BITS - 12:
            refuse(EFAULT, f"beyond {IPA_BITS} bits of guest address")

    def _check_file(self, region: UserspaceMemoryRegion2, file: GuestMemory | None) -> None:
        if file is None or file.closed:
            refuse(EBADF, "no open file")
        # A file belongs to the VM that made it. With another VM's file, invalidation would miss this one's stage 2.
        if not self._owns(file):
            refuse(EINVAL, "not a guest_memfd of this VM")
        if region.guest_memfd_offset + region.memory_size > file.size:
            refuse(EINVAL, f"past the end of the file, {file.size:#x}")
