"""A two-pass assembler for guests and stubs. Pools of literals are here; encode.py knows the instructions.

assembler.py has what every machine's syntax shares. Here: ``// comment``, ``#`` before immediates may be left out, .align
and .p2align take a power of two, .word is 4 bytes; ``ldr x0, =expression`` takes its constant from a pool, which lies at the
next ``.ltorg`` or at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

from guest_memfd.asm.arm64.encode import encode, known
from guest_memfd.asm.arm64.operand import Malformed, register
from guest_memfd.asm.assembler import Assembled as Assembled
from guest_memfd.asm.assembler import Assembler, Dialect, Statement
from guest_memfd.compat import override


@dataclass(eq=False)
class _Literal:
    expression: str
    size: int
    line: int
    address: int = 0


class _Assembler(Assembler):
    dialect = Dialect(comments=("//",), powers=True, numbers={
        ".byte": 1, ".hword": 2, ".short": 2, ".2byte": 2, ".word": 4, ".long": 4, ".4byte": 4, ".quad": 8, ".xword": 8,
        ".8byte": 8})

    def __init__(self, source: str, origin: int, name: str) -> None:
        super().__init__(source, origin, name)
        # What waits for a pool gets one at the end, if the source has not asked for one before.
        self.statements.append(Statement(len(source.splitlines()), "", ".ltorg", []))
        self.waiting: list[_Literal] = []
        self.pools: dict[Statement, list[_Literal]] = {}
        self.literals: dict[Statement, _Literal] = {}

    @override
    def value(self, text: str, constant: bool = False) -> int:
        text = text.strip().removeprefix("#").strip()
        if text.lower().startswith(":lo12:"):
            return self.value(text[6:], constant) & 0xfff
        return super().value(text, constant)

    @override
    def size_of(self, statement: Statement) -> int:
        return self._place_pool(statement) if statement.word == ".ltorg" else super().size_of(statement)

    @override
    def instruction_size(self, statement: Statement) -> int:
        word, operands = statement.word, statement.operands
        if not known(word):
            raise Malformed("no such instruction here")
        if self.here & 3:
            raise Malformed(f"an instruction at {self.here:#x}, which is not aligned; .align 2 is missing")
        if word == "ldr" and len(operands) == 2 and operands[1].startswith("="):
            self.literals[statement] = self._literal(statement)
        # A constant takes one to four words, so what it is has to be known here. All else is one.
        return 4 * len(encode(word, operands, self.here, self.value)) if word == "mov" else 4

    def _literal(self, statement: Statement) -> _Literal:
        expression, size = statement.operands[1][1:].strip(), 8 if register(statement.operands[0]).wide else 4
        for literal in self.waiting:
            if (literal.expression, literal.size) == (expression, size):
                return literal
        self.waiting.append(_Literal(expression, size, statement.line))
        return self.waiting[-1]

    # Doublewords first: the pool then needs no holes.
    def _place_pool(self, statement: Statement) -> int:
        if not self.waiting:
            return 0
        pool, self.waiting = sorted(self.waiting, key=lambda literal: -literal.size), []
        self.pools[statement] = pool
        at = start = self.here
        at += -at % pool[0].size
        for literal in pool:
            literal.address = at
            at += literal.size
        return at - start

    @override
    def bytes_of(self, statement: Statement) -> bytes:
        if statement not in self.pools:
            return super().bytes_of(statement)
        pool = self.pools[statement]
        out = bytes(pool[0].address - statement.address)
        for literal in pool:
            try:
                out += self.number(literal.expression, literal.size)
            except Malformed as error:
                raise self.error(literal.line, f"ldr: {error}") from error
        return out

    @override
    def instruction_bytes(self, statement: Statement) -> bytes:
        operands = statement.operands
        if statement in self.literals:
            operands = [operands[0], str(self.literals[statement].address)]
        words = encode(statement.word, operands, self.here, self.value)
        return b"".join(word.to_bytes(4, "little") for word in words)

    @override
    def shown(self, data: bytes) -> str:
        return f"{data[:4][::-1].hex():8}"


def assemble(source: str, origin: int = 0, name: str = "source") -> Assembled:
    """Assemble *source* for the address *origin*.

    Raises BadInput as ``name:line: what is wrong``.
    """
    assembler = _Assembler(source, origin, name)
    assembler.place()
    return assembler.emit()
