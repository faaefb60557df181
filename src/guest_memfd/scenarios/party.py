"""What a party is: someone who does something to guest memory while others do something else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from guest_memfd.core.hypervisor import Hypervisor
from guest_memfd.designs.design import Design
from guest_memfd.errors import shown
from guest_memfd.plugins.fields import COUNT, FLAG, LINE, NAME, Kind, takes, wrong
from guest_memfd.plugins.forgotten import beside
from guest_memfd.words.primitives import Host, Steps

USER = Host("user")

Procedure = Callable[[Design, Hypervisor], Steps[None]]


def system_call(design: Design, steps: Steps[None]) -> Steps[None]:
    """*steps* between fdget() and fdput(): nothing if the descriptor is closed; the last reference may go with it."""
    if (yield from USER.fdget()):
        yield from steps
        yield from design.close()


def _always(_design: Design, _hypervisor: Hypervisor) -> bool:
    return True


@dataclass(frozen=True)
class Party:
    """A party: its procedure, and whether it can exist under a given design and hypervisor, in the design's scene.

    task: it is a task that freezing stops (a kernel thread or a device is not).
    file: number of the file it works on, and so of its VM.
    fd: what it does it does in system calls on the file's descriptor, and so holds the file meanwhile; once that is closed
        it does nothing. Not so: a guest, a device, the kernel itself, a task that closes the descriptor.
    role: a party with the same role is never in a scenario together with it: they are one task that does different things.
    """

    name: str
    title: str
    procedure: Procedure
    task: bool = True
    exists: Callable[[Design, Hypervisor], bool] = _always
    fd: bool = True
    file: int = 0
    role: str = ""


FIELDS = {
    "name": NAME, "title": LINE, "procedure": takes(2), "task": FLAG, "exists": takes(2), "fd": FLAG,
    "file": COUNT, "role": Kind("a name, or ''", lambda value: value == "" or NAME.fits(value)),
}


def lacks(thing: object) -> str | None:
    """What is wrong with *thing* as a party of someone else's; None if nothing is."""
    if not isinstance(thing, Party):
        return f"{shown(thing)} is no guest_memfd.scenarios.Party"
    return wrong(thing, FIELDS) or beside(thing.procedure)
