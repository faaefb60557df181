"""A kernel that is asked about aborts, for tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from guest_memfd.machine.linux.extable import ExceptionEntry, ExceptionTable
from guest_memfd.machine.linux.mem_abort import (
    KernelDied,
    MmFault,
    Oops,
)

U64 = (1 << 64) - 1
BASE = 0x8000_0000
VA = 0xFFFF_0000_0123_4560
PC = 0xFFFF_8000_8000_0040
DABT, IABT, DABT_USER, IABT_USER = 0x96000000, 0x86000000, 0x92000000, 0x82000000
S1PTW, WNR, FNV = 1 << 7, 1 << 6, 1 << 10
EL1, EL0 = 0x60400005, 0x60000000


@dataclass
class Regs:
    pc: int = PC
    sp: int = 0xFFFF_8000_8000_3F00
    pstate: int = EL1
    file: list[int] = field(default_factory=lambda: [0] * 31)

    def x(self, n: int) -> int:
        return self.file[n]

    def set_x(self, n: int, value: int) -> None:
        self.file[n] = value


class FakeKernel:
    """Answers as told and remembers what it was asked."""

    pkvm = sea_fixup = pagefault_disabled = panic_on_oops = in_interrupt = False
    die_counter = cpu = 0
    pid, comm, uname = 123, "cat", "7.3.4 #1"

    def __init__(self, *entries: ExceptionEntry, **options: Any) -> None:
        self.extable = ExceptionTable(entries)
        self.words: dict[int, int] = {}
        self.stage1: dict[int, int] = {}
        self.reclaims: list[int] = []
        self.reclaim_result = 0
        self.mm_fault = MmFault.BADMAP
        self.asked: list[tuple[int, str, bool]] = []
        for name, value in options.items():
            setattr(self, name, value)

    def read_aligned(self, va: int) -> int:
        if va not in self.words:
            raise KernelDied(Oops(f"nested abort at {va:#x}"))
        return self.words[va]

    def at_s1e1r(self, va: int) -> int | None:
        return self.stage1.get(va)

    def force_reclaim(self, pa: int) -> int:
        self.reclaims.append(pa)
        return self.reclaim_result

    def handle_mm_fault(self, va: int, access: str, user: bool) -> MmFault:
        self.asked.append((va, access, user))
        return self.mm_fault

    def symbol_at(self, pc: int) -> str:
        return f"{pc:#x}"

    def page_table(self, va: int) -> None:
        return None

    def modules(self) -> str:
        return " gunyah"
