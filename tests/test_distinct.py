"""Things of different types are different, whatever they hold: where several named tuples mean one thing each."""

from __future__ import annotations

import ast
import importlib
import itertools
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import guest_memfd
from guest_memfd.distinct import distinct
from guest_memfd.uapi.kvm_run import Halt, Intr, Shutdown, SystemEvent
from guest_memfd.words.facts import OutOfScope, Unannounced

SOURCE = Path(guest_memfd.__file__).parent


# ``Stop = CpuAbort | Bus | ...``: every union that a module gives a name.
def unions() -> Iterator[tuple[str, list[type]]]:
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp) and isinstance(node.value.op, ast.BitOr):
                module = importlib.import_module(".".join((SOURCE.name, *path.relative_to(SOURCE).with_suffix("").parts)))
                name = ast.unparse(node.targets[0])
                members = getattr(getattr(module, name), "__args__", ())
                yield f"{path.relative_to(SOURCE)}: {name}", [kind for kind in members if issubclass(kind, tuple)]


UNIONS = [(name, members) for name, members in unions() if len(members) > 1]


@pytest.mark.parametrize(("name", "members"), UNIONS, ids=[name for name, _ in UNIONS])
def test_members_of_a_union_are_never_equal(name: str, members: list[Any]) -> None:
    things = [member(*range(len(member._fields))) for member in members]
    assert all(thing == type(thing)(*thing) and hash(thing) == hash(type(thing)(*thing)) for thing in things)
    assert [(one, other) for one, other in itertools.permutations(things, 2) if not _differ(one, other)] == []
    assert len(set(things)) == len(things)


def _differ(one: Any, other: Any) -> bool:
    return one != other and (one == other) is False


def test_all_unions_are_found() -> None:
    assert {name.rpartition(" ")[2] for name, _ in UNIONS} >= {"Exit", "Note", "Stop", "Operand"}


def test_exits_without_members_and_facts_with_the_same_ones() -> None:
    assert Halt() != Shutdown()
    assert Halt() == Halt()
    assert Intr() != ()
    assert {Halt(): "halted", Shutdown(): "shut down"}[Shutdown()] == "shut down"
    assert SystemEvent(1) != (1,)
    assert OutOfScope("punch", "unmap", 1) != Unannounced("punch", "unmap", 1)
    assert pickle.loads(pickle.dumps(Halt())) == Halt()


def test_a_plain_one_is_not_enough() -> None:
    class Plain(NamedTuple):
        n: int

    class Other(NamedTuple):
        n: int

    assert Plain(1) == Other(1)
    assert distinct(Plain)(1) != Other(1)
