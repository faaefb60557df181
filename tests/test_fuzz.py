"""Fuzzers: a few inputs of each kind now, a hundred thousand in the long tests; and that each would see what it is for."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from fuzz import lines
from fuzz.kind import Kind
from fuzz.kinds import KINDS
from fuzz.lives import KvmLives

from guest_memfd.errors import SyscallFailed
from guest_memfd.machine.el2.pkvm import transitions
from guest_memfd.machine.el2.pkvm.states import PkvmState
from guest_memfd.scenarios import PARTIES

LONG = {"lines": 700, "traces": 1000, "guests": 10_000, "plugins": 60, "kvm": 400, "pkvm": 400, "gunyah": 400,
        "gunyah-calls": 400, "pkvm-calls": 1000}
"""Inputs of each kind; a life is a dozen of calls, and one of the last two is thirty."""


def wrong(name: str, numbers: range) -> list[Any]:
    return list(KINDS[name]().run(numbers))


@pytest.mark.parametrize("name", KINDS)
def test_a_few(name: str) -> None:
    assert wrong(name, range(1_000_000, 1_000_010)) == []


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
def test_many(name: str) -> None:
    assert wrong(name, range(LONG[name])) == []


def test_no_plugin_stays() -> None:
    before = [*PARTIES]
    assert wrong("plugins", range(2_000_000, 2_000_020)) == []
    assert [*PARTIES] == before


def test_an_input_is_made_of_its_number_alone() -> None:
    class Said(Kind):
        name = "said"

        def try_one(self, choose: random.Random, said: list[str]) -> str | None:
            return str(choose.random())

    assert [f.why for f in Said().run(range(3))] == [f.why for n in range(3) for f in Said().run(range(n, n + 1))]


# -- each sees what it is for ------------------------------------------------------------------------------------------


def test_what_is_raised_is_a_failure_and_so_is_an_end_of_the_process() -> None:
    class Ends(Kind):
        name = "ends"

        def try_one(self, choose: random.Random, said: list[str]) -> str | None:
            raise SystemExit(0)

    failure, = Ends().run(range(1))
    assert "SystemExit" in failure.why


@pytest.mark.parametrize(("does", "why"), [
    (lambda argv: 7, "exit code 7"), (lambda argv: 4, "without a word"),
    (lambda argv: print("gmem: internal error", file=__import__("sys").stderr) or 1, "a failure of our own"),
    (lambda argv: print("x" * 401, file=__import__("sys").stderr) or 4, "401 characters"),
    (lambda argv: print("\x1b[2J", file=__import__("sys").stderr) or 4, "escape sequence"),
    (lambda argv: print("Traceback (most recent call last):", file=__import__("sys").stderr) or 2, "a traceback"),
])
def test_command_lines(does: Callable[[Any], int], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "main", does)
    assert why in str(lines.answer(["x"]))


def test_lives_see_an_errno_that_no_call_has(monkeypatch: pytest.MonkeyPatch) -> None:
    lives = KvmLives()

    def odd(choose: random.Random, held: dict[str, list[Any]]) -> tuple[str, Callable[[], Any]]:
        def call() -> None:
            raise SyscallFailed(97, "socket")

        return "socket()", call

    monkeypatch.setattr(lives, "call", odd)
    failure, = lives.run(range(1))
    assert failure.why == "socket(): errno 97"


def test_hypercalls_see_a_page_that_the_host_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    real = transitions._set

    def keeps(el2: Any, pfn: int, order: int, host: PkvmState, *more: Any, **named: Any) -> None:
        real(el2, pfn, order, PkvmState.OWNED if host == PkvmState.NOPAGE else host, *more, **named)

    monkeypatch.setattr(transitions, "_set", keeps)
    assert any("is the host's alone" in failure.why for failure in KINDS["pkvm-calls"]().run(range(30)))
