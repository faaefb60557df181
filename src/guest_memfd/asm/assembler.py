"""What assemblers share: lines, symbols, expressions, data. No instruction and no register is known here.

The syntax is GNU as: ``label:``, then an instruction or a directive; ``;`` parts statements. A label may be a number, of
which there may be many: ``1b`` is the last one before, ``1f`` the next. Directives: .equ .set .ascii .asciz .string .align
.balign .p2align .space .skip .zero .org .global, and numbers by the names and sizes that a `Dialect` gives. Operators bind
as in C; GNU as has ``<<``, ``&``, ``|`` and ``^`` before ``+``, so where they meet, parentheses serve both.
"""

from __future__ import annotations

import ast
import operator
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from guest_memfd.errors import BadInput

ATOM = r'"(?:\\.|[^"\\])*"?|' + r"'\\?.'"
"""A string or a character, in which nothing else has a meaning."""

_LABEL = re.compile(r"\s*([A-Za-z_.][A-Za-z0-9_.]*|[0-9]+)\s*:")
_NAME = re.compile(r"(?<![\w.'])[A-Za-z_.][A-Za-z0-9_.]*")
_NUMBERED = re.compile(r"(?<![\w.])([0-9]+)([bf])(?!\w)")
_OF_NUMBER = re.compile(r"\.([0-9]+)\.[0-9]+")
_WORD = re.compile(r"\.?[A-Za-z0-9_]+(\.[A-Za-z]+)?")
_TOKEN = re.compile(f"{ATOM}|.", re.DOTALL)
_CHARACTER = re.compile(r"'(\\?.)'")
_NUMBER = re.compile(r"0x[0-9a-f_]+|0b[01_]+|[0-9_]+", re.IGNORECASE)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "\\": "\\", '"': '"', "'": "'"}
_STRINGS = (".ascii", ".asciz", ".string")
_ALIGNS = (".align", ".p2align", ".balign")
_SPACES = (".space", ".skip", ".zero")
_IGNORED = (".global", ".globl", ".text", ".type", ".size")


# As C does it: towards zero.
def _divided(left: int, right: int) -> int:
    quotient = abs(left) // abs(right)
    return quotient if (left < 0) == (right < 0) else -quotient


_BINARY: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.BitAnd: operator.and_, ast.BitOr: operator.or_,
    ast.BitXor: operator.xor, ast.FloorDiv: _divided, ast.Mod: lambda left, right: left - right * _divided(left, right)}
_UNARY: dict[type[ast.unaryop], Callable[[int], int]] = {
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Invert: operator.invert}
_BIGGEST = 1 << 24
_BIGGEST_NUMBER = 1 << 128


class Malformed(ValueError):  # noqa: N818 - it says it without the suffix
    """An operand that the instruction does not take; the message says why."""


class UndefinedSymbol(Malformed):
    """A symbol that is not defined, or not yet."""


class Assembled(NamedTuple):
    """What `assemble` made: *data* belongs at *origin*; *symbols* are absolute; *listing* is for people.

    *bits* is the mode in which its first instruction has to be executed.
    """

    data: bytes
    symbols: dict[str, int]
    listing: str
    origin: int = 0
    bits: int = 64


class Dialect(NamedTuple):
    """Where GNU as differs between machines: *powers* tells whether .align counts in powers of two or in bytes."""

    comments: tuple[str, ...]
    numbers: dict[str, int]
    powers: bool
    padding: int = 0
    ignored: tuple[str, ...] = ()


@dataclass(eq=False)
class Statement:
    """One label, directive or instruction, and where the first pass put it."""

    line: int
    source: str
    word: str
    operands: list[str]
    address: int = 0
    size: int = 0


def split(text: str, at: str = ",") -> list[str]:
    """*text* at its commas (or another character), which are none in strings and brackets."""
    parts, depth = [""], 0
    for token in _TOKEN.findall(text):
        if token == at and not depth:
            parts.append("")
            continue
        depth += (token in "[(") - (token in "])")
        parts[-1] += token
    return [part.strip() for part in parts] if text.strip() else []


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


