"""A vCPU's core: guest instructions on Unicorn, through the guest's own stage 1, the VM's stage 2 and a CPU's TLB.

What the guest's registers say is asked at every walk. What its TLBI instructions remove, they remove for its VMID on all
CPUs (HCR_EL2.FB). It is what el2/gunyah/vcpu.py and el2/kvm/vcpu.py call a GuestCpu.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from guest_memfd.compat import override
from guest_memfd.machine.hw.arm64.access import Transfer, access_of, writes_back
from guest_memfd.machine.hw.arm64.cpu import Cpu
from guest_memfd.machine.hw.arm64.fault import Fault
from guest_memfd.machine.hw.arm64.mmu import Mmu
from guest_memfd.machine.hw.arm64.permission import Access
from guest_memfd.machine.hw.arm64.registers import Tcr
from guest_memfd.machine.hw.arm64.stop import Counted, Stop
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.arm64.tlbi_instruction import execute
from guest_memfd.machine.hw.arm64.walk import Stage1, Stage2
from guest_memfd.machine.hw.ram import BusError, Ram
from guest_memfd.words.units import Pa, Va

_M, _WXN = 1 << 0, 1 << 19
_PAN = 1 << 22
_DS = 1 << 59
"""TCR_EL1.DS: RES0, and ignored, without FEAT_LPA2."""
_BY_BLOCK = 1 << 18
"""Instructions that are counted block by block, which makes them thirty times slower."""


class GuestCore(Cpu):
    """Executes one vCPU on the CPU whose TLB is *tlbs*[*cpu*]; *stage2* gives the VM's registers whenever it runs."""

    def __init__(self, ram: Ram, tlbs: list[Tlb], cpu: int, stage2: Callable[[], Stage2]) -> None:
        self._tlbs, self._stage2 = tlbs, stage2
        self._mmu = Mmu(ram, tlbs[cpu])
        self._key: tuple[int, ...] = ()
        self._regime = Stage1(Tcr(), 0, 0, enabled=False)
        self.fills = 0
        """Translations that were asked for: Unicorn's own TLB missed."""
        self.instructions = 0
        """About how many it has executed, once `count` has been called."""
        self._counting: int | None = None
        super().__init__(ram, self._through, self._maintain)

    def count(self) -> None:
        """Count instructions from now on: by basic blocks at first, by whole slices when there are many of them.

        Off by a block for every fault inside of one; and at the end by up to a slice.
        """
        self._counting = self._uc.hook_add(importlib.import_module("unicorn").UC_HOOK_BLOCK, self._block)

    def _block(self, uc: Any, va: Va, size: int, _: object) -> None:
        self.instructions += size // 4

    @override
    def _slice(self, count: int) -> Stop:
        stop = super()._slice(count)
        if self._counting is None:
            self.instructions += count if isinstance(stop, Counted) else 0
        elif self.instructions > _BY_BLOCK:
            self._uc.hook_del(self._counting)
            self._uc.ctl_flush_tb()
            self._counting = None
        return stop

    def _through(self, va: Va, access: Access, el: int) -> tuple[Pa, int, bool, bool, bool]:
        self.fills += 1
        # Registers are read at every fill, not when the run begins: the guest changes them while it runs.
        found = self._mmu.translate(va, access, el, self._stage1(), self._stage2())
        return found.pa, found.size, found.readable, found.writable, found.executable

    # The registers of stage 1, taken apart again only when one of them has changed.
    def _stage1(self) -> Stage1:
        sctlr = self.sysreg("SCTLR_EL1")
        key = (sctlr & (_M | _WXN), self.pstate & _PAN, *map(self.sysreg, ("TCR_EL1", "TTBR0_EL1", "TTBR1_EL1", "MAIR_EL1")))
        if key != self._key:
            self._key = key
            tcr, ttbr0, ttbr1, mair = key[2:]
            self._regime = Stage1(Tcr.decode(tcr & ~_DS), ttbr0, ttbr1, mair,
                                  bool(sctlr & _M), bool(key[1]), bool(sctlr & _WXN))
        return self._regime

    # What the guest executes for one CPU reaches all of them (HCR_EL2.FB).
    def _maintain(self, name: str, value: int) -> None:
        # The vCPU may have run on another CPU before, whose TLB it cannot name. KVM sets HCR_EL2.FB for the same
        # reason.
        whole = name if name.endswith("IS") else f"{name}IS"
        execute(whole, value, self._tlbs[0], self._tlbs, self._stage2().vmid)

    def transfer(self) -> Transfer | None:
        """What ISV would describe of the load or store at the PC; None for everything that has no such syndrome."""
        try:
            word = self.fetch(Va(self.pc))
        except (Fault, BusError):
            return None
        return None if writes_back(word) else access_of(word)
