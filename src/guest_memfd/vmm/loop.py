"""Running a guest to its end. It always ends, at the latest when its time is over.

A guest that never gives the CPU back is interrupted by the clock. One that only faults is told from one that works by two
signs: many aborts have been delivered to it, and it is still at the same instruction.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from guest_memfd.errors import GuestMemfdError

SLICE = 0.2
"""Seconds after which a guest is interrupted for a look at it."""
SAME_ABORT = 500
"""Aborts delivered to a guest at one and the same instruction before it is said to fault without end."""

End = Literal["off", "reset", "timeout", "crash", "faults for ever", "panic"]


@dataclass(frozen=True)
class LoopEnded:
    """How a guest ended, with the reason in words where there is one, and its registers where they say something."""

    how: End
    why: str = ""
    registers: Mapping[str, int] = field(default_factory=dict)


@dataclass
class LoopOutcome:
    """What came of a guest, wherever it ran. *failed*: why it did not come to an end; *window*: where it shares memory."""

    ended: LoopEnded | None = None
    failed: GuestMemfdError | None = None
    console: str = ""
    window: bytes | None = None
    exits: int = 0
    seconds: float = 0.0


class Debugger(Protocol):
    """What an emulator knows of its vCPU, whatever the hypervisor lets the host see."""

    def pc(self) -> int:
        """The guest's program counter, a guest virtual address."""

    def registers(self) -> Mapping[str, int]:
        """General registers and what the last exception left, by their names."""


class LoopGuest(Protocol):
    """A guest that is ready to run."""

    @property
    def debugger(self) -> Debugger:
        """Who can look at it."""

    @property
    def aborts(self) -> int:
        """How many external aborts have been delivered to it, by the VMM or by the hypervisor."""

    def step(self, seconds: float) -> LoopEnded | None:
        """Run it up to the next exit, or for *seconds*; None: it can go on."""


def drive(guest: LoopGuest, timeout: float) -> LoopEnded:
    """Run *guest* for *timeout* seconds at most; raises what its host raises."""
    end = time.monotonic() + timeout
    pc, aborts = -1, 0
    while (left := end - time.monotonic()) > 0:
        ended = guest.step(min(left, SLICE))
        if ended is not None:
            return ended
        # No abort since the last look: it works, however long that takes.
        if guest.aborts == aborts:
            continue
        now = guest.debugger.pc()
        # Many aborts at different instructions are a guest that probes what it has, which it may.
        if now != pc:
            pc, aborts = now, guest.aborts
        elif guest.aborts - aborts >= SAME_ABORT:
            seen = guest.debugger.registers()
            return LoopEnded("faults for ever", _forever(seen), seen)
    where = guest.debugger.pc()
    return LoopEnded("timeout", f"{timeout:g} s are over, and the guest is at PC {where:#x}", guest.debugger.registers())


# Only arm64 delivers aborts.
def _forever(seen: Mapping[str, int]) -> str:
    if seen["pc"] & ~0x7FF == seen["vbar_el1"]:
        return (f"its exception vectors at {seen['vbar_el1']:#x} fault themselves: ESR_EL1 {seen['esr_el1']:#x}, "
                f"FAR_EL1 {seen['far_el1']:#x}")
    return f"PC {seen['pc']:#x}, ESR_EL1 {seen['esr_el1']:#x}, FAR_EL1 {seen['far_el1']:#x}"
