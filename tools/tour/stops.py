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
    """One stop: its *title*, the *points* to come by, one after the other, the *text*, and where Linux 7.3 does the same."""

    title: str
    points: tuple[Point, ...]
    text: str
    linux: str = ""


STOPS = (
    Stop("The VMM calls KVM_RUN", (Point(KvmGuest.step, begin="out = self.vcpu.run"),), """\
The VMM calls the ioctl KVM_RUN, here `vcpu.run()`, and waits until it is needed again. The VMM does not know that a
page is missing. The ioctl returns when the guest has turned itself off. All that follows happens before that.""",
        "`kvm_arch_vcpu_ioctl_run()`, arch/arm64/kvm/arm.c"),
    Stop("KVM gets the guest's fault", (Point(KvmVcpuFile._fault, "ipa", IPA),), """\
The guest stores to the page. The guest's stage 2 has no entry for it, so the CPU leaves the guest with a stage-2
fault. It goes to EL2, and EL2 hands it to KVM at EL1 (not shown). KVM finds the memslot of the address. The memslot
says which file the memory comes from, and which page of the file it is. KVM asks the library for that page
(`guest_fault`). With 0 the guest goes on; with -EAGAIN it goes on, too, and faults again. `_stuck` only counts: a guest
that faults at the same place again and again, although its page is mapped, is told as an error.""",
        "`kvm_handle_guest_abort()`, arch/arm64/kvm/mmu.c"),
    Stop("The library gives the page to the guest", (
        Point(fault.fault_bound, "gfn", GFN), Point(fault.give_private, "gfn", GFN)), """\
The attribute of the page says private. `grab_folio` finds no folio, so it allocates one, locks it, and fills it
with zeros. It writes the zeros through the direct map. So the TLB of that CPU now has entries for the frame: one for
stage 1 alone, one for both stages together, one for the host's stage 2. A CPU may keep any of these; the machine keeps
all. (The last one is there already: the frame has been used before.) Then comes the most important rule of the
library, in `give_private`: the host lets go first, and only then the guest gets the page. In the other order there would
be a moment in which the kernel has a mapping of the guest's page. The folio stays locked until both are done
(`unlock_and_put`), so a second vCPU that faults on the page waits.""",
        "`kvm_gmem_get_pfn()`, virt/kvm/guest_memfd.c, which leaves the direct map alone"),
    Stop("The library takes the page out of the direct map", (Point(direct_map.zap_noflush),), """\
The direct map is the kernel's own mapping of all RAM. EL2 will not let the host have the page, whatever this entry
says. But a load of the kernel may run into the page by accident (`load_unaligned_zeropad()`). With the entry gone that
is a fault of stage 1, which the exception table fixes up. With the entry there it is an abort of stage 2. Gunyah makes
that an external abort, and the kernel dies; pKVM lets the kernel live, where the access has no exception-table entry by
taking the page from the guest by force. So the entry goes. First the library counts the page: hibernation must not
begin while pages are away. Then it marks the folio, and then asks for the entry to be made invalid. The mark comes
before the entry: no one may rely on the entry of a marked folio. If the entry cannot be changed (-ENOMEM: there is no
page for a table), the library takes mark and count back, and the fault fails.""",
        "nothing in guest_memfd yet; `secretmem_fault()`, mm/secretmem.c, does it for memfd_secret"),
    Stop("The primitive: one step of the host", (Point(directmap.set_direct_map_invalid_noflush),), """\
The library never touches memory itself. It asks its host for *primitives*, one after the other, and the host
carries them out. This is the primitive `set_direct_map_invalid_noflush` on the emulated machine. The explorer
([explorer.md](explorer.md)) has an abstract host, with a primitive of the same name that changes a few bytes of a
state. So the same code of the library can run, and can be explored in every order of steps. `_changed` notes for the
laws ([laws.md](laws.md)) what has become of the entry."""),
    Stop("Linux changes the page table", (Point(LinearMap._set_pageattr_masks),), """\
Here a page table changes. The entry loses bit 0 (valid) and gets bit 11. In a valid entry bit 11 is nG; where bit 0 is
clear Linux reads it as "present, but invalid for the CPU". The rest of the entry stays, so that the page can be put
back later. This entry maps one page. A larger leaf is split before this function is called; a leaf that is still cut
by the range is an error, -EINVAL. (As Linux 6.12, which the machine can be told to be, it splits none.)""",
        "`set_direct_map_invalid_noflush()`, arch/arm64/mm/pageattr.c"),
    Stop("The TLBs forget", (Point(tlbi.vaale1is), Point(Tlb.drop_va)), """\
An invalid entry is not enough: a CPU that has the old entry in its TLB can still use it. So the library asks for a
flush (`gmem.flush`, in `zap`). For one page Linux uses one TLBI VAALE1IS, and every CPU drops what its TLB has for this
address; VMID 0 is the host's. The entry for stage 1 and the one for both stages go, the one for stage 2 alone stays. From
here on the kernel cannot reach the page through the direct map. (pKVM's own flush, at stop 11, would drop the same
entries. The library does not rely on it: plain KVM has none.) The machine carries a TLBI out at once, and has no
barriers: the DSB and ISB around it are not modelled.""",
        "`flush_tlb_kernel_range()`, arch/arm64/include/asm/tlbflush.h"),
    Stop("The driver makes it a hypercall", (Point(PkvmOps.prepare_private, "gfn", GFN),), """\
The host has let go. Now the library calls the driver of the hypervisor, which is a part of KVM or of Gunyah's module. A
driver supplies the operations of `GuestMemfdOps` ([library.md](library.md)), and this one is `prepare_private` of pKVM:
one hypercall for each page (`by_page`). -EPERM says that the frame is not the host's, or that the guest has a page
there: somebody has given it before. Two vCPUs may fault on the same page, and a fault may be repeated, so that is no
error. (Were the frame somebody else's, the guest would fault again and again, and `_stuck` of stop 2 would tell.)""",
        "`pkvm_pgtable_stage2_map()`, arch/arm64/kvm/pkvm.c"),
    Stop("Linux calls EL2", (Point(PkvmDriver._donate_guest, "gfn", GFN),), """\
Here the hypercall gets its arguments: frame number, guest frame number, number of pages. Which guest is meant EL2
knows by the vCPU that is loaded. It may need new tables for the guest's stage 2, and its own pool has no pages for
these. So Linux offers it pages first (`_topup`): they go into a memcache, which is the VM's here, and each vCPU's in
Linux.""",
        "`kvm_call_hyp_nvhe(__pkvm_host_donate_guest, ...)`, arch/arm64/kvm/pkvm.c; `topup_hyp_memcache()`, mmu.c"),
    Stop("EL2 checks, and changes the owner", (
        Point(transitions.donate_guest, "gfn", GFN, begin="ret = checks.host_and_hyp"),), """\
From here on the code is that of EL2. EL2 does not trust the host. It checks that the frame is the host's, that the
address is one that the guest's stage 2 can map, and that the guest has nothing there. All checks come before the page
changes hands. Two steps change it (in Linux both under the locks of the two tables): `_donated` writes the host's table,
which can fail for want of a table page, so it comes first; `_guest_map` writes the guest's, and cannot fail any more.""",
        "`__pkvm_host_donate_guest()`, arch/arm64/kvm/hyp/nvhe/mem_protect.c"),
    Stop("EL2 writes two stage-2 tables", (
        Point(HostStage2.give_away, "gfn", GFN), Point(KvmStage2Table._replace, "ia", IPA)), """\
First the host loses the frame: `give_away` replaces its entry by a note that says which guest has the frame, and at
which gfn. Then the guest gets it. Both entries are written by `_replace`, break before make: a valid entry is made
invalid and flushed before another takes its place. The host's entry was valid. So this is the flush that counts: with
it goes what any CPU's TLB has of the host's stage 2 for the frame, user mappings and other addresses of it included.
For the guest's entry, which was empty, there is nothing to flush. The second quote is `_replace` itself; the numbers
under it are those of the call for the guest. If a table page is missing,
`_try` drops the host's mappings of devices, which are faulted in again, and tries once more. Not modelled: caches. Linux
cleans the page to the point of coherency before it maps it, unless the CPU has FWB.""",
        "`stage2_try_break_pte()`, `stage2_make_pte()`, arch/arm64/kvm/hyp/pgtable.c"),
    Stop("The guest goes on, and the TLB learns the page", (Point(Mmu._stage2, "ipa", IPA),), """\
KVM enters the guest again, by way of EL2, at the same instruction. The TLB has nothing for this address, so the CPU
walks the guest's stage 2. This time it finds an entry, and the TLB keeps it. (The loop over sizes is about runs of
entries with the contiguous bit; here there is one page.) The store is done: 42 (0x2a) is in the frame. The guest has
noticed nothing.""",
        "no code: the Arm ARM, chapter D8"),
)
"""From the ioctl to the TLB."""
