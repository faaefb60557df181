"""Code of third parties is called inside of `Guard`, and nowhere else: whatever it does is told as its doing.

It may raise anything, SystemExit as well, so that a run does not end without a word; and it may never come back.
"""

from __future__ import annotations

import dis
import inspect
import os
import signal
import threading
from collections.abc import Callable, Generator
from functools import partial
from types import FrameType, TracebackType
from typing import Any, NoReturn, TypeVar

from guest_memfd.errors import BadInput, DesignRaised, PluginError, describe, place_of
from guest_memfd.words.primitives import Host

T = TypeVar("T")

TICK = 1.0
"""Seconds between two looks at code that does not come back."""

PATIENCE = 5
"""So many looks, at each of which the process runs: one that is stopped, or starved, is not blamed."""

IMPORTING = 30
"""The same of an import: what it imports may be large, and the machine slow."""

OURS = {"guest_memfd", "builtins", "abc", "typing", "functools"}
"""Top-level modules of what is not foreign."""


def foreign(*things: Any) -> bool:
    """Whether any of *things* - a class with all it inherits, a function, an object - is not of this package."""
    return any(not ours(part) for thing in things for part in _modules(thing))


def foreign_modules(*things: Any) -> set[str]:
    """The modules of *things* that are not of this package."""
    return {part for thing in things for part in _modules(thing) if not ours(part)}


def ours(module: str) -> bool:
    """Whether *module* is of this package, or of Python's that classes come from."""
    return module.partition(".")[0] in OURS


def _modules(thing: Any) -> list[str]:
    if isinstance(thing, partial):
        return _modules(thing.func)
    if inspect.isclass(thing):
        return [str(each.__module__) for each in thing.__mro__]
    return [str(getattr(thing, "__module__", None) or type(thing).__module__)]


class Endless(BaseException):
    """Cause of the error for code that has not come back."""


class Guard:
    """`with Guard(who):` runs code of *who*, a third party (its str says which); raises *error* for what it does wrong.

    BadInput passes, for that has been told, and so does ^C. timed: code that has not come back after *patience* looks is
    stopped; not outside of the main thread, nor where someone else uses the timer. did: what it did when it raised.
    """

    def __init__(
        self, who: object, error: type[BadInput] = DesignRaised, *, timed: bool = False, patience: int = PATIENCE,
        did: str = "raised",
    ) -> None:
        self.who, self.error, self.timed, self.patience, self.did = who, error, timed, patience, did
        self._before: Any = None
        self._theirs = timed or error is PluginError
        self._exit: Any = None
        self._left = 0

    def __enter__(self) -> Guard:
        if self._theirs:
            self._exit, os._exit = os._exit, _ends
        if self.timed:
            self._watch()
        return self

    def __exit__(self, kind: type[BaseException] | None, raised: BaseException | None, _: TracebackType | None) -> None:
        told = None
        try:
            if raised is not None and not isinstance(raised, BadInput | Endless) and not _is_the_machines(raised):
                told = f"{self.who} {self.did} {describe(raised)}"      # which is its code, too: an exception's __str__
        except Endless as endless:
            raised = endless
        finally:
            if self._theirs:
                os._exit = self._exit
            self._rest()
        if isinstance(raised, Endless):
            raise self.error(f"{self.who} does not come back: after {self.patience * TICK:g} seconds it is still at "
                             f"{raised.args[0]}") from raised
        if told is not None:
            raise self.error(told) from raised

    def _watch(self) -> None:
        if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0]:
            return
        self._left = self.patience
        self._before = signal.signal(signal.SIGALRM, self._look)
        signal.setitimer(signal.ITIMER_REAL, TICK, TICK)

    def _rest(self) -> None:
        if self._left:
            self._left = 0
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._before)

    def _look(self, _signal: int, frame: FrameType | None) -> None:
        if self._left == 1:
            raise Endless(place_of(_frames(frame)))
        self._left -= bool(self._left)


def asked_twice(
    who: object, question: Callable[..., T], *about: Any, theirs: bool, error: type[BadInput] = DesignRaised
) -> tuple[T, T]:
    """What *question* of *who* answers, and once more if it is a third party's: the caller compares them."""
    with Guard(who, error, timed=theirs):
        first = question(*about)
        return first, question(*about) if theirs else first


def where(generator: Generator[Any, Any, Any]) -> str:
    """``file:line in function`` of the innermost frame of a suspended procedure that is a third party's, if one is."""
    inner: Any = generator
    frames = []
    while inner is not None and inspect.isgenerator(inner) and inner.gi_frame is not None:
        frames.append((inner.gi_frame, inner.gi_frame.f_lineno))
        inner = inner.gi_yieldfrom
    asking = [frame for frame in frames if frame[0].f_globals.get("__name__") != Host.__module__]
    return place_of(asking or frames) if frames else "its end"


# In place of os._exit(), after which no one could say whose doing it was.
def _ends(status: int) -> NoReturn:
    raise SystemExit(f"os._exit({status})")


def _frames(frame: FrameType | None) -> list[tuple[FrameType, int]]:
    frames = []
    while frame is not None:
        frames.append((frame, frame.f_lineno))
        frame = frame.f_back
    return frames[::-1]


# What a signal handler raises is no one's doing; nor is ^C, or memory that has run out, unless a statement raised them: the
# interpreter does it elsewhere.
def _is_the_machines(raised: BaseException) -> bool:
    trace, codes = raised.__traceback__, set()
    raising = 0
    while trace is not None:
        code = trace.tb_frame.f_code
        codes.add(code)
        raising = code.co_code[trace.tb_lasti]
        trace = trace.tb_next
    if isinstance(raised, KeyboardInterrupt | MemoryError) and raising not in _RAISE:
        return True
    handlers = () if isinstance(raised, Exception) else map(signal.getsignal, signal.valid_signals())
    return any(_code(handler) in codes for handler in handlers)


def _code(handler: Any) -> Any:
    return getattr(getattr(handler, "__func__", handler), "__code__", None)


_RAISE = {dis.opmap["RAISE_VARARGS"], dis.opmap["RERAISE"]}
