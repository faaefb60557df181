"""The stops of the tour: where the way of one page is looked at, in the order in which the run comes there.

A stop names functions, never lines. A function is there only if the run really calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

from guest_memfd.core import direct_map, fault
from guest_memfd.hypervisors.kvm.pkvm import PkvmOps
from guest_memfd.machine.dev.kvm.vcpu import KvmVcpuFile
from guest_memfd.machine.el2.kvm.pgtable import KvmStage2Table
from guest_memfd.machine.el2.pkvm import transitions
from guest_memfd.machine.el2.pkvm.host_stage2 import HostStage2
from guest_memfd.machine.hw.arm64 import tlbi
from guest_memfd.machine.hw.arm64.mmu import Mmu
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hypcalls.pkvm import PkvmDriver
from guest_memfd.machine.linux.linear_map import LinearMap
from guest_memfd.machine.primitives import directmap
from guest_memfd.vmm.kvm import KvmGuest
from tour.ride import GFN, IPA


@dataclass(frozen=True)
class Point:
    """A call of *function* that counts; if *argument* is given, only one whose argument of that name is *value*.

    *begin*: the quote starts at the line that holds this text.
    """

    function: Callable[..., Any]
    argument: str = ""
    value: int = 0
    begin: str = ""

    @property
    def code(self) -> CodeType:
        """What a frame of it runs."""
        code: CodeType = self.function.__code__
        return code

    @property
    def name(self) -> str:
        """What the function is called, with its module."""
        return f"{self.function.__module__}.{self.code.co_qualname}"

    def is_call(self, code: CodeType, arguments: Mapping[str, Any]) -> bool:
        """Whether a call of *code* with *arguments* is the one that is meant."""
        return code is self.code and (not self.argument or arguments[self.argument] == self.value)


@dataclass(frozen=True)
class Stop:
    """One stop: its *title*, the *points* to come by, one after the other, and the *text*."""

    title: str
    points: tuple[Point, ...]
    text: str


STOPS = (
    Stop("The VMM calls KVM_RUN", (Point(KvmGuest.step, begin="out = self.vcpu.run"),), """\
The VMM calls the ioctl KVM_RUN, here `vcpu.run()`, and waits until it is needed again. The VMM does not know that a
page is missing. The ioctl returns when the guest has turned itself off. All that follows happens before that."""),
    Stop("KVM gets the guest's fault", (Point(KvmVcpuFile._fault, "ipa", IPA),), """\
The guest stores to the page. The guest's stage 2 has no entry for it, so the CPU leaves the guest with a stage-2
fault. KVM finds the memslot of the address. The memslot says which file the memory comes from, and which page of
the file it is. KVM asks the library for that page (`guest_fault`), and lets the guest go on if the answer is 0."""),
    Stop("The library gives the page to the guest", (
        Point(fault.fault_bound, "gfn", GFN), Point(fault.give_private, "gfn", GFN)), """\
The attribute of the page says private. `grab_folio` finds no folio, so it allocates one, locks it, and fills it
with zeros. It writes the zeros through the direct map. So the TLB of that CPU now has two entries for the frame:
one for stage 1 alone, and one for both stages together. Then comes the most important rule of the library, in
`give_private`: the host lets go first, and only then the guest gets the page."""),
    Stop("The library takes the page out of the direct map", (Point(direct_map.zap_noflush),), """\
The direct map is the kernel's own mapping of all RAM. A stray load of the kernel could reach the page there. The
library marks the folio, and then asks for the entry to be made invalid. The mark comes first: no one may rely on
the entry of a marked folio. If the entry cannot be changed, the library takes the mark back and the fault fails
with -ENOMEM."""),
    Stop("The primitive: one step of the host", (Point(directmap.set_direct_map_invalid_noflush),), """\
The library never touches memory itself. It asks its host for *primitives*, one after the other, and the host
carries them out. This is the primitive `set_direct_map_invalid_noflush` on the emulated machine. The host that is
explored has a primitive of the same name, which changes a few bytes of its state. So the same code of the library
can be explored and can run."""),
    Stop("Linux changes the page table", (Point(LinearMap._set_pageattr_masks),), """\
Here a page table changes. The entry loses bit 0 (valid) and gets bit 11, which says "present for Linux, invalid for
the CPU". The rest of the entry stays, so that the page can be put back later. This entry maps one page. A larger
leaf would have been split before."""),
    Stop("The TLBs forget", (Point(tlbi.vaale1is), Point(Tlb.drop_va)), """\
An invalid entry is not enough: a CPU that has the old entry in its TLB can still use it. So the library asks for a
flush. For one page Linux uses one TLBI VAALE1IS, and every CPU drops what its TLB has for this address. Both
entries of stop 3 go. From here on the kernel cannot reach the page through the direct map."""),
    Stop("The driver makes it a hypercall", (Point(PkvmOps.prepare_private, "gfn", GFN),), """\
The host has let go. Now the library calls the hypervisor's driver. A driver supplies seven operations, and this one
is `prepare_private` of pKVM: one hypercall. -EPERM means here that the guest has the page already. That is no
error, because two vCPUs may fault on the same page."""),
    Stop("Linux calls EL2", (Point(PkvmDriver._donate_guest, "gfn", GFN),), """\
Here the hypercall gets its arguments: frame number, guest frame number, number of pages. EL2 may need new page
tables for the guest, and it has no allocator for them. So Linux offers it pages first (`_topup`): they go into the
memcache of the VM."""),
    Stop("EL2 checks, and changes the owner", (
        Point(transitions.donate_guest, "gfn", GFN, begin="ret = checks.host_and_hyp"),), """\
From here on the code is that of EL2. EL2 does not trust the host. It checks that the frame is the host's, that the
address is inside of the guest's memory, and that the guest has nothing there. All checks come before the first
change. `_donated` is the only change that can fail, so it comes first; `_guest_map` cannot fail any more."""),
    Stop("EL2 writes two stage-2 tables", (
        Point(HostStage2.give_away, "gfn", GFN), Point(KvmStage2Table._replace, "ia", IPA)), """\
First the host loses the frame: `give_away` replaces its entry by a note that says which guest has the frame, and at
which gfn. Then the guest gets it: `_replace` writes the guest's entry. It follows the rule of the architecture,
break before make: a valid entry is made invalid and flushed before another takes its place. The guest's entry was
empty, so nothing has to be flushed."""),
    Stop("The guest goes on, and the TLB learns the page", (Point(Mmu._stage2, "ipa", IPA),), """\
KVM enters the guest again, at the same instruction. The TLB has nothing for this address, so the CPU walks the
guest's stage 2. This time it finds an entry, and the TLB keeps it. The store is done: 42 (0x2a) is in the frame.
The guest has noticed nothing."""),
)
"""From the ioctl to the TLB."""
