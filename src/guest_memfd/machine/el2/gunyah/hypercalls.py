"""SMCCC: numbers, registers, reserved arguments. A call is looked up, then its capabilities, then it runs.

Numbers and argument order: docs/api/gunyah_api.md of the hypervisor and arch/arm64/gunyah/gunyah_hypercall.c (Linux series
v17, patches 14 and 16); vendor hypervisor service, fast calls, 64 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from guest_memfd.machine.el2.gunyah.addrspace import AddressSpace, AddrMapFlag
from guest_memfd.machine.el2.gunyah.capabilities import CapabilitySpace, ExtentRight, SpaceRight, VcpuRight
from guest_memfd.machine.el2.gunyah.donate import Donation, Options
from guest_memfd.machine.el2.gunyah.errors import GunyahError, HypRefused
from guest_memfd.machine.el2.gunyah.memextent import Attributes, Extent
from guest_memfd.machine.el2.gunyah.vcpu import GunyahHypVcpu
from guest_memfd.words.units import Ipa

if TYPE_CHECKING:
    from guest_memfd.machine.el2.gunyah.el2 import Gunyah

_CALL = 0xC600_0000
ADDRSPACE_MAP = _CALL | 0x802B
ADDRSPACE_UNMAP = _CALL | 0x802C
ADDRSPACE_LOOKUP = _CALL | 0x805A
ADDRSPACE_CONFIGURE_RANGE = _CALL | 0x8060
MEMEXTENT_DONATE = _CALL | 0x8061
VCPU_RUN = _CALL | 0x8065
ADDRSPACE_MODIFY_PAGES = _CALL | 0x8069
_MASK = (1 << 64) - 1


class Caller(NamedTuple):
    """Who calls: what its capabilities mean, and where it lives."""

    cspace: CapabilitySpace
    space: AddressSpace


class _Call(NamedTuple):
    # arguments: registers from x1 on; reserved: whether the one after them has to be 0.
    run: Callable[[Hypercalls, Caller, list[int]], tuple[int, ...]]
    arguments: int
    reserved: bool


class Hypercalls:
    """The calls of one hypervisor."""

    def __init__(self, el2: Gunyah) -> None:
        self._el2 = el2

    def call(self, regs: list[int], cspace: CapabilitySpace, space: AddressSpace) -> None:
        """Do what *regs* ask for: function in x0, arguments from x1; the error goes to x0, results to x1 on."""
        known = _CALLS.get(regs[0])
        try:
            if known is None:
                raise HypRefused(GunyahError.UNIMPLEMENTED, f"function {regs[0]:#x}")
            # Refused now, so that the register can get a meaning later.
            if known.reserved and regs[1 + known.arguments]:
                raise HypRefused(GunyahError.ARG_INVAL, f"x{1 + known.arguments} is reserved")
            # Capabilities are looked up in the order of the arguments: with two wrong ones, the first decides the
            # error.
            results = known.run(self, Caller(cspace, space), regs[1:1 + known.arguments])
        except HypRefused as refused:
            regs[0] = refused.error & _MASK
            if regs[0] and known is not None and known.run is Hypercalls.modify_pages:
                regs[1] = regs[3]       # nothing was done: all of the size remains
            return
        regs[0] = GunyahError.OK
        regs[1:1 + len(results)] = results

    def map(self, caller: Caller, args: list[int]) -> tuple[int, ...]:
        """Address space, extent, vbase, attributes, flags, offset, size."""
        space, extent = self._pair(caller, args[0], args[1], args[4])
        attributes = Attributes.decode(args[3])
        space.map(extent, Ipa(args[2]), attributes, args[4], args[5], args[6])
        return ()

    def unmap(self, caller: Caller, args: list[int]) -> tuple[int, ...]:
        """Address space, extent, vbase, flags, offset, size."""
        space, extent = self._pair(caller, args[0], args[1], args[3])
        space.unmap(extent, Ipa(args[2]), args[3], args[4], args[5])
        return ()

    @staticmethod
    def _pair(caller: Caller, space: int, extent: int, flags: int) -> tuple[AddressSpace, Extent]:
        secret = bool(flags & AddrMapFlag.PRIVATE)
        return (caller.cspace.lookup(space, AddressSpace, SpaceRight.MAP_PROTECTED if secret else SpaceRight.MAP),
                caller.cspace.lookup(extent, Extent, ExtentRight.MAP_PRIVATE if secret else ExtentRight.MAP))

    def donate(self, caller: Caller, args: list[int]) -> tuple[int, ...]:
        """Options, from, to, offset, size."""
        options = Options.decode(args[0])
        # A donation to or from a protected guest needs rights on top of DONATE, other ones on each side: a holder of
        # the host's extent cannot take from a guest by it.
        source_right, to_right = _DONATE_RIGHTS.get(options.type, (0, 0))
        source = caller.cspace.lookup(args[1], Extent, ExtentRight.DONATE | source_right)
        to = caller.cspace.lookup(args[2], Extent, ExtentRight.DONATE | to_right)
        self._el2.donate(options, source, to, args[3], args[4])
        return ()

    def lookup(self, caller: Caller, args: list[int]) -> tuple[int, ...]:
        """Address space, extent, vbase, size; results: offset, size, attributes."""
        space = caller.cspace.lookup(args[0], AddressSpace, SpaceRight.LOOKUP)
        extent = caller.cspace.lookup(args[1], Extent, ExtentRight.LOOKUP)
        offset, size, attributes = space.lookup(extent, Ipa(args[2]), args[3])
        return offset, size, attributes.value

    def configure_range(self, caller: Caller, args: list[int]) -> tuple[int, ...]:
        """Address space, vbase, size, operation."""
        space = caller.cspace.lookup(args[0], AddressSpace, SpaceRight.CONFIGURE_RANGE)
        space.configure(args[3], Ipa(args[1]), args[2])
        return ()

    def vcpu_run(self, caller: Caller, args: list[int]) -> tuple[int, ...]:
        """vCPU, three words that answer the last exit; results: state and three words."""
        run = caller.cspace.lookup(args[0], GunyahHypVcpu, VcpuRight.RUN).run((args[1], args[2], args[3]))
        return run.state, *run.data

    def modify_pages(self, caller: Caller, args: list[int]) -> tuple[int, ...]:
        """Address space (0: the caller's own), vbase, size, flags; result: the size that remains."""
        space = caller.space
        # A guest may unlock its own pages without a capability on itself.
        if args[0]:
            space = caller.cspace.lookup(args[0], AddressSpace, SpaceRight.MODIFY_PROTECTED)
        space.modify(Ipa(args[1]), args[2], args[3])
        return (0,)


_DONATE_RIGHTS = {
    Donation.TO_PROTECTED: (ExtentRight.PROTECTED_HOST, ExtentRight.PROTECTED_GUEST),
    Donation.FROM_PROTECTED: (ExtentRight.PROTECTED_GUEST, ExtentRight.PROTECTED_HOST),
}
_CALLS = {
    ADDRSPACE_MAP: _Call(Hypercalls.map, 7, True),
    ADDRSPACE_UNMAP: _Call(Hypercalls.unmap, 6, True),
    ADDRSPACE_LOOKUP: _Call(Hypercalls.lookup, 4, True),
    ADDRSPACE_CONFIGURE_RANGE: _Call(Hypercalls.configure_range, 4, True),
    MEMEXTENT_DONATE: _Call(Hypercalls.donate, 5, True),
    VCPU_RUN: _Call(Hypercalls.vcpu_run, 4, False),
    ADDRSPACE_MODIFY_PAGES: _Call(Hypercalls.modify_pages, 4, False),
}
