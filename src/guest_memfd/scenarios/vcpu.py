"""Hazard: guest accesses race with everything that takes pages from the guest."""

from __future__ import annotations

from guest_memfd.designs.design import Design
from guest_memfd.hosts.host import EAGAIN, Host, Steps
from guest_memfd.hypervisors.hypervisor import Hypervisor
from guest_memfd.scenarios.party import Party

GUEST = Host("guest")


def touch(design: Design, gfn: int) -> Steps[str]:
    """Write *gfn*, faulting it in as KVM_RUN and VCPU_RUN do: 0 and -EAGAIN run the guest again, the rest exits."""
    for _attempt in range(2):
        seen = yield from GUEST.guest_access(gfn, True)
        if seen != "fault":
            return seen
        ret = yield from design.guest_fault(gfn, gfn)
        if ret not in (0, -EAGAIN):
            return "exit"
    return (yield from GUEST.guest_access(gfn, True))


def vcpu(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """Touch a page; perhaps give it up to the host and touch it again."""
    gfn = yield from GUEST.choose("gfn", 0, 1)
    seen = yield from touch(design, gfn)
    if seen != "ok" or hypervisor.consents is None:
        return
    if (yield from GUEST.choose("then", "stop", hypervisor.consents)) != "stop":
        yield from GUEST.guest_consents(gfn)
        yield from touch(design, gfn)


def second_vcpu(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """Touch the private page, as the other does."""
    yield from touch(design, 0)


VCPU = Party("vcpu", "a vCPU that faults pages in, gives them up, and writes them again", vcpu)
VCPU2 = Party("vcpu2", "a second vCPU on the same page", second_vcpu)
