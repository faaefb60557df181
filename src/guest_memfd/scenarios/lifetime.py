"""Hazard: the VM, the file and the module end in any order; and the end of the world, in which everything must return."""

from __future__ import annotations

from guest_memfd.core.hypervisor import Hypervisor
from guest_memfd.designs.design import Design
from guest_memfd.scenarios.party import Party
from guest_memfd.scenarios.vmm import close
from guest_memfd.words.primitives import Host, Steps
from guest_memfd.words.units import FIRST_PAGE

MM, USER = Host("mm"), Host("user")


def unloader(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """rmmod of the hypervisor's module, once; -EBUSY while it is held is an answer, too."""
    yield from MM.delete_module()


def stop(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """Stop the VM for good, take its memory back, destroy it."""
    if (yield from USER.vm_kill()) and not (yield from take_back(design)):
        yield from USER.vm_destroyed()


def take_back(design: Design) -> Steps[int]:
    """What a dying VM has comes back, at once or binding by binding; 0 or -EAGAIN."""
    if design.lender is None:
        return (yield from design.vm_teardown())
    return (yield from design.lender.abandon(design, [(slot.start, slot.nr) for slot in design.scene.slots]))


def teardown(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """After all parties are done: the VM goes, then the VMM, then the LRU batches drain, and nothing is left."""
    # The VM first, since its bindings hold the file; the batches last, since
    # a reference in one would look like a lost page.
    yield from USER.vm_kill()
    # What the hypervisor does not give back stays with the VM, and so the VM stays.
    if (yield from USER.vm_state()) != "gone" and not (yield from take_back(design)):
        yield from USER.vm_destroyed()
    if (yield from USER.fd_close()):
        yield from design.close()
    yield from MM.lru_add_drain_all()


def creator(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """Create a file, bind it slot by slot, perhaps close it; or ask for a file that cannot be."""
    scene = design.scene
    if (yield from USER.choose("create", "a file", "none")) == "none":
        size, shared = yield from USER.choose("as", (0, ()), (-1, ()), (scene.pages, (scene.pages,)), (scene.pages, (-1,)))
        ret = yield from design.create(size, shared)
        yield from USER.op_returned("create", FIRST_PAGE, size if shared == () else -1, ret)
        return
    ret = yield from design.create(scene.pages, scene.shared)
    yield from USER.op_returned("create", FIRST_PAGE, scene.pages, ret)
    if ret:
        return
    for slot in scene.slots:
        ret = yield from design.bind(slot.gfn, slot.start, slot.nr)
        yield from USER.op_returned("bind", slot.start, slot.nr, ret, gfn=slot.gfn)
    if (yield from USER.choose("then", "keep", "close")) == "close":
        yield from close(design)


CREATOR = Party("creator", "a VMM that creates a file and binds it", creator, role="vmm",
                exists=lambda design, hypervisor: not design.scene.made, fd=False)
OTHER_STOP = Party("other-stop", "stop and reclaim of the second VM", stop, file=1,
                   exists=lambda design, hypervisor: design.scene.vms > 1, fd=False)
UNLOADER = Party("unloader", "somebody who unloads the hypervisor's module", unloader, fd=False)
STOP = Party("stop", "VM stop and reclaim", stop, fd=False)
TEARDOWN = Party("teardown", "the end of the world", teardown, task=False, fd=False)
