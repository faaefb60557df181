"""Kernel text: the few routines through which this kernel touches memory, as AArch64 machine code. Here is which of them
has an exception table entry, and of which type.

Every routine follows the procedure call standard: arguments and result in x0..x2, x0..x9 are clobbered, `ret` ends it.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from typing import NamedTuple

from guest_memfd.machine.hw.ram import Ram
from guest_memfd.machine.linux.extable import ENTRY_SIZE, ExceptionEntry, ExceptionTable, ExType, registers
from guest_memfd.words.units import PAGE, Pa, Va

KIMAGE_VADDR = Va(0xFFFF_8000_8000_0000)
"""Where the kernel image is mapped without KASLR (asm/memory.h): not in the linear map."""

_RET = 0xD65F03C0


class Recovery(NamedTuple):
    """The instruction at `offset` may fault and continues with the next one; `data` as in ExceptionEntry."""

    offset: int
    type: ExType
    data: int


class Routine(NamedTuple):
    """Machine code of one symbol and its exception table entries."""

    name: str
    words: tuple[int, ...]
    recoveries: tuple[Recovery, ...] = ()


ROUTINES = (
    # u64 load_unaligned_zeropad(addr): asm/word-at-a-time.h
    Routine("load_unaligned_zeropad", (
        0xF9400000,     # ldr   x0, [x0]
        _RET,
    ), (Recovery(0, ExType.LOAD_UNALIGNED_ZEROPAD, registers(0, 0)),)),
    # The zero-padding handler's own read: no entry.
    Routine("ex_handler_load_unaligned_zeropad", (
        0xF9400000,     # ldr   x0, [x0]
        _RET,
    )),
    # u64 plain_read(addr): any load of the kernel that expects memory to be there
    Routine("plain_read", (
        0xF9400000,     # ldr   x0, [x0]
        _RET,
    )),
    # void plain_write(addr, value)
    Routine("plain_write", (
        0xF9000001,     # str   x1, [x0]
        _RET,
    )),
    # int copy_from_kernel_nofault(dst, src, bytes): mm/maccess.c, __get_kernel_nofault() of asm/uaccess.h
    Routine("copy_from_kernel_nofault", (
        0xB4000242,     #    cbz   x2, 3f
        0xF100205F,     # 0: cmp   x2, #8
        0x54000103,     #    b.lo  1f
        0x2A1F03E9,     #    mov   w9, wzr
        0xF9400023,     #    ldr   x3, [x1]
        0x350001E9,     #    cbnz  w9, 4f
        0xF8008403,     #    str   x3, [x0], #8
        0x91002021,     #    add   x1, x1, #8
        0xD1002042,     #    sub   x2, x2, #8
        0x17FFFFF8,     #    b     0b
        0xB4000102,     # 1: cbz   x2, 3f
        0x2A1F03E9,     #    mov   w9, wzr
        0x39400023,     #    ldrb  w3, [x1]
        0x350000E9,     #    cbnz  w9, 4f
        0x38001403,     #    strb  w3, [x0], #1
        0x91000421,     #    add   x1, x1, #1
        0xD1000442,     #    sub   x2, x2, #1
        0x17FFFFF9,     #    b     1b
        0xD2800000,     # 3: mov   x0, #0
        _RET,
        0x928001A0,     # 4: mov   x0, #-14
        _RET,
    ), (Recovery(0x10, ExType.KACCESS_ERR_ZERO, registers(9, 3)), Recovery(0x30, ExType.KACCESS_ERR_ZERO, registers(9, 3)))),
    # (int, u64 in x1) __get_user(addr): an unprivileged load
    Routine("__get_user", (
        0x2A1F03E2,     # mov   w2, wzr
        0xF8400801,     # ldtr  x1, [x0]
        0x93407C40,     # sxtw  x0, w2
        _RET,
    ), (Recovery(4, ExType.UACCESS_ERR_ZERO, registers(2, 1)),)),
    # int __put_user(addr, value): an unprivileged store
    Routine("__put_user", (
        0x2A1F03E2,     # mov   w2, wzr
        0xF8000801,     # sttr  x1, [x0]
        0x93407C40,     # sxtw  x0, w2
        _RET,
    ), (Recovery(4, ExType.UACCESS_ERR_ZERO, registers(2, 31)),)),
    # void clear_page(page): arch/arm64/lib/clear_page.S where DC ZVA is prohibited
    Routine("clear_page", (
        0x91400401,     #    add   x1, x0, #4096
        0xA9007C1F,     # 0: stp   xzr, xzr, [x0]
        0xA9017C1F,     #    stp   xzr, xzr, [x0, #16]
        0xA9027C1F,     #    stp   xzr, xzr, [x0, #32]
        0xA9037C1F,     #    stp   xzr, xzr, [x0, #48]
        0x91010000,     #    add   x0, x0, #64
        0xEB01001F,     #    cmp   x0, x1
        0x54FFFF41,     #    b.ne  0b
        _RET,
    )),
    # void copy_page(to, from)
    Routine("copy_page", (
        0x91400422,     #    add   x2, x1, #4096
        0xA8C11023,     # 0: ldp   x3, x4, [x1], #16
        0xA8811003,     #    stp   x3, x4, [x0], #16
        0xEB02003F,     #    cmp   x1, x2
        0x54FFFFA1,     #    b.ne  0b
        _RET,
    )),
    # bool do_copy_page(dst, src): true when all zeros (kernel/power/snapshot.c)
    Routine("do_copy_page", (
        0xD2804002,     #    mov   x2, #512
        0xD2800003,     #    mov   x3, #0
        0xF8408424,     # 0: ldr   x4, [x1], #8
        0xAA040063,     #    orr   x3, x3, x4
        0xF8008404,     #    str   x4, [x0], #8
        0xF1000442,     #    subs  x2, x2, #1
        0x54FFFF81,     #    b.ne  0b
        0xF100007F,     #    cmp   x3, #0
        0x1A9F17E0,     #    cset  w0, eq
        _RET,
    )),
    # void memset_page(page, doubleword): page poisoning's memset()
    Routine("memset_page", (
        0x91400402,     #    add   x2, x0, #4096
        0xF8008401,     # 0: str   x1, [x0], #8
        0xEB02001F,     #    cmp   x0, x2
        0x54FFFFC1,     #    b.ne  0b
        _RET,
    )),
    # addr memchr_inv_page(page, doubleword): the first doubleword that differs, or 0
    Routine("memchr_inv_page", (
        0x91400402,     #    add   x2, x0, #4096
        0xF9400003,     # 0: ldr   x3, [x0]
        0xEB01007F,     #    cmp   x3, x1
        0x540000A1,     #    b.ne  1f
        0x91002000,     #    add   x0, x0, #8
        0xEB02001F,     #    cmp   x0, x2
        0x54FFFF61,     #    b.ne  0b
        0xD2800000,     #    mov   x0, #0
        _RET,           # 1:
    )),
)


class KernelText:
    """The routines at physical address *pa* (a page), and their exception table after them; seen at *va*.

    The owner of the page table maps `size` bytes of *pa* at *va*, read-only and executable at EL1.
    """

    def __init__(self, ram: Ram, pa: Pa, va: Va = KIMAGE_VADDR) -> None:
        self._va: dict[str, Va] = {}
        entries = []
        code = b""
        for routine in ROUTINES:
            base = va + len(code)
            self._va[routine.name] = base
            entries += [ExceptionEntry(base + r.offset, base + r.offset + 4, r.type, r.data) for r in routine.recoveries]
            code += struct.pack(f"<{len(routine.words)}I", *routine.words)
        self.pa, self.start, self.end = pa, va, va + len(code)
        self.extable = ExceptionTable(entries)
        self.extable_va = va + len(code) + -len(code) % 8
        ram.write(pa, code)
        ram.write(pa + (self.extable_va - va), self.extable.encode(self.extable_va))
        used = self.extable_va - va + ENTRY_SIZE * len(self.extable)
        self.size = used + -used % PAGE

    def va(self, symbol: str) -> Va:
        """Address of a routine; raises KeyError."""
        return self._va[symbol]

    def symbol_at(self, pc: int) -> str:
        """As %pS prints it, ``name+0x4/0x10``; the bare address outside of the text."""
        if not self.start <= pc < self.end:
            return f"{pc:#x}"
        starts = [*self._va.values(), self.end]
        at = bisect_right(starts, pc) - 1
        return f"{ROUTINES[at].name}+{pc - starts[at]:#x}/{starts[at + 1] - starts[at]:#x}"
