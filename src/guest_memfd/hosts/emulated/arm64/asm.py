"""A two-pass assembler for guests and stubs. Rule of this file: lines, symbols and data; encode.py knows the instructions.

The syntax is GNU as: ``label:``, ``// comment``, ``#`` before immediates may be left out, ``ldr x0, =expression`` takes its
constant from a pool, which lies at the next ``.ltorg`` or at the end. Directives: .equ .set .byte .hword .word .quad .ascii
.asciz .align (a power of two) .balign .space .org .ltorg .global.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from guest_memfd.errors import BadInput
from guest_memfd.hosts.emulated.arm64.encode import encode, known
from guest_memfd.hosts.emulated.arm64.operand import Malformed, register

_LABEL = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)\s*:")
_NAME = re.compile(r"(?<![0-9A-Za-z_'])[A-Za-z_][A-Za-z0-9_]*")
_WORD = re.compile(r"\.?[A-Za-z0-9_]+(\.[A-Za-z]+)?")
_CHARACTER = re.compile(r"'(\\?.)'")
_NUMBER = re.compile(r"0x[0-9a-f_]+|0b[01_]+|[0-9_]+", re.IGNORECASE)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "\\": "\\", '"': '"', "'": "'"}
_DATA = {".byte": 1, ".hword": 2, ".short": 2, ".2byte": 2, ".word": 4, ".long": 4, ".4byte": 4, ".quad": 8, ".xword": 8,
         ".8byte": 8}
_IGNORED = (".global", ".globl", ".text", ".type", ".size")
_BINARY: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.BitXor: operator.xor}
_UNARY: dict[type[ast.unaryop], Callable[[int], int]] = {
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Invert: operator.invert}
_BIGGEST = 1 << 24


class Program(NamedTuple):
    """What `assemble` made: *data* belongs at *origin*; *symbols* are absolute; *listing* is for people."""

    data: bytes
    symbols: dict[str, int]
    listing: str
    origin: int = 0


@dataclass
class _Statement:
    line: int
    source: str
    word: str
    operands: list[str]
    address: int = 0
    size: int = 0
    pool: list[_Literal] = field(default_factory=list)
    literal: _Literal | None = None


@dataclass(eq=False)
class _Literal:
    expression: str
    size: int
    line: int
    address: int = 0


class _Undefined(Malformed):
    """A symbol that is not defined, or not yet."""


def _split(text: str) -> list[str]:
    parts, depth, quoted, part, escaped = [], 0, False, "", False
    for character in text:
        if quoted:
            quoted, escaped = escaped or character != '"', not escaped and character == "\\"
        elif character == '"':
            quoted = True
        elif character in "[]()":
            depth += 1 if character in "[(" else -1
        elif character == "," and not depth:
            parts.append(part.strip())
            part = ""
            continue
        part += character
    return [*parts, part.strip()] if parts or part.strip() else []


# Everything before "//", unless that is in a string.
def _uncomment(line: str) -> str:
    quoted = False
    for at, character in enumerate(line):
        if character == '"' and line[at - 1:at] != "\\":
            quoted = not quoted
        elif not quoted and line.startswith("//", at):
            return line[:at]
    return line


def _string(text: str) -> bytes:
    if len(text) < 2 or text[0] != '"' or text[-1] != '"':
        raise Malformed(f"{text} is no string in double quotes")

    def unescape(match: re.Match[str]) -> str:
        if match[1] not in _ESCAPES:
            raise Malformed(f"no escape \\{match[1]}")
        return _ESCAPES[match[1]]
    try:
        return re.sub(r"\\(.)", unescape, text[1:-1]).encode("ascii")
    except UnicodeEncodeError as error:
        raise Malformed("a string has to be ASCII") from error


class _Assembler:
    def __init__(self, source: str, origin: int, name: str) -> None:
        self.origin, self.name = origin, name
        self.here = origin
        self.symbols: dict[str, int] = {}
        self.pool: list[_Literal] = []
        self.statements = [statement for number, line in enumerate(source.splitlines(), 1)
                           for statement in self._parse(number, line)]
        self.statements.append(_Statement(len(source.splitlines()), "", ".ltorg", []))

    def error(self, line: int, message: str) -> BadInput:
        return BadInput(f"{self.name}:{line}: {message}")

    def _parse(self, number: int, line: str) -> list[_Statement]:
        text, found = _uncomment(line), []
        while match := _LABEL.match(text):
            found.append(_Statement(number, line, ":", [match[1]]))
            text = text[match.end():]
        word, _, rest = text.strip().replace("\t", " ").partition(" ")
        if word and not _WORD.fullmatch(word):
            raise self.error(number, f"{word!r} is neither an instruction nor a directive")
        if word:
            found.append(_Statement(number, line, word.lower(), _split(rest)))
        return found

    # -- expressions ---------------------------------------------------------------------------------------------

    def value(self, text: str, here: bool = True) -> int:
        text = text.strip().removeprefix("#").strip()
        if text.lower().startswith(":lo12:"):
            return self.value(text[6:], here) & 0xfff
        plain = _CHARACTER.sub(lambda match: str(ord(_string(f'"{match[1]}"'))), text)
        plain = _NAME.sub(lambda match: f"s_{match[0]}", re.sub(r"(?<![\w.])\.(?![\w.])", "_here", plain))
        if any(not _NUMBER.fullmatch(number) for number in re.findall(r"\b\d\w*", plain)):
            raise Malformed(f"cannot read {text!r} as a number")
        try:
            tree = ast.parse(plain.replace("s__here", "_here").replace("/", "//").strip(), mode="eval")
            return self._evaluate(tree.body, text, here)
        except (SyntaxError, ValueError) as error:
            if isinstance(error, Malformed):
                raise
            raise Malformed(f"cannot read {text!r} as a number") from error
        except (RecursionError, MemoryError) as error:
            raise Malformed("an expression this deep cannot be read") from error
        except ZeroDivisionError as error:
            raise Malformed(f"{text!r} divides by zero") from error

    def _evaluate(self, node: ast.expr, text: str, here: bool) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.Name):
            if node.id == "_here" and here:
                return self.here
            if node.id[2:] not in self.symbols:
                raise _Undefined(f"no symbol {node.id[2:]!r}")
            return self.symbols[node.id[2:]]
        if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
            return _UNARY[type(node.op)](self._evaluate(node.operand, text, here))
        if isinstance(node, ast.BinOp):
            left, right = self._evaluate(node.left, text, here), self._evaluate(node.right, text, here)
            if type(node.op) in _BINARY:
                return _BINARY[type(node.op)](left, right)
            if isinstance(node.op, ast.LShift | ast.RShift) and 0 <= right < 128:
                return left << right if isinstance(node.op, ast.LShift) else left >> right
        raise Malformed(f"cannot read {text!r} as a number")

    # -- first pass: addresses -----------------------------------------------------------------------------------

    def place(self) -> None:
        self._constants()
        for statement in self.statements:
            statement.address = self.here
            try:
                statement.size = self._size(statement)
            except _Undefined as error:
                raise self.error(statement.line, f"{error} (it must be defined before this line)") from error
            except Malformed as error:
                raise self.error(statement.line, f"{statement.word}: {error}") from error
            self.here += statement.size
            if self.here - self.origin > _BIGGEST:
                raise self.error(statement.line, f"the program grows over {_BIGGEST:#x} bytes")

    # Constants that need no label hold everywhere, wherever they are defined.
    def _constants(self) -> None:
        rest = []
        for statement in self.statements:
            if statement.word in (".equ", ".set") and len(statement.operands) == 2:
                try:
                    self._define(statement.operands[0], self.value(statement.operands[1], here=False))
                    continue
                except _Undefined:
                    pass
                except Malformed as error:
                    raise self.error(statement.line, f"{statement.word}: {error}") from error
            rest.append(statement)
        self.statements = rest

    def _size(self, statement: _Statement) -> int:
        word, operands = statement.word, statement.operands
        if word == ":":
            self._define(operands[0], self.here)
            return 0
        if word in (".equ", ".set"):
            if len(operands) != 2:
                raise Malformed("takes a name and a value")
            self._define(operands[0], self.value(operands[1]))
            return 0
        if word in _DATA:
            return _DATA[word] * len(operands)
        if word.startswith("."):
            return self._space(statement)
        if not known(word):
            raise Malformed("no such instruction here")
        if self.here & 3:
            raise Malformed(f"an instruction at {self.here:#x}, which is not aligned; .align 2 is missing")
        if word == "ldr" and len(operands) == 2 and operands[1].startswith("="):
            self._literal(statement)
        return 4 * len(encode(word, operands, self.here, self.value)) if word == "mov" else 4

    def _define(self, name: str, value: int) -> None:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise Malformed(f"{name!r} is no name")
        if name in self.symbols:
            raise Malformed(f"{name!r} is defined twice")
        self.symbols[name] = value

    def _space(self, statement: _Statement) -> int:
        word, operands = statement.word, statement.operands
        if word in (".ascii", ".asciz", ".string"):
            return sum(len(_string(text)) + (word != ".ascii") for text in operands)
        if word == ".ltorg":
            return self._place_pool(statement)
        if word in _IGNORED:
            return 0
        if word not in (".align", ".p2align", ".balign", ".space", ".skip", ".zero", ".org"):
            raise Malformed("no such directive here")
        if not operands:
            raise Malformed("takes a number")
        number = self.value(operands[0])
        if word == ".org":
            number -= self.here
        elif word in (".align", ".p2align") and 0 <= number < 32:
            number = -self.here % (1 << number)
        elif word == ".balign" and number > 0:
            number = -self.here % number
        elif word not in (".space", ".skip", ".zero"):
            raise Malformed(f"cannot align to {number}")
        if number < 0:
            raise Malformed(f"{operands[0]} goes backwards")
        return number

    def _literal(self, statement: _Statement) -> None:
        expression, size = statement.operands[1][1:].strip(), 8 if register(statement.operands[0]).wide else 4
        for literal in self.pool:
            if (literal.expression, literal.size) == (expression, size):
                statement.literal = literal
                return
        statement.literal = _Literal(expression, size, statement.line)
        self.pool.append(statement.literal)

    # Doublewords first: the pool then needs no holes.
    def _place_pool(self, statement: _Statement) -> int:
        if not self.pool:
            return 0
        statement.pool, self.pool = sorted(self.pool, key=lambda literal: -literal.size), []
        at = start = self.here
        at += -at % statement.pool[0].size
        for literal in statement.pool:
            literal.address = at
            at += literal.size
        return at - start

    # -- second pass: bytes --------------------------------------------------------------------------------------

    def emit(self) -> Program:
        out, listing = bytearray(), []
        for statement in self.statements:
            self.here = statement.address
            try:
                data = self._bytes(statement)
            except Malformed as error:
                raise self.error(statement.line, f"{statement.word}: {error}") from error
            out += data
            if data or statement.word == ":":
                listing.append(f"{statement.address:#012x}  {data[:4][::-1].hex():8}  {statement.source.rstrip()}")
        return Program(bytes(out), dict(self.symbols), "\n".join(listing) + "\n", self.origin)

    def _bytes(self, statement: _Statement) -> bytes:
        word, operands = statement.word, statement.operands
        if statement.pool:
            return self._pool_bytes(statement)
        if statement.literal is not None:
            operands = [operands[0], str(statement.literal.address)]
        if word in _DATA:
            return b"".join(self._number(text, _DATA[word]) for text in operands)
        if word in (".ascii", ".asciz", ".string"):
            return b"".join(_string(text) + b"\0" * (word != ".ascii") for text in operands)
        if word == ":" or word.startswith("."):
            fill = self.value(operands[1]) & 0xff if word in (".space", ".skip", ".zero") and len(operands) > 1 else 0
            return bytes((fill,)) * statement.size
        words = encode(word, operands, self.here, self.value)
        return b"".join(each.to_bytes(4, "little") for each in words)

    def _number(self, text: str, size: int) -> bytes:
        number = self.value(text)
        if not -(1 << 8 * size - 1) <= number < 1 << 8 * size:
            raise Malformed(f"{number:#x} does not fit {size} bytes")
        return (number & (1 << 8 * size) - 1).to_bytes(size, "little")

    def _pool_bytes(self, statement: _Statement) -> bytes:
        out = bytes(statement.pool[0].address - statement.address)
        for literal in statement.pool:
            try:
                out += self._number(literal.expression, literal.size)
            except Malformed as error:
                raise self.error(literal.line, f"ldr: {error}") from error
        return out


def assemble(source: str, origin: int = 0, name: str = "source") -> Program:
    """Assemble *source* for the address *origin*.

    Raises BadInput as ``name:line: what is wrong``.
    """
    assembler = _Assembler(source, origin, name)
    assembler.place()
    return assembler.emit()
