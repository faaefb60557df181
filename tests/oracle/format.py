"""Probes of an MMU as text, so that any implementation can be asked the same questions. Rule of this file: the format.

A file is lines of words separated by single spaces; numbers are hexadecimal with 0x or decimal; empty lines and lines
that begin with # are skipped. In this order:

    translation probes 1                      the format and its version
    reg TCR_EL1 0x...                         a system register, by its name in the Arm ARM; those not named are 0
    word 0x80001000 0x...                     a doubleword of physical memory; everything else is 0
    probe 0xffff800000001000 r 1              one access: virtual address, r|w|x, exception level 0|1
    ok 0x80002000                             the answer to the first probe: its physical address
    fault 0x07 2 1                            or: fault status code, stage, 1 on a stage-1 walk (S1PTW)

Answers come after all probes, one per probe in their order, or not at all. An implementation reads a file without
answers, sets the registers (SCR_EL3.NS, HCR_EL2.VM = bit 0 of HCR_EL2, SCTLR_EL1.M = bit 0 of SCTLR_EL1), stores the
words, and answers each probe with the translation caches empty: a payload at EL2 by AT S12E1R, S12E1W, S12E0R or S12E0W
and PAR_EL1 (F bit 0, FST 6:1, PTW 8, S 9, PA 47:12), fetches by branching there and reading ESR_ELx.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

HEADER = "translation probes 1"
REGISTERS = ("TCR_EL1", "TTBR0_EL1", "TTBR1_EL1", "MAIR_EL1", "SCTLR_EL1", "VTCR_EL2", "VTTBR_EL2", "HCR_EL2")


class Probe(NamedTuple):
    va: int
    access: str
    el: int


class Ok(NamedTuple):
    pa: int


class Refused(NamedTuple):
    fsc: int
    stage: int
    s1ptw: bool


Answer = Ok | Refused


@dataclass
class Probes:
    """The contents of one file."""

    registers: dict[str, int] = field(default_factory=dict)
    words: dict[int, int] = field(default_factory=dict)
    probes: list[Probe] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)


class FormatError(ValueError):
    """A file that is not in this format; says which line."""


def write(what: Probes) -> str:
    lines = [HEADER]
    lines += [f"reg {name} {value:#x}" for name, value in what.registers.items()]
    lines += [f"word {address:#x} {value:#x}" for address, value in sorted(what.words.items())]
    lines += [f"probe {p.va:#x} {p.access} {p.el}" for p in what.probes]
    for a in what.answers:
        lines.append(f"ok {a.pa:#x}" if isinstance(a, Ok) else f"fault {a.fsc:#04x} {a.stage} {int(a.s1ptw)}")
    return "\n".join(lines) + "\n"


def read(text: str) -> Probes:
    """Raises FormatError."""
    found = Probes()
    lines = [(n, line.split(" ")) for n, line in enumerate(text.splitlines(), 1) if line and not line.startswith("#")]
    if not lines or " ".join(lines[0][1]) != HEADER:
        raise FormatError(f"line 1: expected {HEADER!r}")
    order = 0
    for number, words in lines[1:]:
        try:
            order = _line(found, words, order)
        except (ValueError, IndexError) as error:
            raise FormatError(f"line {number}: {error}") from error
    if found.answers and len(found.answers) != len(found.probes):
        raise FormatError(f"{len(found.answers)} answers to {len(found.probes)} probes")
    return found


_ORDER = {"reg": 1, "word": 2, "probe": 3, "ok": 4, "fault": 4}
_LENGTH = {"reg": 3, "word": 3, "probe": 4, "ok": 2, "fault": 4}


def _line(found: Probes, words: list[str], order: int) -> int:
    what = words[0]
    if _ORDER.get(what, 0) < order or len(words) != _LENGTH.get(what):
        raise ValueError(f"{' '.join(words)!r} does not belong here")
    if what == "reg":
        if words[1] not in REGISTERS:
            raise ValueError(f"no register {words[1]}")
        found.registers[words[1]] = int(words[2], 0)
    elif what == "word":
        found.words[int(words[1], 0)] = int(words[2], 0)
    elif what == "probe":
        if words[2] not in ("r", "w", "x") or words[3] not in ("0", "1"):
            raise ValueError(f"no access {words[2]} from EL{words[3]}")
        found.probes.append(Probe(int(words[1], 0), words[2], int(words[3])))
    elif what == "ok":
        found.answers.append(Ok(int(words[1], 0)))
    else:
        found.answers.append(Refused(int(words[1], 0), int(words[2]), words[3] == "1"))
    return _ORDER[what]
