"""A machine under pKVM's EL2, driven by its transitions and hypercalls."""

from __future__ import annotations

from typing import Any

from guest_memfd.machine.el2.pkvm import checks
from guest_memfd.machine.el2.pkvm import hypercalls as hc
from guest_memfd.machine.el2.pkvm.el2 import El2
from guest_memfd.machine.el2.pkvm.states import PkvmState
from guest_memfd.machine.hw.arm64.fault import Fault, Inject
from guest_memfd.machine.hw.arm64.mmu import Mmu
from guest_memfd.machine.hw.arm64.regime import Stage1
from guest_memfd.machine.hw.arm64.registers import Tcr
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.buddy import Buddy
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.words.units import PAGE

MIB, GIB = 1 << 20, 1 << 30
GFN = 0x4_0000
# Stage 1 off: the host's virtual addresses are the IPAs.
FLAT = Stage1(Tcr(), 0, 0, enabled=False)


class Machine:
    """RAM, two CPUs' TLBs, EL2 with a pool of its own, and a protected VM with pages for tables."""

    def __init__(self, size: int = 64 * MIB, *, protected: bool = True, offered: int = 64, **kwargs: Any) -> None:
        self.ram = Ram(size)
        base = self.ram.base
        half = min(32 * MIB, size // 2)
        self.pool = Buddy(self.ram, base, half)
        self.kernel = Buddy(self.ram, base + half, size - half)
        self.tlbs = [Tlb(), Tlb()]
        self.el2 = El2(self.ram, self.pool, self.tlbs, reserved=[(base, half)], **kwargs)
        self.cpus = [Mmu(self.ram, tlb) for tlb in self.tlbs]
        self.vm = self.el2.create_vm(self.kernel.alloc(1), lambda ipa: ipa >= 0x4000_0000, protected=protected)
        self.vm.topup([self.kernel.alloc() for _ in range(offered)])

    def page(self, order: int = 0) -> int:
        return self.kernel.alloc(order) // PAGE

    def touch(self, pa: int, access: Any = "r", cpu: int = 0) -> Inject | None:
        """An access of the host, as often as EL2 says that it shall be tried again; what it is answered with."""
        for _ in range(3):
            try:
                assert self.cpus[cpu].translate(pa, access, 1, FLAT, self.el2.stage2()).pa == pa
            except Fault as fault:
                inject = self.el2.host_abort(fault, 1)
                if inject is not None:
                    return inject
            else:
                return None
        raise AssertionError("an abort that EL2 handles again and again")

    def guest(self, ipa: int, access: Any = "r", cpu: int = 1) -> int:
        """An access of the guest; the physical address."""
        return self.cpus[cpu].translate(ipa, access, 1, FLAT, self.vm.registers()).pa

    def states(self, pfn: int, *gfns: int) -> tuple[PkvmState, ...]:
        page = self.el2.vmemmap.page(pfn)
        return page.host, page.hyp, *(checks.guest_page_state(self.vm.pgt.leaf(gfn * PAGE)) for gfn in gfns)

    def violations(self) -> list[Any]:
        return [*self.el2.host.page_table.violations, *self.vm.page_table.violations]

    def known(self) -> str:
        """Everything EL2 knows that a refusal must not change."""
        return repr((sorted((order, sorted(words.items())) for order, words in self.el2.vmemmap._words.items()),
                     self.tree(self.el2.host.pgt.root, 0, 1), self.tree(self.vm.pgt.root, 1, 2)))

    def tree(self, base: int, level: int, pages: int) -> list[Any]:
        found: list[Any] = []
        for at in range(base, base + pages * PAGE, 8):
            value = self.ram.read64(at)
            if value & 3 == 3 and level < 3:
                found.append((at - base, self.tree(value & ((1 << 48) - PAGE), level + 1, 1)))
            elif value:
                found.append((at - base, value))
        return found


LENT, BORROWED = PkvmState.SHARED_OWNED, PkvmState.SHARED_BORROWED


def hvc(machine: Machine, number: int, *args: int, cpu: int = 0) -> int:
    regs = [hc.BASE | number, *args] + [0] * (17 - len(args))
    machine.el2.hvc(regs, cpu)
    assert regs[0] in (0, (1 << 64) - 1)
    if regs[0]:
        raise LookupError(number)
    return regs[1] - (1 << 64) if regs[1] >> 63 else regs[1]
