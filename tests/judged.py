"""The laws beside a device: a VMM's calls on a machine are judged as `gmem run` judges a guest's."""

from __future__ import annotations

from guest_memfd.machine.boot import Machine
from guest_memfd.vmm.ghosts import ProgramTracer
from guest_memfd.vmm.watch import Watch


def judged(machine: Machine) -> Watch:
    """Judge every primitive on *machine* from now on; `broken` of the result has the laws that broke."""
    machine.tracer = ProgramTracer(machine)
    machine.judge = watch = Watch(0, print)
    return watch
