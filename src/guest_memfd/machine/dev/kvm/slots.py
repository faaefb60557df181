"""Memory slots: which part of which file is where in the guest. Here is what KVM_SET_USER_MEMORY_REGION2 refuses.

Checks in the order of virt/kvm/kvm_main.c check_memory_region_flags() and kvm_set_memory_region(), of virt/kvm/guest_memfd.c
kvm_gmem_bind() and, after that, of arch/arm64/kvm/mmu.c kvm_arch_prepare_memory_region(). The process has no memory but
guest_memfd, so a slot without a file is refused, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from errno import EBADF, EEXIST, EINVAL
from typing import TYPE_CHECKING, NoReturn

from guest_memfd.errors import SyscallFailed
from guest_memfd.machine.dev.kvm.release import KvmRules
from guest_memfd.uapi.kvm import MemFlag, UserspaceMemoryRegion2
from guest_memfd.uapi.memory import GuestMemory
from guest_memfd.words.units import PAGE, Gfn, Index, Ipa, gpa_to_gfn

if TYPE_CHECKING:
    from guest_memfd.machine.dev.kvm.memory import KvmMemoryFile

CALL = "KVM_SET_USER_MEMORY_REGION2"
_MAX_PAGES = (1 << 31) - 1


@dataclass(frozen=True)
class Memslot:
    """Guest frames [gfn, gfn+nr) are pages from *start* on of *file*.

    Not *file_only*: the guest gets what the process has at userspace_addr.
    """

    gfn: Gfn
    nr: int
    file: KvmMemoryFile
    start: Index
    file_only: bool = True

    def page(self, gfn: Gfn) -> Index:
        """The page of the file that *gfn* is."""
        return self.start + (gfn - self.gfn)


def refuse(errno: int, why: str) -> NoReturn:
    """Fail KVM_SET_USER_MEMORY_REGION2 with *errno*, by raising SyscallFailed."""
    raise SyscallFailed(errno, CALL, why)


class Memslots:
    """The slots of one VM by id, under *rules*; *owns* says whether a file was made by this VM."""

    def __init__(self, rules: KvmRules, owns: Callable[[GuestMemory], bool]) -> None:
        self.by_id: dict[int, Memslot] = {}
        self.rules, self._owns = rules, owns

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

    def _check_numbers(self, region: UserspaceMemoryRegion2) -> None:
        flags, size = region.flags, region.memory_size
        valid = MemFlag.GUEST_MEMFD if flags & MemFlag.GUEST_MEMFD else MemFlag.LOG_DIRTY_PAGES | MemFlag.READONLY
        if flags & ~int(valid):
            refuse(EINVAL, f"flags {flags:#x}")
        user = region.userspace_addr
        if (size | region.guest_phys_addr | user) % PAGE or user + size > self.rules.user_end:
            refuse(EINVAL, "an address or the size is no multiple of a page")
        offset = region.guest_memfd_offset
        if flags & MemFlag.GUEST_MEMFD and (offset % PAGE or offset + size >= 1 << 64):
            refuse(EINVAL, f"offset {offset:#x}")
        if region.slot >= self.rules.nr_slots:
            refuse(EINVAL, f"slot {region.slot:#x}")
        if region.guest_phys_addr + size >= 1 << 64 or size // PAGE > _MAX_PAGES:
            refuse(EINVAL, f"{size:#x} bytes at {region.guest_phys_addr:#x}")

    def check_reach(self, slot: Memslot) -> None:
        """Raise SyscallFailed for what the architecture refuses."""
        bits = self.rules.guest_bits
        if slot.gfn + slot.nr > 1 << bits - 12:
            refuse(self.rules.beyond, f"beyond {bits} bits of guest address")
        if not slot.file_only and not self.rules.unmappable:
            refuse(EINVAL, "the file was created without GUEST_MEMFD_FLAG_MMAP")

    def _check_file(self, region: UserspaceMemoryRegion2, file: GuestMemory | None) -> None:
        if file is None or file.closed:
            refuse(EBADF, "no open file")
        # A file belongs to the VM that made it. With another VM's file, invalidation would miss this one's stage 2.
        if not self._owns(file):
            refuse(EINVAL, "not a guest_memfd of this VM")
        if region.guest_memfd_offset + region.memory_size > file.size:
            refuse(EINVAL, f"past the end of the file, {file.size:#x}")
