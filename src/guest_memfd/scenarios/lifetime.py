"""Hazard: the VM, the file and the module end in any order; and the end of the world, in which everything must return."""

from __future__ import annotations

from guest_memfd.designs.design import Design
from guest_memfd.hosts.host import Host, Steps
from guest_memfd.hypervisors.hypervisor import Hypervisor
from guest_memfd.scenarios.party import Party

MM, USER = Host("mm"), Host("user")


def unloader(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """rmmod, once."""
    yield from MM.delete_module()


def stop(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """Stop the VM for good, take its memory back, destroy it."""
    if (yield from USER.vm_kill()) and not (yield from design.vm_teardown()):
        yield from USER.vm_destroyed()


def teardown(design: Design, hypervisor: Hypervisor) -> Steps[None]:
    """After all parties are done: the VM goes, then the VMM, then the LRU batches drain, and nothing is left."""
    yield from USER.vm_kill()
    if (yield from USER.vm_state()) != "gone" and not (yield from design.vm_teardown()):
        yield from USER.vm_destroyed()
    if (yield from USER.fd_close()):
        yield from design.close()
    yield from MM.lru_add_drain_all()


UNLOADER = Party("unloader", "somebody who unloads the hypervisor's module", unloader)
STOP = Party("stop", "VM stop and reclaim", stop)
TEARDOWN = Party("teardown", "the end of the world", teardown, task=False)
