"""The laws: one function, one sentence, one source each. A law holds for every design and every interleaving.

Third parties add theirs with an entry point in ``guest_memfd.laws``.
"""

from __future__ import annotations

from collections.abc import Iterable

from guest_memfd.designs.design import Design
from guest_memfd.errors import BadInput, UnknownName
from guest_memfd.laws import access, operations, pages
from guest_memfd.laws.law import Law, Violator, lacks
from guest_memfd.plugins.registry import Registry

LAWS: Registry[Law] = Registry("law", "guest_memfd.laws", {law.name: law for law in (
    Law("host-survives",
        "no access the kernel may make on its own ends in an abort it cannot handle",
        "arch/arm64/mm/fault.c do_sea(), arch/arm64/mm/extable.c; 19/35 thread, Feb-Mar 2024",
        "at every access of the kernel", note=access.host_survives,
        broken_by=Violator("none", "gunyah", ("vcpu", "zeropad"),
                           "load_unaligned_zeropad takes a synchronous external abort (stage 2): do_sea() does not look at "
                           "exception tables")),
    Law("guest-private",
        "what is private to a guest is read or written by no one else: not through stage 1, a stale TLB entry, a user "
        "mapping, a pin, DMA, or an image on disk",
        "Documentation/virt/kvm/api.rst guest_memfd; David Hildenbrand, 26 Feb 2024; Mike Rapoport, 19 Aug 2024",
        "at every access", note=access.guest_private,
        broken_by=Violator("none", "kvm", ("vcpu", "zeropad"),
                           "load_unaligned_zeropad reads a page that is private to the guest, through the direct map")),
    Law("no-stale-data",
        "any receiver of a page sees zeros or its own data, never another's; data that must be preserved is",
        "virt/kvm/guest_memfd.c kvm_gmem_prepare_folio(); Ackerley Tng, 8 Aug 2024",
        "at every access of guest, VMM and device, and in every state where no lock is held on the page",
        note=access.no_stale_data, state=pages.no_stale_data,
        broken_by=Violator("none", "pkvm", ("vcpu", "power"),
                           "the guest's data is lost: reclaimed by force because the host touched it")),
    Law("free-memory",
        "no one reads or writes free memory: not through a user mapping, a kernel cache, a pin, or a guest's TLB",
        "mm/page_alloc.c free_pages_prepare(); virt/kvm/pfncache.c",
        "at every access that is meant for a page", note=access.free_memory,
        broken_by=Violator("PunchTellsNoCache", "kvm", ("vmm2", "pfn-cache", "drainer"),
                           "gfn_to_pfn_cache user writes free memory, through the direct map", planted=True)),
    Law("one-owner",
        "no page is private to two parties, and the host's tables, the hypervisor's and the library's say the same",
        "arch/arm64/kvm/hyp/nvhe/mem_protect.c; Gunyah API, memory extents",
        "in every state where no lock is held on the page", state=pages.one_owner, note=pages.one_owner_note,
        broken_by=Violator("none", "kvm", ("vcpu",),
                           "guest and host both reach a private page")),
    Law("no-stale-mapping",
        "no mapping of any kind - user, kernel cache, guest, TLB - outlives the page's stay in the file",
        "mm/memory.c unmap_mapping_range(); virt/kvm/guest_memfd.c kvm_gmem_punch_hole(); virt/kvm/pfncache.c",
        "in every state", state=pages.no_stale_mapping,
        broken_by=Violator("gunyah-v17", "gunyah", ("patient-vcpu", "vmm"),
                           "the guest maps a page that the file no longer holds, in a TLB")),
    Law("nothing-lost",
        "when the last reference is gone every page is back: owned by the host, in the direct map, scrubbed, free - "
        "whatever failed on the way, whichever module was unloaded; what the hypervisor refuses for good is given up and "
        "counted",
        "mm/secretmem.c secretmem_free_folio(); arch/x86/virt/svm/sev.c snp_leak_pages(); Vishal Annapurve, 10 Oct 2024",
        "when a page is freed, and after teardown", note=pages.nothing_lost_note, end=pages.nothing_lost,
        broken_by=Violator("gunyah-v17", "gunyah", ("vmm",),
                           "the inode is held for ever")),
    Law("pins-respected",
        "a page that someone may still reach through a reference does not become the guest's alone",
        "David Hildenbrand, 26 Feb and 6-17 Aug 2024",
        "when a page becomes private, and in every state", state=pages.pins_respected, note=pages.pins_respected_note,
        broken_by=Violator("gunyah-v17", "gunyah", ("vcpu", "device"),
                           "a page is donated while somebody holds a reference to reach it by")),
    Law("lifetimes",
        "no primitive is called on an inode, a file or a VM that is gone",
        "virt/kvm/guest_memfd.c kvm_gmem_get_file(); fs/inode.c evict()",
        "at every primitive", note=access.lifetimes,
        broken_by=Violator("guestmem-rfc1", "kvm", ("vcpu2", "creator"),
                           "use after free of the inode, in down_read", scene="nothing-yet")),
    Law("poison-contained",
        "a page whose memory is broken is given to no one and stays with no one, and any caller that asks for it is told",
        "virt/kvm/guest_memfd.c kvm_gmem_error_folio(); mm/memory-failure.c me_pagecache_clean()",
        "when memory_failure() has done, and at every mapping and access after", note=access.poison_note,
        broken_by=Violator("guestmem-rfc1", "gunyah", ("vcpu", "memory-failure"),
                           "memory_failure() is told that the page is taken care of, and the guest still reaches it")),
    Law("all-or-nothing",
        "a refused operation leaves what its documentation says, with the documented errno, and names the page that refused",
        "in-place conversion v8-v13 (2026); Sean Christopherson, 3 Apr 2025",
        "when an operation ends", note=operations.all_or_nothing,
        broken_by=Violator("gunyah-v17", "gunyah", ("vmm",),
                           "punch returns 0 and a page of the hole is still there")),
    Law("no-false-refusal",
        "an operation that nothing stands against succeeds, and its caller is told what has happened",
        "Documentation/virt/kvm/api.rst; Ackerley Tng on -EAGAIN, Oct 2025",
        "when an operation ends, and when it returns", note=operations.no_false_refusal,
        broken_by=Violator("gunyah-v17", "gunyah", ("vmm",),
                           "unbind returns -ENOENT, and nothing stands against it")),
    Law("fault-served",
        "a fault that returned success is followed by an access that succeeds, unless the page was taken in between",
        "arch/x86/kvm/mmu/mmu.c kvm_mmu_do_page_fault(); arch/arm64/kvm/mmu.c user_mem_abort()",
        "when a fault of the guest or of the VMM has been handled", note=operations.fault_served,
        broken_by=Violator("gunyah-v17", "gunyah", ("vcpu", "vmm"),
                           "a fault returns 0, and the guest does not map the page: it faults again, for ever")),
    Law("progress",
        "no deadlock, no lost wake-up; every operation ends, or ends after finitely many retries",
        "mm/guestmem RFC v2 discussion, Aug 2024",
        "by the explorer: in states from which no one moves, and on cycles",
        broken_by=Violator("gunyah-v17", "gunyah", ("vcpu", "vmm"), "deadlock: down_read invalidate, lock_folio")),
    Law("library-alone",
        "only the library changes the direct map",
        "Christoph Hellwig, 22 and 26 Feb 2024",
        "at every change of a direct-map entry", note=access.library_alone,
        broken_by=Violator("gunyah-v17", "gunyah", ("vcpu",), "module gunyah changes the direct map itself")),
    Law("bounded-cost",
        "direct-map writes, TLB flushes, hypercalls and stalls of an operation stay within what the design states",
        "Dave Hansen, 5 Dec 2025; arch/x86/mm/pat/set_memory.c",
        "when an operation ends", note=operations.bounded_cost,
        broken_by=Violator("guestmem-rfc1", "gunyah", ("vcpu", "vmm"),
                           "user_fault of 1 pages takes 3 hypercalls, and at most 2 are stated")),
    Law("no-direct-map",
        "no page of the file is in the direct map, nor in a TLB by its entry there, shared ones included, but while someone "
        "has it locked",
        "Sean Christopherson, 21 Apr 2026, and Takahiro Itazuri, 8 May 2026 (v12 thread); Frank van der Linden, 21 Apr 2026",
        "in every state, of designs that promise it", state=pages.no_direct_map, promised=True,
        broken_by=Violator("direct-map-v12", "kvm", ("vmm2",), "a page of the file is in the direct map")),
)}, lacks)
"""All of them, in the order in which reports have them."""


def judging(design: type[Design], laws: Iterable[Law]) -> tuple[Law, ...]:
    """Those of *laws* that *design* is judged by: what holds for everybody, and what it promises.

    Raises BadInput where it promises what is no law: nobody would ever ask.
    """
    for name in design.promises:
        if name not in LAWS:
            raise BadInput(f"design {design.name!r} promises what is no law: {UnknownName('law', name, LAWS)}")
    return tuple(law for law in laws if not law.promised or law.name in design.promises)


__all__ = ["LAWS", "Law", "Violator", "judging"]
