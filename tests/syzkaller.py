"""Programs of syzkaller, read by the grammar that its documentation gives (docs/program_syntax.md), and by what its
descriptions of the calls say (sys/linux/dev_kvm.txt, sys.txt): written from both, in words of our own.

    line      an assignment ``rN = CALL``, a call, a comment, or nothing
    call      name, arguments in parentheses, perhaps properties in further parentheses
    argument  nil, AUTO, a number in hexadecimal, a variable (``rN``, ``rN/0xD``, ``rN+0xA``), ``<rN=>`` before an argument,
              a pointer ``&ADDRESS=ARGUMENT``, a string, a struct in braces, an array in brackets, a member of a union
    address   AUTO, or a number and perhaps the size of a region, in parentheses; in syzkaller's own area

Then each call is held against its description: how many arguments it has, what each is, and whether a variable holds a
resource of the kind that is wanted.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any, NamedTuple

AREA = range(0x7F0000000000, 0x7F0001000000)
"""Where pointers may lie: 16 MiB of data."""


class Variable(NamedTuple):
    """The result of an earlier call."""

    name: str


class Pointer(NamedTuple):
    """An address (None: AUTO), how many bytes it is said to have, and what is there (None: nil, as of a region)."""

    address: int | None
    size: int | None
    at: Any


class Struct(NamedTuple):
    """Members in order."""

    members: tuple[Any, ...]


class Text(NamedTuple):
    """A string, without what stands around it."""

    data: bytes


class SyzCall(NamedTuple):
    """A call, its arguments, and the variable that its result gets."""

    name: str
    args: tuple[Any, ...]
    result: str | None


class SyzError(Exception):
    """The text is none."""


class Parser:
    """Reads one line."""

    def __init__(self, line: str) -> None:
        self.rest, self.defined = line, list[str]()

    def line(self) -> SyzCall:
        result = self._try(r"(r\d+) = ")
        name = self._need(r"([a-z_]\w*(?:\$\w+)?)\(", "call")
        args = self._list(r"\)")
        while self._try(r" \("):
            self._need(r"(?:fail_nth: \d+|async|rerun: \d+)(?:, (?:fail_nth: \d+|async|rerun: \d+))*\)", "properties")
        if self.rest:
            raise SyzError(f"after the call comes {self.rest!r}")
        return SyzCall(name, args, result)

    def _try(self, pattern: str) -> str | None:
        found = re.match(pattern, self.rest)
        if found is None:
            return None
        self.rest = self.rest[found.end():]
        return found[1] if found.re.groups else found[0]

    def _need(self, pattern: str, what: str) -> str:
        found = self._try(pattern)
        if found is None:
            raise SyzError(f"no {what}: {self.rest!r}")
        return found

    def _list(self, end: str) -> tuple[Any, ...]:
        found: list[Any] = []
        while self._try(end) is None:
            if found:
                self._need(", ", "comma")
            found.append(self.argument())
        return tuple(found)

    def argument(self) -> Any:
        if (number := self._try(r"0x([0-9a-f]+)")) is not None:
            return int(number, 16)
        if self._try(r"nil") is not None:
            return None
        if self._try(r"AUTO") is not None:
            return Variable("AUTO")
        if (name := self._try(r"(r\d+)(?:/0x[0-9a-f]+)?(?:\+0x[0-9a-f]+)?")) is not None:
            return Variable(name)
        if (name := self._try(r"<(r\d+)=>")) is not None:
            self.defined.append(name)
            return self.argument()
        if self._try(r"&") is not None:
            return self._pointer()
        if self._try(r"\{") is not None:
            return Struct(self._list(r"\}"))
        if self._try(r"\[") is not None:
            return self._list(r"\]")
        if (name := self._try(r"@(\w+)")) is not None:
            return (name, self.argument() if self._try(r"=") is not None else None)
        return self._string()

    def _pointer(self) -> Pointer:
        if self._try(r"AUTO") is not None:
            address = size = None
        else:
            address = int(self._need(r"\(0x([0-9a-f]+)", "address"), 16)
            region = self._try(r"/0x([0-9a-f]+)")
            size = None if region is None else int(region, 16)
            self._need(r"\)", "end of an address")
        at = self.argument() if self._try(r"(?:=ANY)?=") is not None else None
        return Pointer(address, size, at)

    def _string(self) -> Text:
        if (text := self._try(r"'((?:[^'\\]|\\.)*)'")) is not None:
            return Text(text.encode().decode("unicode_escape").encode("latin-1"))
        return Text(bytes.fromhex(self._need(r"\"\$?((?:[0-9a-f]{2})*)\"", "argument")))


def read(text: str) -> list[SyzCall]:
    """The calls of a program; raises SyzError with the number of the line where it is none."""
    calls = []
    known: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        try:
            parser = Parser(line)
            call = parser.line()
            for name in used(call.args):
                if name not in known:
                    raise SyzError(f"{name} is used before it is assigned")
        except SyzError as error:
            raise SyzError(f"line {number}: {error}") from error
        known |= {*parser.defined, *({call.result} if call.result else ())}
        calls.append(call)
    return calls


def used(value: Any) -> list[str]:
    """The variables in *value*."""
    if isinstance(value, Variable):
        return [] if value.name == "AUTO" else [value.name]
    if isinstance(value, Text) or not isinstance(value, tuple):
        return []
    return [name for member in value for name in used(member)]


# -- what the descriptions say -----------------------------------------------------------------------------------------

INT, NOTHING = "int", "0"
KVM, VM, VCPU, FILE = "fd_kvm", "fd_kvmvm", "fd_kvmcpu", "fd_guest_memfd"
KINDS = {FILE: {FILE, "fd"}, VM: {VM, "fd"}, VCPU: {VCPU, "fd"}, KVM: {KVM, "fd"}}
"""Resource -> what it can be used as."""


def ioctl(number: int) -> str:
    return f"={number:#x}"


GUEST_MEMFD = ("in", (INT, INT))
REGION2 = ("in", (INT, INT, INT, INT, "vma", INT, FILE))
ATTRIBUTES = ("in", (INT, INT, INT, INT))
DESCRIBED: dict[str, tuple[tuple[Any, ...], str | None]] = {
    "openat$kvm": ((ioctl(0xFFFFFFFFFFFFFF9C), ("text", b"/dev/kvm\0"), INT, NOTHING), KVM),
    "ioctl$KVM_CREATE_VM": ((KVM, ioctl(0xAE01), NOTHING), VM),
    "ioctl$KVM_CREATE_VCPU": ((VM, ioctl(0xAE41), INT), VCPU),
    "ioctl$KVM_CREATE_GUEST_MEMFD": ((VM, ioctl(0xC040AED4), GUEST_MEMFD), FILE),
    "ioctl$KVM_SET_USER_MEMORY_REGION2": ((VM, ioctl(0x40A0AE49), REGION2), None),
    "ioctl$KVM_SET_MEMORY_ATTRIBUTES": ((VM, ioctl(0x4020AED2), ATTRIBUTES), None),
    "ioctl$KVM_RUN": ((VCPU, ioctl(0xAE80), NOTHING), None),
    "fallocate": (("fd", INT, INT, INT), None), "mmap": (("vma", INT, INT, INT, "fd", INT), None),
    "munmap": (("vma", INT), None), "getrandom": (("buffer", INT, INT), None), "close": (("fd",), None),
}
"""Call -> what its arguments are, and which resource it makes. The numbers are those of include/uapi/linux/kvm.h."""


def misfits(calls: list[SyzCall]) -> list[str]:
    """What in *calls* is not as the descriptions have it."""
    found: list[str] = []
    holds: dict[str, str] = {}
    for call in calls:
        if call.name not in DESCRIBED:
            found.append(f"{call.name} is not described")
            continue
        wanted, makes = DESCRIBED[call.name]
        if len(wanted) != len(call.args):
            found.append(f"{call.name} takes {len(wanted)} arguments, and has {len(call.args)}")
        for number, (kind, value) in enumerate(zip(wanted, call.args, strict=False)):
            if (why := _misfit(kind, value, holds)) is not None:
                found.append(f"{call.name}, argument {number}: {why}")
        if makes and call.result:
            holds[call.result] = makes
        elif call.result:
            found.append(f"{call.name} makes nothing to assign")
    return found


def _misfit(kind: Any, value: Any, holds: dict[str, str]) -> str | None:
    if kind == INT:
        return None if type(value) is int and 0 <= value < 1 << 64 else f"{value!r} is no number of 64 bits"
    if kind == NOTHING or (isinstance(kind, str) and kind.startswith("=")):
        number = 0 if kind == NOTHING else int(kind[1:], 16)
        return None if value == number else f"{value!r} is not the constant {number:#x}"
    if isinstance(kind, str) and kind not in ("vma", "buffer"):
        there = holds.get(value.name, "nothing") if isinstance(value, Variable) else repr(value)
        return None if kind in KINDS.get(there, ()) else f"{there} is no {kind}"
    if not isinstance(value, Pointer) or value.address not in AREA:
        return f"{value!r} is no pointer into the area"
    if kind == "vma":
        return None if value.at is None and value.size else f"{value!r} is no region"
    if kind == "buffer":
        return None if isinstance(value.at, Text) else f"{value!r} is no buffer"
    what, inside = kind
    if what == "text":
        return None if value.at == Text(inside) else f"{value.at!r} is not {inside!r}"
    if not isinstance(value.at, Struct) or len(value.at.members) != len(inside):
        return f"{value.at!r} is no struct of {len(inside)}"
    whys = (_misfit(member, given, holds) for member, given in zip(inside, value.at.members, strict=True))
    return next((why for why in whys if why is not None), None)


def overlaps(calls: list[SyzCall]) -> list[str]:
    """Arguments in memory that lie over each other, each 8 bytes a member."""
    taken: list[tuple[int, int, str]] = []
    for call in calls:
        for value in call.args:
            if isinstance(value, Pointer) and isinstance(value.at, (Struct, Text)) and value.address is not None:
                size = len(value.at.data) if isinstance(value.at, Text) else 8 * len(value.at.members)
                taken.append((value.address, value.address + size, call.name))
    taken.sort()
    return [f"{one[2]} and {other[2]} share {other[0]:#x}" for one, other in pairwise(taken)
            if other[0] < one[1]]
