"""The worst hardware there may be, and the worst luck: what lock step lets happen to a machine between two primitives.

Nothing here is impossible. A CPU may walk and remember any valid translation at any time; a guest may run on any CPU; an
allocation may fail where something is allocated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from guest_memfd.machine.hypcalls.vm import Vm
from guest_memfd.machine.linux import direct_map as dm
from guest_memfd.words.primitives import Folio, Primitive
from guest_memfd.words.units import FIRST_GFN, FIRST_PAGE, PAGE, Gfn, Index, Ipa, Pa, gfn_to_gpa, pfn_to_pa, span

if TYPE_CHECKING:
    from guest_memfd.machine.board.board import Board
    from guest_memfd.machine.primitives.host import EmulatedHost


class Adversary:
    """Acts on *machine*, for the frames that it watches."""

    def __init__(self, machine: Board) -> None:
        self.machine = machine
        # Of a file of blocks those pages, and of its VM those gfns, that are watched; none: all that there are.
        self.indexes: Sequence[Index] = ()
        self.gfns: Sequence[Gfn] = ()

    # -- TLBs --------------------------------------------------------------------------------------------------------

    def speculate(self, host: EmulatedHost) -> None:
        """CPUs fill their TLBs with every translation they may.

        Kernel and user addresses of the watched frames on the CPU that executes; guest addresses of *host*'s file each
        on the CPU that has the number of the frame it leads to.
        """
        machine = self.machine
        cpu, stage2 = machine.cpu, machine.el2.stage2()
        mmu = cpu.mmus[cpu.current]
        for pa in machine.watched:
            # On the CPU that will execute the next access: there a stale entry does most harm.
            mmu.prefetch(machine.linear_map.va(pa), cpu.stage1, stage2)
        # On another CPU: a flush of this CPU's TLB alone must not be enough.
        self.walk_late()
        mapping = host.inode.mapping
        if mapping is not None:
            for vma in mapping.vmas:
                for index in self.indexes or span(FIRST_PAGE, host.inode.size):
                    mmu.prefetch(vma.va(index), cpu.stage1, stage2)
        if host.vm in machine.vms:
            for gfn in self.gfns or span(FIRST_GFN, host.inode.size if host.scene is None else host.scene.beyond):
                pa_now = machine.driver.lookup(host.vm, gfn_to_gpa(gfn))
                if pa_now is not None and pa_now in machine.watched:
                    # Each page on a CPU of its own, so that the flush has to reach all of them.
                    machine.driver.prefetch(self._home(pa_now), host.vm, gfn_to_gpa(gfn))

    def _home(self, pa: Pa) -> int:
        return self.machine.watched.index(pa) % len(self.machine.tlbs)

    def walk_late(self) -> None:
        """Another CPU walks the linear map up to the moment before an entry changes.

        It comes across it only where it is made of single pages, so it has no block and no run left in its TLB with
        which a flush of one page would drop that of its neighbours.
        """
        machine = self.machine
        mmu, stage2 = machine.cpu.mmus[-1], machine.el2.stage2()
        for pa in machine.watched:
            leaf = machine.linear_map.leaf(pa)
            if leaf.level == 3 and not leaf.value & dm.CONT:
                mmu.prefetch(machine.linear_map.va(pa), machine.cpu.stage1, stage2)

    def cpu_of_guest(self, vm: Vm, ipa: Ipa) -> int:
        """The CPU on which a guest access to *ipa* goes most astray: one with a stale entry, if there is one."""
        machine = self.machine
        now = machine.driver.lookup(vm, ipa)
        stale = []
        for cpu, tlb in enumerate(machine.tlbs):
            entry = tlb.stage2(vm.vmid, ipa)
            if entry is not None and entry.oa + ipa % entry.size != now:
                stale.append((entry.oa, cpu))
        if stale:
            return min(stale)[1]
        return self._home(now) if now is not None and now in machine.watched else 0

    # -- memory ------------------------------------------------------------------------------------------------------

    def can_fail(self, host: EmulatedHost, primitive: Primitive) -> bool:
        """Whether *primitive* could fail for want of memory on this machine, as it is now."""
        lm = self.machine.linear_map
        if primitive.name == "set_direct_map_invalid_noflush":
            folio: Folio = primitive.args[0]
            # Splitting needs a table page; an entry of its own needs nothing.
            return lm.can_set_direct_map() and dm.level_size(lm.leaf(pfn_to_pa(folio.pfn)).level) > folio.nr * PAGE
        if primitive.name == "split_direct_map":
            return lm.leaf(pfn_to_pa(primitive.args[0].pfn)).level < 3
        if primitive.name == "set_direct_map_default_noflush":
            return False                                # an entry that was split is there
        return host.inode.fd if primitive.name == "mmap" else True

    def fail_next(self, primitive: Primitive, errno: int) -> None:
        """Let *primitive* fail when it is carried out next; *errno* is what a hypercall returns then, once or for good."""
        machine = self.machine
        if primitive.name == "hyp_call":
            name, args = primitive.args[0], primitive.args[1:]
            if machine.hypervisor.final.get(name) == errno:
                # From now on for this page, as EL2 would have decided; a failure that passes is for one call.
                machine.driver.stuck |= {pfn_to_pa(arg.pfn) for arg in args if isinstance(arg, Folio)}
            else:
                machine.driver.refuse_next = errno
        elif primitive.name in ("filemap_add_folio", "filemap_add_pages", "filemap_alloc_folio"):
            machine.folios.fail_at(0)
        elif primitive.name in ("set_direct_map_invalid_noflush", "split_direct_map"):
            machine.kernel_pages.fail_at(0)
        else:
            machine.fail_slab_at(0)
