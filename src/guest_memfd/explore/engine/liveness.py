"""Which local variables of a suspended frame can still be read: the others say nothing about what it does next.

Theory of operation. A variable is *live* after an instruction if some way on from there reads it before writing it. That is
the usual analysis of compilers, backwards over the bytecode until nothing changes, here for one function at a time. Every
jump is taken to be possible, and every exception anywhere in the range of its handler: what is found live may be dead, never
the other way round. What the analysis does not know makes everything live: an instruction with FAST in its name that is not
below, or a name by which a function reads all its variables at once. Cells are always live, as a closure may read them.

Two places that differ in dead variables alone are bisimilar: the same code goes on with the same values, so it asks for the
same primitives, sends the same facts, and comes to places that differ in dead variables alone. Taken for one place they are
an exact quotient (docs/explorer.md).
"""

from __future__ import annotations

import dis
from functools import cache
from types import CodeType
from typing import Any

READ, WRITTEN = True, False

_EFFECTS: dict[str, tuple[bool, ...]] = {
    "LOAD_FAST": (READ,), "LOAD_FAST_CHECK": (READ,), "LOAD_FAST_BORROW": (READ,), "LOAD_FAST_AND_CLEAR": (READ,),
    "LOAD_CLOSURE": (READ,), "STORE_FAST": (WRITTEN,), "STORE_FAST_MAYBE_NULL": (WRITTEN,),
    # It raises if there is none.
    "DELETE_FAST": (READ,),
    "LOAD_FAST_LOAD_FAST": (READ, READ), "LOAD_FAST_BORROW_LOAD_FAST_BORROW": (READ, READ),
    "STORE_FAST_LOAD_FAST": (WRITTEN, READ), "STORE_FAST_STORE_FAST": (WRITTEN, WRITTEN),
}
"""What instructions do to the variables that they name, in this order. Python 3.11 to 3.14; two at once from 3.13 on."""

_ENDS = {"RETURN_VALUE", "RETURN_CONST", "RAISE_VARARGS", "RERAISE"}
_JUMPS = {"JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT"}
_ALL_AT_ONCE = {"locals", "vars", "dir", "eval", "exec", "_getframe", "currentframe", "f_locals"}

Names = frozenset[str]


def live_at(code: CodeType, offset: int) -> Names | None:
    """The variables of *code* that may be read after the instruction at *offset*; None: all of them."""
    known = _live(code)
    return known.get(offset) if known is not None else None


@cache
def _live(code: CodeType) -> dict[int, Names] | None:
    instructions = list(dis.get_instructions(code))
    if not _ALL_AT_ONCE.isdisjoint(code.co_names) or any(
        ("FAST" in each.opname and each.opname not in _EFFECTS) or each.opname == "LOAD_LOCALS" for each in instructions
    ):
        return None
    follows = _follows(code, instructions)
    after = [frozenset[str]()] * len(instructions)
    before = after[:]
    changed = True
    while changed:
        changed = False
        for n in range(len(instructions) - 1, -1, -1):
            after[n] = frozenset().union(*(before[following] for following in follows[n]))
            now = _before(instructions[n], after[n])
            changed, before[n] = changed or now != before[n], now
    cells = frozenset((*code.co_cellvars, *code.co_freevars))
    return {each.offset: live | cells for each, live in zip(instructions, after, strict=True)}


def _before(instruction: dis.Instruction, live: Names) -> Names:
    effects = _EFFECTS.get(instruction.opname, ())
    names = instruction.argval if len(effects) > 1 else (instruction.argval,)
    for name, effect in reversed(list(zip(names, effects, strict=False))):
        live = live | {name} if effect is READ else live - {name}
    return live


# Of each instruction the numbers of those that may follow it.
def _follows(code: CodeType, instructions: list[dis.Instruction]) -> list[list[int]]:
    number = {each.offset: n for n, each in enumerate(instructions)}
    follows: list[list[int]] = []
    for n, each in enumerate(instructions):
        falls_through = each.opname not in _ENDS | _JUMPS and n + 1 < len(instructions)
        follows.append([n + 1] if falls_through else [])
        if each.opcode in dis.hasjrel or each.opcode in dis.hasjabs:
            follows[n].append(number[each.argval])
    covered: Any = dis.Bytecode(code)
    for entry in covered.exception_entries:             # which type checkers do not know of
        for n, each in enumerate(instructions):
            if entry.start <= each.offset < entry.end:
                follows[n].append(number[entry.target])
    return follows
