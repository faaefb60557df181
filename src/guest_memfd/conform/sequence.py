"""Operations in a row: drawn at random, laid out in tables, read from and written to a file.

A sequence number and a seed are all there is to a random sequence, so either is enough to have it again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path
from random import Random
from typing import Any

from guest_memfd.conform.operations import BASE, BEGINNING, OPERATIONS, SIZE, UserCall, UserOperation
from guest_memfd.errors import BadInput, UnknownName
from guest_memfd.uapi.kvm import SHARED
from guest_memfd.words.units import PAGE

SCHEMA = "guest-memfd-conform/1"
LENGTH = 40
"""Operations of a random sequence."""

Sequence = tuple[UserCall, ...]

_COPIES = ("read", "write")
_USUALLY = 0.8
_ROWS = 60
"""Of a table, in one sequence."""
_TOGETHER = 3
"""How many arguments of one row of a table are others than the plain ones."""


def random_sequence(seed: int, number: int, skip: frozenset[str] = frozenset()) -> Sequence:
    """Sequence *number* of *seed*, without the operations of *skip*."""
    # A string and not hash() of a pair: its seed is made by SHA-512, and so is the same in every process and Python.
    choose = Random(f"{seed} {number}")
    names = [name for name in OPERATIONS if name not in skip]
    weights = [OPERATIONS[name].weight for name in names]
    # A file that works, its mapping and a slot: without them most of what is drawn would find its registers empty.
    steps = [UserCall("create", (0, 0, SIZE, int(SHARED))), UserCall("map", (0, 0, 0, choose.choice((SIZE, 2 * SIZE)), 0)),
             UserCall("create", (1, 0, SIZE, choose.choice((int(SHARED), 1, 1, 0)))),
             UserCall("map", (1, choose.randrange(2), 0, SIZE, 0)),
             UserCall("region", (0, 1, 4, BASE, 2 * PAGE, 0, choose.randrange(2), choose.choice((0, PAGE))))]
    steps += [drawn(choose, OPERATIONS[name]) for name in choose.choices(names, weights, k=LENGTH - len(steps))]
    return tuple(steps)


def drawn(choose: Random, operation: UserOperation) -> UserCall:
    """*operation* with arguments that *choose* draws, most of them usual ones."""
    return UserCall(operation.name, tuple(
        choose.choice(param.usual if choose.random() < _USUALLY or not param.edges else param.edges)
        for param in operation.params))


def tables(skip: frozenset[str] = frozenset()) -> Iterator[Sequence]:
    """Every operation with every edge: all values of any three arguments, the others plain. Without those of *skip*."""
    for operation in OPERATIONS.values():
        if operation.name in skip:
            continue
        rows = list(_rows(operation))
        # A child is forked for each sequence, so rows share one. What has no
        # undo, as close(2), begins in a child of its own.
        size = _ROWS if operation.undo is not None else 1
        for at in range(0, len(rows), size):
            steps = [step for row in rows[at:at + size] for step in (row, *operation.undoing(row))]
            yield (*BEGINNING, *steps)


def _rows(operation: UserOperation) -> Iterator[UserCall]:
    plain = [param.usual[0] for param in operation.params]
    seen = set()
    # All values of all eight arguments of KVM_SET_USER_MEMORY_REGION2 were 1,360,800 rows. In threes they are 9,279.
    for places in combinations(range(len(plain)), min(_TOGETHER, len(plain))):
        for values in product(*(operation.params[place].values for place in places)):
            row = list(plain)
            for place, value in zip(places, values, strict=True):
                row[place] = value
            if tuple(row) not in seen:
                seen.add(tuple(row))
                yield UserCall(operation.name, tuple(row))


def as_json(sequence: Sequence, **more: Any) -> dict[str, Any]:
    """*sequence* as a file has it; *more* is for people."""
    return {"schema": SCHEMA, **more, "steps": [[step.op, *step.args] for step in sequence]}


def read(path: str) -> Sequence:
    """The sequence of a file that was saved; raises BadInput, UnknownName for what is none."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise BadInput(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        said = found.get("schema") if isinstance(found, dict) else type(found).__name__
        raise BadInput(f"{path}: schema {said!r}; this program replays {SCHEMA!r}")
    steps = found.get("steps")
    if not isinstance(steps, list) or not steps:
        raise BadInput(f"{path}: no steps")
    return tuple(_step(f"{path}, step {at}", each) for at, each in enumerate(steps))


def _step(where: str, given: Any) -> UserCall:
    if not isinstance(given, list) or not given or not all(type(each) is int for each in given[1:]):
        raise BadInput(f"{where}: an operation and its numbers, as [\"close\", 0]")
    if given[0] not in OPERATIONS:
        raise UnknownName("operation", str(given[0]), OPERATIONS, f" ({where})")
    params = OPERATIONS[given[0]].params
    if len(given) - 1 != len(params):
        raise BadInput(f"{where}: {given[0]} takes {len(params)} numbers, {', '.join(param.name for param in params)}")
    for param, value in zip(params, given[1:], strict=True):
        # There are so many registers, and a buffer of so many bytes; else any number that a call may have.
        if (param.of or given[0] in _COPIES) and value not in param.values:
            raise BadInput(f"{where}: {param.name} of {given[0]} is one of {', '.join(map(str, param.values))}, not {value}")
        if not -1 << 63 <= value < 1 << 64:
            raise BadInput(f"{where}: {param.name} {value:#x} does not fit 64 bits")
    return UserCall(given[0], tuple(given[1:]))
