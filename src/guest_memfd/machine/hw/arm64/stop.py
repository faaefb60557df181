"""Why a CPU stopped. A stop says what EL2 would be told, and no more.

The PC is after a call and WFI, and at the instruction for everything else (Arm ARM D1.3,
"preferred exception return address").
"""

from __future__ import annotations

from typing import NamedTuple

from guest_memfd.distinct import distinct
from guest_memfd.machine.hw.arm64.fault import Fault
from guest_memfd.words.units import Pa, Va


@distinct
class CpuAbort(NamedTuple):
    """A translation fault of the instruction at *pc*, which has done nothing; its va and ipa are exact.

    Of a pair of registers stored across a page the first may be in memory already, as the architecture allows.
    """

    fault: Fault
    pc: int


@distinct
class Bus(NamedTuple):
    """The instruction at *pc* accesses *pa*, where there is no memory: a device, or an external abort."""

    pa: Pa
    pc: int
    va: Va
    access: str


@distinct
class Hvc(NamedTuple):
    """HVC #imm was executed; the PC is after it."""

    imm: int


@distinct
class Smc(NamedTuple):
    """SMC #imm was executed; the PC is after it."""

    imm: int


@distinct
class Svc(NamedTuple):
    """SVC #imm was executed; the PC is after it."""

    imm: int


@distinct
class Wfi(NamedTuple):
    """WFI was executed; the PC is after it."""


@distinct
class Breakpoint(NamedTuple):
    """The PC is at a BRK #imm."""

    imm: int


@distinct
class Undefined(NamedTuple):
    """The word at *pc* is no instruction that may be executed there, or *pc* is not aligned."""

    pc: int


@distinct
class Expired(NamedTuple):
    """The time is up."""


@distinct
class Counted(NamedTuple):
    """As many instructions as allowed were executed."""


Stop = CpuAbort | Bus | Hvc | Smc | Svc | Wfi | Breakpoint | Undefined | Expired | Counted