class Assembler(ABC):
    """Two passes over statements; a subclass knows the instructions, and says as `Malformed` what is wrong with one."""

    dialect: ClassVar[Dialect]

    def __init__(self, source: str, origin: int, name: str) -> None:
        self.origin, self.name = origin, name
        self.here = origin
        self.symbols: dict[str, int] = {}
        self._numbered: Counter[str] = Counter()
        comments = "|".join(map(re.escape, self.dialect.comments))
        self._comment = re.compile(f"{ATOM}|(?P<comment>{comments}).*", re.DOTALL)
        self.statements = [statement for number, line in enumerate(source.splitlines(), 1)
                           for part in self._parts(line) for statement in self._parse(number, line, part)]
        self.constants = self.symbols
        self._find_constants()

    @abstractmethod
    def instruction_size(self, statement: Statement) -> int:
        """How many bytes an instruction takes, before symbols are known. Raises Malformed."""

    @abstractmethod
    def instruction_bytes(self, statement: Statement) -> bytes:
        """The bytes of an instruction, when symbols are known. Raises Malformed."""

    def error(self, line: int, message: str) -> BadInput:
        """What is to be raised for a mistake in *line*."""
        return BadInput(f"{self.name}:{line}: {message}")

    # The statements of a line, without its comment.
    def _parts(self, line: str) -> list[str]:
        text = self._comment.sub(lambda match: "" if match["comment"] else match[0], line)
        return split(text, ";") or [""]

    def _parse(self, number: int, line: str, text: str) -> list[Statement]:
        found = []
        while match := _LABEL.match(text):
            label = match[1]
            if label.isdigit():
                self._numbered[label] += 1
                label = f".{label}.{self._numbered[label]}"
            found.append(Statement(number, line, ":", [label]))
            text = text[match.end():]
        word, _, rest = text.strip().replace("\t", " ").partition(" ")
        if word and not _WORD.fullmatch(word):
            raise self.error(number, f"{word!r} is neither an instruction nor a directive")
        if word:
            # "1b" in a string is two letters.
            rest = rest if word.lower() in _STRINGS else _NUMBERED.sub(self._numbered_name, rest)
            found.append(Statement(number, line, word.lower(), split(rest)))
        return found

    def _numbered_name(self, match: re.Match[str]) -> str:
        return f".{match[1]}.{self._numbered[match[1]] + (match[2] == 'f')}"

    # -- expressions ---------------------------------------------------------------------------------------------

    def value(self, text: str, constant: bool = False) -> int:
        """What *text* comes to, from labels too unless it has to be *constant*. Raises Malformed, Undefined."""
        text = text.strip()
        names: list[str] = []
        plain = _CHARACTER.sub(lambda match: str(ord(_string(f'"{match[1]}"'))), text)

        def numbered(match: re.Match[str]) -> str:
            names.append(match[0])
            return f"n{len(names) - 1}"

        plain = _NAME.sub(numbered, plain)
        if any(not _NUMBER.fullmatch(number) for number in re.findall(r"\b\d\w*", plain)) or set(plain) & set("'\"\\."):
            raise Malformed(f"cannot read {text!r} as a number")
        try:
            tree = ast.parse(plain.replace("/", "//").strip(), mode="eval")
            number = self._evaluate(tree.body, names, text, constant)
        except (SyntaxError, ValueError) as error:
            if isinstance(error, Malformed):
                raise
            raise Malformed(f"cannot read {text!r} as a number") from error
        except (RecursionError, MemoryError) as error:
            raise Malformed("an expression this deep cannot be read") from error
        except ZeroDivisionError as error:
            raise Malformed(f"{text!r} divides by zero") from error
        if abs(number) >= _BIGGEST_NUMBER:
            raise Malformed(f"{text!r} takes more than {_BIGGEST_NUMBER.bit_length() - 1} bits")
        return number

    # *names*: what n0, n1, ... stand for; *text*: for messages.
    def _evaluate(self, node: ast.expr, names: list[str], text: str, constant: bool) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.Name):
            return self._symbol(names[int(node.id[1:])], constant)
        if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
            return _UNARY[type(node.op)](self._evaluate(node.operand, names, text, constant))
        if isinstance(node, ast.BinOp):
            left, right = (self._evaluate(side, names, text, constant) for side in (node.left, node.right))
            if type(node.op) in _BINARY:
                return _BINARY[type(node.op)](left, right)
            # Bounded: a shift by 2^40 would take the memory of this machine, and not be an error.
            if isinstance(node.op, ast.LShift | ast.RShift) and 0 <= right < 128:
                return left << right if isinstance(node.op, ast.LShift) else left >> right
        raise Malformed(f"cannot read {text!r} as a number")

    def _symbol(self, name: str, constant: bool) -> int:
        if name == "." and not constant:
            return self.here
        symbols = self.constants if constant else self.symbols
        if name not in symbols:
            numbered = _OF_NUMBER.fullmatch(name)
            raise UndefinedSymbol(f"no label {numbered[1]} in that direction" if numbered else f"no symbol {name!r}")
        return symbols[name]

    # -- first pass: addresses -----------------------------------------------------------------------------------

    # Constants that need no label hold everywhere, wherever they are defined.
    def _find_constants(self) -> None:
        rest = []
        for statement in self.statements:
            if statement.word in (".equ", ".set") and len(statement.operands) == 2:
                try:
                    self.define(statement.operands[0], self.value(statement.operands[1], constant=True))
                    continue
                except UndefinedSymbol:
                    pass
                except Malformed as error:
                    raise self.error(statement.line, f"{statement.word}: {error}") from error
            rest.append(statement)
        self.statements = rest

    def define(self, name: str, value: int) -> None:
        """Give a symbol its value. Raises Malformed."""
        if not re.fullmatch(r"[A-Za-z_.][A-Za-z0-9_.]*", name) or name == ".":
            raise Malformed(f"{name!r} is no name")
        if name in self.symbols:
            raise Malformed(f"{name!r} is defined twice")
        self.symbols[name] = value

    def place(self) -> None:
        """Give every statement its address, and every label. Raises BadInput."""
        self.symbols, self.here = dict(self.constants), self.origin
        for statement in self.statements:
            statement.address = self.here
            try:
                statement.size = self.size_of(statement)
            except UndefinedSymbol as error:
                raise self.error(statement.line, f"{error} (it must be defined before this line)") from error
            except Malformed as error:
                raise self.error(statement.line, f"{statement.word}: {error}") from error
            self.here += statement.size
            # A .space may be of any size: it is refused here, before the bytes are made.
            if self.here - self.origin > _BIGGEST:
                raise self.error(statement.line, f"the program grows over {_BIGGEST:#x} bytes")

    def size_of(self, statement: Statement) -> int:
        """How many bytes *statement* takes here. Raises Malformed."""
        word, operands = statement.word, statement.operands
        if word == ":":
            self.define(operands[0], self.here)
            return 0
        if word in (".equ", ".set"):
            if len(operands) != 2:
                raise Malformed("takes a name and a value")
            self.define(operands[0], self.value(operands[1]))
            return 0
        if word in self.dialect.numbers:
            return self.dialect.numbers[word] * len(operands)
        if word in _STRINGS:
            return sum(len(_string(text)) + (word != ".ascii") for text in operands)
        if word in (*_IGNORED, *self.dialect.ignored):
            return 0
        return self._space(word, operands) if word.startswith(".") else self.instruction_size(statement)

    def _space(self, word: str, operands: list[str]) -> int:
        if word not in (*_ALIGNS, *_SPACES, ".org"):
            raise Malformed("no such directive here")
        if len(operands) not in (1, 2):
            raise Malformed("takes a number, and with what to fill")
        number = self.value(operands[0])
        if word == ".org":
            number -= self.here
        elif word == ".p2align" or (word == ".align" and self.dialect.powers):
            number = self._padding(1 << number if 0 <= number < 32 else 0, number)
        elif word in _ALIGNS:
            number = self._padding(number, number)
        if number < 0:
            raise Malformed(f"{operands[0]} goes backwards")
        return number

    def _padding(self, boundary: int, written: int) -> int:
        if boundary <= 0:
            raise Malformed(f"cannot align to {written}")
        return -self.here % boundary

    # -- second pass: bytes --------------------------------------------------------------------------------------

    def emit(self) -> Assembled:
        """The program, when everything is placed. Raises BadInput."""
        out, listing = bytearray(), []
        for statement in self.statements:
            self.here = statement.address
            try:
                data = self.bytes_of(statement)
            except Malformed as error:
                raise self.error(statement.line, f"{statement.word}: {error}") from error
            out += data
            if data or statement.word == ":":
                listing.append(f"{statement.address:#012x}  {self.shown(data)}  {statement.source.rstrip()}")
        return Assembled(bytes(out), dict(self.symbols), "\n".join(listing) + "\n", self.origin)

    def shown(self, data: bytes) -> str:
        """The first bytes of a statement, for the listing."""
        return f"{data[:10].hex():20}"

    def bytes_of(self, statement: Statement) -> bytes:
        """The bytes of *statement*. Raises Malformed."""
        word, operands = statement.word, statement.operands
        if word in self.dialect.numbers:
            return b"".join(self.number(text, self.dialect.numbers[word]) for text in operands)
        if word in _STRINGS:
            return b"".join(_string(text) + b"\0" * (word != ".ascii") for text in operands)
        if word in (*_ALIGNS, *_SPACES, ".org"):
            idle = self.dialect.padding if word in _ALIGNS else 0
            return bytes((self.value(operands[1]) & 0xff if operands[1:] else idle,)) * statement.size
        return b"" if word == ":" or word.startswith(".") else self.instruction_bytes(statement)

    def number(self, text: str, size: int) -> bytes:
        """The value of *text* in *size* bytes. Raises Malformed."""
        number = self.value(text)
        if not -(1 << 8 * size - 1) <= number < 1 << 8 * size:
            raise Malformed(f"{number:#x} does not fit {size} bytes")
        return (number & (1 << 8 * size) - 1).to_bytes(size, "little")
