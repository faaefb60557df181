"""Hypercalls, the host's and the guest's: any number, any registers; ownership is consistent after each.

Gunyah's are those of test_gunyah_ownership.py, which knows what is to hold there, with registers between them that mean
nothing. pKVM's go through the host's registers; after each a page is private to one VM at most, and then not the host's.
"""

from __future__ import annotations

import random

from pkvm_machine import GFN, GIB, PAGE
from pkvm_machine import Machine as PkvmMachine
from stopping_cpu import Script
from test_gunyah_ownership import Anything
from test_gunyah_ownership import Machine as GunyahMachine

from fuzz.kind import Kind
from guest_memfd.machine.el2.gunyah import hypercalls as gunyah
from guest_memfd.machine.el2.pkvm import hypercalls as pkvm
from guest_memfd.machine.el2.pkvm import transitions
from guest_memfd.machine.el2.pkvm.states import PkvmState

STEPS = 30
WORDS = 18
ODD = (0, 1, 2, 7, PAGE, PAGE + 1, GIB, 1 << 32, 1 << 52, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - PAGE)


RIGHT = {
    pkvm.SHARE_HYP: ("pfn",), pkvm.UNSHARE_HYP: ("pfn",), pkvm.DONATE_GUEST: ("pfn", "gfn", "nr"),
    pkvm.SHARE_GUEST: ("pfn", "gfn", "nr", "prot"), pkvm.UNSHARE_GUEST: ("vm", "gfn", "nr"), pkvm.IN_POISON_FAULT: ("gfn",),
    pkvm.FORCE_RECLAIM: ("pa",), pkvm.RECLAIM_DYING: ("vm", "gfn", "nr"), pkvm.START_TEARDOWN: ("vm",),
    pkvm.FINALIZE_TEARDOWN: ("vm",), pkvm.VCPU_LOAD: ("vm", "index"), pkvm.VCPU_PUT: (), pkvm.UNSHARE: ("vm", "gfn"),
    pkvm.CHECK_CONSENT: ("vm", "gfn", "nr", "flag"), pkvm.SPLIT_GUEST: ("vm", "gfn"),
}
"""pKVM's calls -> what their arguments should be."""


class GunyahCalls(Kind):
    """To Gunyah's EL2."""

    name = "gunyah-calls"

    def try_one(self, choose: random.Random, said: list[str]) -> str | None:
        """Nothing that is private to a VM is anybody else's, whatever is asked for."""
        anything = Anything(GunyahMachine(3), choose.randrange(1 << 32))
        for _ in range(STEPS):
            if choose.random() < 0.3:
                self._odd(anything, choose, said)
            else:
                anything.step()
                said.append(", ".join(sorted(anything.answers)))
                anything.answers.clear()
            if choose.random() < 0.3:
                anything.m.fill()
            anything.m.check(tables=False)
        anything.m.check()
        return None

    @staticmethod
    def _odd(anything: Anything, choose: random.Random, said: list[str]) -> None:
        calls = [value for name, value in vars(gunyah).items() if name.isupper() and isinstance(value, int)]
        usual = (*anything.vm().caps, *anything.m.pages, PAGE, 0)
        regs = [choose.choice(calls) if choose.random() < 0.9 else choose.randrange(1 << 64),
                *(choose.choice(usual) if choose.random() < 0.7 else choose.choice(ODD) for _ in range(WORDS - 1))]
        guest = choose.random() < 0.3
        said.append(f"{'guest' if guest else 'host'} {[hex(word) for word in regs[:9]]}")
        if guest:
            anything.vm().guest_call(regs)
        else:
            anything.m.el2.hvc(regs)


class PkvmCalls(Kind):
    """To pKVM's EL2."""

    name = "pkvm-calls"

    def try_one(self, choose: random.Random, said: list[str]) -> str | None:
        """A page of a guest's is not the host's, and EL2's records agree with what it has mapped."""
        m = PkvmMachine()
        pfns = [m.page() for _ in range(3)]
        m.vm.add_vcpu(Script())
        m.el2.hvc([pkvm.BASE | pkvm.VCPU_LOAD, m.vm.handle] + [0] * (WORDS - 2), 0)
        for _ in range(STEPS):
            if choose.random() < 0.2:
                gfn = GFN + choose.randrange(3)
                call = choose.choice((transitions.guest_share_host, transitions.guest_unshare_host))
                said.append(f"{call.__name__}({gfn:#x}) = {call(m.el2, m.vm, gfn)}")
            elif choose.random() < 0.1:
                said.append(f"host touches {m.touch(choose.choice(pfns) * PAGE)}")
            else:
                self._call(m, choose, pfns, said)
            wrong = self._wrong(m, pfns)
            if wrong:
                return wrong
        return None

    @staticmethod
    def _call(m: PkvmMachine, choose: random.Random, pfns: list[int], said: list[str]) -> None:
        values = {"pfn": pfns, "gfn": (GFN, GFN + 1, GFN + 2), "vm": (m.vm.handle,), "nr": (1,), "prot": (7,),
                  "flag": (0, 1), "pa": [pfn * PAGE for pfn in pfns], "index": (0,)}
        number = choose.choice(list(RIGHT)) if choose.random() < 0.95 else choose.randrange(1 << 32)
        regs = [(pkvm.BASE | number) & ((1 << 64) - 1), *(choose.choice(values[kind]) for kind in RIGHT.get(number, ()))]
        regs += [0] * (WORDS - len(regs))
        if choose.random() < 0.3:
            regs[choose.randrange(1, 6)] = choose.choice((*ODD, *pfns, GFN, m.vm.handle))
        said.append(f"{number} {[hex(word) for word in regs[1:5]]}")
        m.el2.hvc(regs, int(choose.random() < 0.1))
        said[-1] += f" = {regs[1] - (regs[1] >> 63 << 64)}"

    @staticmethod
    def _wrong(m: PkvmMachine, pfns: list[int]) -> str | None:
        if m.violations():
            return f"break-before-make: {m.violations()}"
        for pfn in pfns:
            mapped = [vm.handle for vm in m.el2.vms.values() if vm.ipa_of(pfn * PAGE) is not None]
            host = m.el2.vmemmap.page(pfn).host
            if len(mapped) > 1:
                return f"pfn {pfn:#x} is mapped in VMs {mapped}"
            if mapped and host == PkvmState.OWNED:
                return f"pfn {pfn:#x} is the host's alone, and VM {mapped[0]} maps it"
            if host == PkvmState.NOPAGE and m.el2.host_may(pfn * PAGE):
                return f"pfn {pfn:#x} is not the host's, and the host's stage 2 lets it in"
        return None
