"""x86 as guests are written for it: 64-bit mode, and 16-bit code of real mode.

    asm.py          an assembler for guests: modes, and jumps no longer than they must be
    operand.py      operands as they are written
    forms.py        which instructions there are, as a table
    encode.py       from operands to the form that GNU as would take, and to bytes
    encode_memory.py    what an operand in memory takes: ModRM, SIB, displacement

Left out: 32-bit code, x87, SSE and AVX, instructions that neither guests nor their tests need.
"""
