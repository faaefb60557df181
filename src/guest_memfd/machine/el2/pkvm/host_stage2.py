"""The host's own stage 2. The host reaches what was not withheld, and learns of the rest by an abort.

An identity map with VMID 0 that starts empty (kvm/hyp/nvhe/mem_protect.c): a fault on an empty entry maps the largest
block that fits between the entry and the memory region, RWX for memory, RW for devices. A page that is given away is an
annotated entry, for which blocks have to come apart; nothing ever puts them together again. Sizes of annotations here
are those of a leaf, 4 KiB, 2 MiB or 1 GiB; upstream annotates pages only.

When the pool of table pages is empty, all device mappings are dropped and the operation is tried once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from guest_memfd.machine.el2.kvm.idmap import HostIdmap
from guest_memfd.machine.el2.kvm.pgtable import leaf_attributes
from guest_memfd.machine.el2.pkvm.annotation import LOCKED, Annotation, AnnotationType, PageOwner, Release
from guest_memfd.machine.el2.pkvm.states import ORDERS
from guest_memfd.machine.hw.arm64.access import Transfer
from guest_memfd.machine.hw.arm64.descriptor import Entry
from guest_memfd.machine.hw.arm64.fault import TRANSLATION, Fault, Inject, LoadStore
from guest_memfd.machine.hw.arm64.pages import PageSource
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.buddy import OutOfMemory
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.words.units import FIRST_GFN, PAGE, Gfn, Pa, Pfn, identity_ipa, identity_pa, pfn_to_pa

MEMORY = leaf_attributes("rwx")
DEVICE = leaf_attributes("rw", device=True)

_S1PTW = 1 << 7
# EC of an abort from a lower EL; bit 26 of ESR makes it one from the same EL.
_SAME_EL = 1 << 26


class Region(NamedTuple):
    """A memblock region: bytes of memory from *base* on. *nomap*: memory that neither host nor guests may have."""

    base: Pa
    size: int
    nomap: bool = False

    @property
    def end(self) -> Pa:
        """The first byte after it."""
        return self.base + self.size


class MachineDead(Exception):  # noqa: N818 - it says what has become of the machine
    """BUG() at EL2: the whole machine stops, with this text on the console."""


class HostStage2(HostIdmap):
    """The host's stage 2 of *pa_bits* of identity-mapped addresses; *source* is EL2's pool of table pages.

    *release* picks the format of annotations and what becomes of an access to an annotated page.
    """

    def __init__(self, ram: Ram, source: PageSource, tlbs: Sequence[Tlb], regions: Sequence[Region],
                 pa_bits: int, release: Release) -> None:
        super().__init__(ram, source, tlbs, pa_bits, LOCKED.encode(release))
        self.regions, self.release, self.pa_bits = sorted(regions), release, pa_bits

    def region(self, pa: Pa) -> Region | None:
        """The memory region of an address."""
        return next((r for r in self.regions if r.base <= pa < r.end), None)

    # -- faults --------------------------------------------------------------------------------------------------

    def abort(self, fault: Fault, el: int, transfer: Transfer | None = None) -> Inject | None:
        """handle_host_mem_abort(): None when the host tries again; *transfer* is the instruction, for ESR_EL2.ISV.

        Raises MachineDead where EL2 has BUG(): the pool is empty, and in 6.12 also on an access to an annotated page.
        """
        ipa = fault.ipa
        assert ipa is not None
        entry = self.pgt.leaf(ipa)
        if entry.valid:
            return None                         # -EEXIST: another CPU was faster
        if entry.value:
            return self._refuse(fault, el, transfer, entry)
        # The largest block that neither crosses the empty entry (its neighbours may be annotated) nor the end of the
        # memory region.
        order = self._largest(identity_pa(ipa), entry.order)
        at = ipa & -(PAGE << order)
        pa = identity_pa(at)
        try:
            # RAM is mapped by the first fault and never by a call: at boot EL2 knows of no page that the host needs.
            self._try(lambda: self.pgt.map(at, order, pa, MEMORY if self.region(pa) else DEVICE))
        except OutOfMemory as error:
            raise MachineDead(f"kernel BUG at arch/arm64/kvm/hyp/nvhe/mem_protect.c: host_stage2_idmap({ipa:#x}) "
                              f"returned -ENOMEM ({error})") from error
        return None

    # host_inject_mem_abort(): the host sees its own ESR_EL2 with a mark that no other abort of EL1 has.
    def _refuse(self, fault: Fault, el: int, transfer: Transfer | None, entry: Entry) -> Inject:
        if self.release == "6.12":
            raise MachineDead(f"kernel BUG at arch/arm64/kvm/hyp/nvhe/mem_protect.c: host_stage2_idmap({fault.ipa:#x}) "
                              f"returned -EPERM: {Annotation.decode(entry.value, self.release)!r}")
        esr = fault.esr_el2(None if transfer is None else LoadStore(
            transfer.register, transfer.size, transfer.sixty_four, transfer.sign_extend))
        # The mark. Linux cannot see that there is an EL2, so it must be able to tell this abort from one of its own
        # tables.
        esr |= _S1PTW | (_SAME_EL if el else 0)
        return Inject(esr, fault.va if fault.kind == TRANSLATION else None)

    # host_stage2_adjust_range(): the order of the largest block in the empty entry that stays inside its region. Devices
    # get pages.
    def _largest(self, pa: Pa, most: int) -> int:
        region = self.region(pa)
        for order in reversed(ORDERS):
            start = pa & -(PAGE << order)
            if region and order <= most and region.base <= start and start + (PAGE << order) <= region.end:
                return order
        return 0

    # -- ownership -----------------------------------------------------------------------------------------------

    def _try(self, operation: Callable[[], None]) -> None:
        try:
            operation()
        except OutOfMemory:
            # Device mappings can be dropped at any time, as they are faulted in again. Annotations must not be: they
            # are the only record of who may not be let in.
            self.unmap_devices()
            operation()

    def unmap_devices(self) -> None:
        """host_stage2_unmap_dev_all(): what it drops is faulted in again."""
        edges = [Pa(0), *(edge for r in self.regions for edge in (r.base, r.end)), Pa(1 << self.pa_bits)]
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            at = identity_ipa(start)
            while at < end:
                entry = self.pgt.leaf(at)
                size = PAGE << entry.order
                if entry.valid:
                    self.pgt.unmap(at)
                at = (at & -size) + size

    def give_away(self, pfn: Pfn, order: int, owner: PageOwner, handle: int = 0, gfn: Gfn = FIRST_GFN) -> None:
        """Annotate an aligned range of 1 << *order* pages as *owner*'s. Raises OutOfMemory, nothing changed."""
        note = Annotation(AnnotationType.DONATION, owner, handle, gfn).encode(self.release)
        self._try(lambda: self.annotate(pfn, order, note))

    def split_note(self, pfn: Pfn) -> None:
        """Have each page that the annotated entry of *pfn* stands for say so itself. Raises OutOfMemory, nothing changed."""
        ipa = identity_ipa(pfn_to_pa(pfn))
        if not self.pgt.leaf(ipa).valid:
            self._try(lambda: self.pgt.split(ipa, self._note_of))

    # A donation names the gfn of each page; what is empty stays empty.
    def _note_of(self, entry: Entry, number: int) -> int:
        note = Annotation.decode(entry.value, self.release)
        return 0 if note is None else replace(note, gfn=Gfn(note.gfn + number)).encode(self.release)

    def take_back(self, pfn: Pfn, order: int) -> None:
        """Map an annotated range RWX again. Raises OutOfMemory, nothing changed: never when its entry is that size."""
        pa = pfn_to_pa(pfn)
        self._try(lambda: self.pgt.map(identity_ipa(pa), order, pa, MEMORY))

    def note(self, pa: Pa) -> Annotation | None:
        """What the host's entry of *pa* says about its owner; None for one that maps or is empty."""
        return Annotation.decode(self.pgt.leaf(identity_ipa(pa)).value, self.release)
