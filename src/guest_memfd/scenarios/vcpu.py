"""Hazard: guest accesses race with everything that takes pages from the guest."""

from __future__ import annotations

from errno import EAGAIN, EFAULT

from guest_memfd.core.hypervisor import Hypervisor
from guest_memfd.designs.design import Design
from guest_memfd.scenarios.party import Party
from guest_memfd.words.primitives import Host, Steps
from guest_memfd.words.units import Gfn

GUEST = Host("guest")


def backed(design: Design) -> tuple[Gfn, ...]:
    """The gfns that have a page of the file, in order; where none has, one without."""
    return design.scene.gfns or (design.scene.beyond,)


def touch(design: Design, gfn: Gfn) -> Steps[str]:
    """Write *gfn*, faulting it in as KVM_RUN and VCPU_RUN do: 0 and -EAGAIN run the guest again, the rest exits."""
    # Two faults, so that a page may be taken away again between the first and the access. A guest that goes on for ever
    # is `until_served`; here each further fault would multiply the states.
    for _attempt in range(2):
        seen = yield from GUEST.guest_access(gfn, True)
        if seen != "fault":
            return seen
        ret = yield from handle_fault(design, gfn)
        if ret not in (0, -EAGAIN):
            return "exit"
    return (yield from GUEST.guest_access(gfn, True))


def handle_fault(design: Design, gfn: Gfn) -> Steps[int]:
    """The exit of a vCPU: find the memslot, ask the library for the page; 0 or -errno, -EFAULT without a memslot."""
    index = design.scene.index(gfn)
    if index is None:
        return -EFAULT
    if design.lender is not None:
        return (yield from design.lender.demand_page(design, gfn, index))
    ret = yield from design.guest_fault(gfn, index)
    yield from GUEST.op_returned("fault", index, 1, ret)
    return ret


def vcpu(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """Touch a page; perhaps give it up to the host and touch it again."""
    gfn = yield from GUEST.choose("gfn", *backed(design))
    seen = yield from touch(design, gfn)
    if seen != "ok" or hypervisor.consents is None:
        return
    if (yield from GUEST.choose("then", "stop", hypervisor.consents)) != "stop":
        yield from GUEST.guest_consents(gfn)
        yield from touch(design, gfn)


def second_vcpu(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """Touch the first page, as the other does."""
    yield from touch(design, backed(design)[0])


def until_served(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """Touch a page, or a gfn that has none, and do not give up before it is there, refused, or the VM stops."""
    gfn = yield from GUEST.choose("gfn", *design.scene.gfns, design.scene.beyond)
    while (yield from GUEST.guest_access(gfn, True)) == "fault":
        if (yield from handle_fault(design, gfn)) not in (0, -EAGAIN):
            return


VCPU = Party("vcpu", "a vCPU that faults pages in, gives them up, and writes them again", vcpu, fd=False)
VCPU2 = Party("vcpu2", "a second vCPU on the same page", second_vcpu, fd=False)
PATIENT_VCPU = Party("patient-vcpu", "a vCPU that goes on until it has its page", until_served, fd=False)
OTHER_VCPU = Party("other-vcpu", "a vCPU of the second VM", vcpu, file=1,
                   exists=lambda design, hypervisor: design.scene.vms > 1, fd=False)
