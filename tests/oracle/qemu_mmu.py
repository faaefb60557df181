"""QEMU's own MMU as the one that answers files of probes: a payload at EL2 does AT and reads PAR_EL1.

The machine is raspi4b: its RAM begins at 0, where the files want theirs, and a kernel without a header is entered at EL2.
The core is a Cortex-A72, with 44 bits of physical address and granules of 4 and 64 KiB. All files go in as one image, and
all answers come out in one, by semihosting.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path

from oracle.format import Answer, Ok, Probes, Refused

from guest_memfd.asm.arm64.asm import assemble
from guest_memfd.kernels import qemu

KERNEL, IMAGE, ANSWERS = 0x8_0000, 0x400_0000, 0x2000_0000
"""Where QEMU puts the payload; the files, beyond the RAM that they speak of; the answers."""
REGISTERS = ("TCR_EL1", "TTBR0_EL1", "TTBR1_EL1", "MAIR_EL1", "SCTLR_EL1", "VTCR_EL2", "VTTBR_EL2", "HCR_EL2")
_MODES = {("r", 1): 0, ("w", 1): 1, ("r", 0): 2, ("w", 0): 3}
_PAYLOAD = """
_start: mrs     x0, s3_0_c0_c0_5                // MPIDR_EL1: one core is enough
        and     x0, x0, #3
        cbnz    x0, .
        ldr     x20, ={image:#x}
        ldr     x28, ={answers:#x}
        ldr     x21, [x20], #8                  // files
file:   cbz     x21, done
        sub     x21, x21, #1
        ldr     x22, [x20], #8                  // words
        mov     x23, x20
        mov     x24, x22
word:   cbz     x22, regs
        ldp     x0, x1, [x20], #16
        str     x1, [x0]
        sub     x22, x22, #1
        b       word
regs:   ldp     x0, x1, [x20], #16
        msr     tcr_el1, x0
        msr     ttbr0_el1, x1
        ldp     x0, x1, [x20], #16
        msr     ttbr1_el1, x0
        msr     mair_el1, x1
        ldp     x0, x1, [x20], #16
        msr     sctlr_el1, x0
        msr     s3_4_c2_c1_2, x1                // VTCR_EL2
        ldp     x0, x1, [x20], #16
        msr     s3_4_c2_c1_0, x0                // VTTBR_EL2
        msr     s3_4_c1_c1_0, x1                // HCR_EL2
        ldr     x22, [x20], #8                  // probes
probe:  cbz     x22, clear
        sub     x22, x22, #1
        ldp     x3, x1, [x20], #16
        dsb     sy
        .word   0xd50c879f                      // tlbi alle1
        dsb     sy
        isb
        cbz     x1, read1
        cmp     x1, #2
        b.eq    read0
        b.hi    write0
        .word   0xd50c78a3                      // at s12e1w, x3
        b       told
read1:  .word   0xd50c7883                      // at s12e1r, x3
        b       told
read0:  .word   0xd50c78c3                      // at s12e0r, x3
        b       told
write0: .word   0xd50c78e3                      // at s12e0w, x3
told:   isb
        mrs     x2, par_el1
        str     x2, [x28], #8
        b       probe
clear:  cbz     x24, file
        ldr     x0, [x23], #16
        str     xzr, [x0]
        sub     x24, x24, #1
        b       clear
done:   mov     x0, #1                          // SYS_OPEN
        adr     x1, open
        hlt     #0xf000
        adr     x1, write
        str     x0, [x1]
        ldr     x2, ={answers:#x}
        sub     x2, x28, x2
        str     x2, [x1, #16]
        mov     x0, #5                          // SYS_WRITE
        hlt     #0xf000
        mov     x0, #0x18                       // SYS_EXIT
        adr     x1, exit
        hlt     #0xf000
        .align  3
open:   .quad   name, 5, {length}
write:  .quad   0, {answers:#x}, 0
exit:   .quad   0x20026, 0
name:   .asciz  "{name}"
"""


def image(files: Sequence[Probes]) -> bytes:
    """*files* as the payload reads them."""
    out = [struct.pack("<Q", len(files))]
    for file in files:
        words = [number for pair in file.words.items() for number in pair]
        probes = [number for probe in file.probes for number in (probe.va, _MODES[probe.access, probe.el])]
        registers = [file.registers.get(name, 0) for name in REGISTERS]
        numbers = [len(file.words), *words, *registers, len(file.probes), *probes]
        out.append(struct.pack(f"<{len(numbers)}Q", *numbers))
    return b"".join(out)


def answer(files: Sequence[Probes], timeout: float = 300) -> list[list[Answer]]:
    """QEMU's answers to all probes of *files*, page by page; raises HostUnavailable where there is no QEMU."""
    command, environment = qemu.program("arm64", lambda line: None)
    with tempfile.TemporaryDirectory() as folder:
        told, kernel, data = (Path(folder) / name for name in ("answers", "kernel", "files"))
        source = _PAYLOAD.format(image=IMAGE, answers=ANSWERS, name=told, length=len(str(told)))
        kernel.write_bytes(assemble(source, KERNEL, "payload").data)
        data.write_bytes(image(files))
        ended = qemu.watched([*command, "-M", "raspi4b", "-display", "none", "-serial", "null", "-kernel", str(kernel),
                              "-device", f"loader,file={data},addr={IMAGE:#x},force-raw=on",
                              "-semihosting-config", "enable=on,target=native"], environment, timeout, ())
        assert told.exists(), ended.problem or "QEMU has crashed"
        pars = struct.iter_unpack("<Q", told.read_bytes())
        return [[_answer(next(pars)[0]) for _ in file.probes] for file in files]


def _answer(par: int) -> Answer:
    if par & 1:
        return Refused(par >> 1 & 63, 1 + (par >> 9 & 1), bool(par >> 8 & 1))
    return Ok(par & (1 << 48) - 4096)
