"""Mistakes planted in the emulated /dev/kvm, each of a kind that a kernel could have; gmem conform sees them all.

tests/test_conform.py says how soon.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EBADF, EINVAL
from typing import Any

import pytest

from guest_memfd.designs.ours import OurLibrary
from guest_memfd.errors import Signalled, SyscallFailed
from guest_memfd.machine.dev import calls, file
from guest_memfd.machine.dev.file import GuestMemoryFile, Mapped
from guest_memfd.machine.dev.kvm import vm
from guest_memfd.machine.dev.kvm.memory import KvmMemoryFile
from guest_memfd.machine.dev.kvm.slots import Memslot, Memslots
from guest_memfd.machine.dev.kvm.system import KvmDevice
from guest_memfd.machine.dev.kvm.vm import KvmVmFile
from guest_memfd.machine.linux.mm import FileMapping
from guest_memfd.uapi.kvm import UserspaceMemoryRegion2
from guest_memfd.uapi.memory import FALLOC_FL_PUNCH_HOLE, Advice
from guest_memfd.words.primitives import Folio, Steps

Plant = Callable[[pytest.MonkeyPatch], None]
MISTAKES: dict[str, Plant] = {}


def mistake(plant: Plant) -> Plant:
    MISTAKES[plant.__name__] = plant
    return plant


# -- fallocate, mmap, the file -----------------------------------------------------------------------------------------


@mistake
def a_punch_past_the_end_is_refused(patch: pytest.MonkeyPatch) -> None:
    right = KvmMemoryFile.check_fallocate

    def check(self: KvmMemoryFile, mode: int, offset: int, nr: int) -> None:
        right(self, mode, offset, nr)
        if mode & FALLOC_FL_PUNCH_HOLE and offset + nr > self.size:
            raise SyscallFailed(EINVAL, "fallocate")

    patch.setattr(KvmMemoryFile, "check_fallocate", check)


@mistake
def fallocate_past_the_end_allocates_what_is_inside(patch: pytest.MonkeyPatch) -> None:
    right = KvmMemoryFile.check_fallocate
    patch.setattr(KvmMemoryFile, "check_fallocate", lambda self, mode, offset, nr: right(
        self, mode, offset, nr if mode & FALLOC_FL_PUNCH_HOLE else min(nr, max(self.size - offset, nr % 4096 or 4096))))


@mistake
def alignment_is_checked_before_the_mode(patch: pytest.MonkeyPatch) -> None:
    right = GuestMemoryFile.fallocate

    def fallocate(self: GuestMemoryFile, mode: int, offset: int, nr: int) -> None:
        if not self.closed and (offset | nr) % 4096:
            raise SyscallFailed(EINVAL, "fallocate")
        right(self, mode, offset, nr)

    patch.setattr(GuestMemoryFile, "fallocate", fallocate)


@mistake
def the_end_of_a_range_may_be_the_last_byte(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(file, "_LAST_BYTE", (1 << 63) + 4096)


@mistake
def an_odd_size_is_rounded_up(patch: pytest.MonkeyPatch) -> None:
    right = KvmMemoryFile.__init__
    patch.setattr(KvmMemoryFile, "__init__", lambda self, vm, size, flags: right(
        self, vm, -(-size // 4096) * 4096 if 0 < size < 1 << 40 else size, flags))


@mistake
def a_flag_too_many_is_ignored(patch: pytest.MonkeyPatch) -> None:
    right = KvmMemoryFile.__init__
    patch.setattr(KvmMemoryFile, "__init__", lambda self, vm, size, flags: right(self, vm, size, flags & ~4))


@mistake
def a_file_without_mmap_can_be_mapped(patch: pytest.MonkeyPatch) -> None:
    right = KvmMemoryFile.check_mmap

    def check(self: KvmMemoryFile, offset: int, nr: int, shared: bool) -> None:
        if shared:
            return
        right(self, offset, nr, shared)

    patch.setattr(KvmMemoryFile, "check_mmap", check)


@mistake
def a_mapping_ends_with_the_file(patch: pytest.MonkeyPatch) -> None:
    right = KvmMemoryFile.check_mmap

    def check(self: KvmMemoryFile, offset: int, nr: int, shared: bool) -> None:
        right(self, offset, nr, shared)
        if offset + nr > self.size:
            raise SyscallFailed(EINVAL, "mmap")

    patch.setattr(KvmMemoryFile, "check_mmap", check)


@mistake
def a_store_through_a_read_only_mapping_succeeds(patch: pytest.MonkeyPatch) -> None:
    right = Mapped._access

    def access(self: Mapped, index: Any, within: int, length: int, data: bytes | None = None) -> bytes:
        self.readonly = False
        return right(self, index, within, length, data)

    patch.setattr(Mapped, "_access", access)


@mistake
def the_signal_names_the_page_and_not_the_byte(patch: pytest.MonkeyPatch) -> None:
    right = Mapped._access

    def access(self: Mapped, index: Any, within: int, length: int, data: bytes | None = None) -> bytes:
        try:
            return right(self, index, within, length, data)
        except Signalled as error:
            raise Signalled(error.signal, error.address & -4096, error.code) from None

    patch.setattr(Mapped, "_access", access)


@mistake
def a_private_page_can_be_touched(patch: pytest.MonkeyPatch) -> None:
    right = KvmMemoryFile.__init__

    def made(self: KvmMemoryFile, vm: KvmVmFile, size: int, flags: int) -> None:
        right(self, vm, size, flags)
        self.init_shared()

    patch.setattr(KvmMemoryFile, "__init__", made)


@mistake
def a_new_page_is_not_cleared(patch: pytest.MonkeyPatch) -> None:
    def zero(self: OurLibrary, folio: Folio) -> Steps[None]:
        yield from self.host.folio_mark_uptodate(folio)

    patch.setattr(OurLibrary, "zero", zero)


@mistake
def a_punch_leaves_the_mapping(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FileMapping, "zap", lambda self, start, nr: [])


@mistake
def remove_only_unmaps(patch: pytest.MonkeyPatch) -> None:
    right = file.advise
    patch.setattr(file, "advise", lambda mapped, advice, at, nr: right(
        mapped, Advice.DONTNEED if advice == Advice.REMOVE else advice, at, nr))


@mistake
def populate_goes_on_after_a_page_that_fails(patch: pytest.MonkeyPatch) -> None:
    right = GuestMemoryFile.fault_in
    patch.setattr(GuestMemoryFile, "fault_in", lambda self, index: right(self, index) or True)


@mistake
def an_unknown_advice_is_taken(patch: pytest.MonkeyPatch) -> None:
    right = file.advise
    patch.setattr(file, "advise", lambda mapped, advice, at, nr: right(mapped, advice if advice != 99 else 0, at, nr))


@mistake
def read_is_espipe(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(calls.REFUSED, "read", calls.REFUSED["pread64"])


# -- slots -------------------------------------------------------------------------------------------------------------


@mistake
def another_vms_file_can_be_bound(patch: pytest.MonkeyPatch) -> None:
    right = Memslots.__init__
    patch.setattr(Memslots, "__init__", lambda self, rules, _: right(
        self, rules, lambda given: isinstance(given, KvmMemoryFile)))


@mistake
def a_range_can_be_bound_twice_with_eexist(patch: pytest.MonkeyPatch) -> None:
    right = GuestMemoryFile.check

    def check(self: GuestMemoryFile, ret: int, call: str, why: str = "") -> None:
        right(self, -17 if call.startswith("KVM_SET_USER") and ret == -EINVAL else ret, call, why)

    patch.setattr(GuestMemoryFile, "check", check)


@mistake
def slots_may_overlap_in_their_last_page(patch: pytest.MonkeyPatch) -> None:
    right = Memslots.check

    def check(self: Memslots, region: UserspaceMemoryRegion2, given: Any) -> None:
        whole, self.by_id = self.by_id, {number: slot if slot.nr < 2 else type(slot)(
            slot.gfn, slot.nr - 1, slot.file, slot.start, slot.file_only) for number, slot in self.by_id.items()}
        try:
            right(self, region, given)
        finally:
            self.by_id = whole

    patch.setattr(Memslots, "check", check)


@mistake
def a_bad_descriptor_is_seen_before_the_numbers(patch: pytest.MonkeyPatch) -> None:
    right = Memslots.check

    def check(self: Memslots, region: UserspaceMemoryRegion2, given: Any) -> None:
        if given is not None and given.closed and region.memory_size:
            raise SyscallFailed(EBADF, "KVM_SET_USER_MEMORY_REGION2")
        right(self, region, given)

    patch.setattr(Memslots, "check", check)


@mistake
def a_file_without_mmap_serves_a_default_vm(patch: pytest.MonkeyPatch) -> None:
    right = vm.Memslot
    patch.setattr(vm, "Memslot", lambda gfn, nr, given, start, file_only: right(gfn, nr, given, start, True))


@mistake
def the_guest_gets_the_next_page(patch: pytest.MonkeyPatch) -> None:
    right = Memslot.page
    patch.setattr(Memslot, "page", lambda self, gfn: right(self, gfn) ^ 1)


@mistake
def a_deleted_slot_stays_in_stage_2(patch: pytest.MonkeyPatch) -> None:
    def delete(self: KvmVmFile, number: int) -> None:
        del self.slots.by_id[number]

    patch.setattr(KvmVmFile, "_delete", delete)


@mistake
def deleting_nothing_succeeds(patch: pytest.MonkeyPatch) -> None:
    right = KvmVmFile.set_user_memory_region2

    def region(self: KvmVmFile, slot: int, flags: int, gpa: Any, size: int, **more: Any) -> None:
        if size or slot in self.slots.by_id or slot > 3 or gpa % 4096:
            right(self, slot, flags, gpa, size, **more)

    patch.setattr(KvmVmFile, "set_user_memory_region2", region)


@mistake
def a_child_may_use_the_vm(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KvmVmFile, "_in_use", KvmDevice._in_use)


@mistake
def a_conversion_is_offered(patch: pytest.MonkeyPatch) -> None:
    right = KvmDevice.check_extension
    patch.setattr(KvmDevice, "check_extension", lambda self, cap: 8 if cap == 250 else right(self, cap))
