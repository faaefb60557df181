"""An assembler for x86 guests. Rule of this file: a jump is as short as can be, as GNU as makes it (tests/test_asm_x86.py
holds it); encode.py knows the instructions.

assembler.py has what every machine's syntax shares, operand.py what operands look like: GNU as's Intel syntax without
prefixes. Here: ``# comment`` and ``// comment``, .code64 (at the start) and .code16, .align counts bytes, .word is 2 bytes.
Alignments are filled with 0x90, one byte of NOP each. A number has its shortest encoding if no label decides about it.
"""

from __future__ import annotations

from guest_memfd.asm.assembler import Assembled as Assembled
from guest_memfd.asm.assembler import Assembler, Dialect, Malformed, Statement, UndefinedSymbol
from guest_memfd.asm.x86_64.encode import encode
from guest_memfd.asm.x86_64.encode_memory import Code, Field
from guest_memfd.asm.x86_64.operand import REGISTERS, Mode
from guest_memfd.compat import override

_MODES = {".code16": 16, ".code64": 64}


class _X86Assembler(Assembler):
    dialect = Dialect(comments=("#", "//"), powers=False, padding=0x90, ignored=(".intel_syntax", *_MODES), numbers={
        ".byte": 1, ".hword": 2, ".short": 2, ".word": 2, ".value": 2, ".2byte": 2, ".long": 4, ".int": 4, ".4byte": 4,
        ".quad": 8, ".8byte": 8})

    def __init__(self, source: str, origin: int, name: str) -> None:
        super().__init__(source, origin, name)
        self.mode = Mode(64, self._constant)
        self.bits: int | None = None
        self.codes: dict[Statement, list[Code]] = {}

    def _constant(self, text: str) -> int | None:
        try:
            return self.value(text, constant=True)
        except UndefinedSymbol:
            return None

    @override
    def define(self, name: str, value: int) -> None:
        if name.lower() in REGISTERS:
            raise Malformed(f"{name!r} is a register")
        super().define(name, value)

    @override
    def size_of(self, statement: Statement) -> int:
        if statement.word in _MODES:
            self.mode = self.mode._replace(bits=_MODES[statement.word])
        return super().size_of(statement)

    @override
    def instruction_size(self, statement: Statement) -> int:
        if statement not in self.codes:
            self.codes[statement] = encode(statement.word, statement.operands, self.mode)
            self.bits = self.bits or self.mode.bits
        return _length(self.codes[statement][0])

    def lengthen(self) -> bool:
        """Replace jumps that do not reach by longer ones; tells whether there were any."""
        found = False
        for statement, codes in self.codes.items():
            if len(codes) > 1:
                self.here = statement.address
                try:
                    self._filled(codes[0], statement)
                except UndefinedSymbol as error:
                    raise self.error(statement.line, f"{statement.word}: {error}") from error
                except Malformed:
                    del codes[0]
                    found = True
        return found

    @override
    def instruction_bytes(self, statement: Statement) -> bytes:
        return self._filled(self.codes[statement][0], statement)

    def _filled(self, code: Code, statement: Statement) -> bytes:
        end = statement.address + _length(code)
        return b"".join(piece if isinstance(piece, bytes) else self._field(piece, end) for piece in code)

    def _field(self, field: Field, end: int) -> bytes:
        number = self.value(field.text) - (end if field.relative else 0)
        if not field.low <= number <= field.high:
            what = f"distance {number:#x}" if field.relative else f"{number:#x}"
            raise Malformed(f"{what} does not fit {8 * field.size} bits")
        return (number & (1 << 8 * field.size) - 1).to_bytes(field.size, "little")


def _length(code: Code) -> int:
    return sum(len(piece) if isinstance(piece, bytes) else piece.size for piece in code)


def assemble(source: str, origin: int = 0, name: str = "source") -> Assembled:
    """Assemble *source* for the address *origin*; its `bits` are the mode of the first instruction.

    Raises BadInput as ``name:line: what is wrong``.
    """
    assembler = _X86Assembler(source, origin, name)
    assembler.place()
    # Jumps only ever get longer, so this ends. One that has grown pushes others apart: all are looked at again.
    while assembler.lengthen():
        assembler.place()
    return assembler.emit()._replace(bits=assembler.bits or assembler.mode.bits)
