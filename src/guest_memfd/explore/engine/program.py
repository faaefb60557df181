"""How a procedure is run: started, sent results, watched, dismissed; and how a host is asked for a primitive.

All code of third parties runs here, inside of a guard. What it does has to follow from the results it is sent alone: that is
looked at wherever it is run again.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from types import GeneratorType
from typing import Any, NamedTuple, Protocol

from guest_memfd.compat import override
from guest_memfd.errors import DesignRaised, NotAPrimitive, shown
from guest_memfd.explore.engine.asked import unlike
from guest_memfd.plugins.guard import Guard, asked_twice, where
from guest_memfd.words.outcome import Outcome
from guest_memfd.words.primitives import PRIMITIVES, Primitive

MOST_OPTIONS = 1000
"""Options of a choice, and one."""

MOST_SILENT = 200
"""Silent primitives that a party may take one after the other."""


class ExploredHost(Protocol):
    """What is explored: a host whose whole state is a bytes object.

    A machine with a true attribute `footprints` promises that its outcomes depend on nothing but the bytes it reads,
    one by one, as ``state[at]``, and that all its states are of one length. Then it may be handed a `Watched` state,
    and has to return watched ones; each step is worked out once for all states that agree in what was read.

    One with a method `spared` (state -> int) says how many failures it has not injected yet: of two runs of one length the
    one with fewer failures is told.
    """

    def outcomes(self, shared: bytes, party: int, primitive: Primitive) -> Sequence[Outcome]:
        """All ways *primitive* can end now; none when *party* has to wait."""

    def halted(self, shared: bytes) -> bool:
        """Whether the machine has stopped permanently (panic): nothing moves, and that is no deadlock."""


@dataclass(frozen=True)
class Program:
    """A party: its number (which lock holder it is, the same in every scenario), its name, how to start its procedure.

    Several programs may have one number, as long as no scenario has two of them. anew: how to start it on new instances of
    design and hypervisor, where any of it is a third party's; then it is watched. of: whose design it is, in words.
    """

    number: int
    name: str
    start: Callable[[], Generator[Primitive, Any, Any]]
    anew: Callable[[], Generator[Primitive, Any, Any]] | None = None
    of: str = ""

    @override
    def __str__(self) -> str:
        return f"party {self.name!r}{self.of}"

    def guard(self) -> Guard:
        """Around all of its code."""
        return Guard(self, timed=self.anew is not None)


def check_primitive(program: Program, primitive: object, generator: Generator[Any, Any, Any]) -> Primitive:
    """Return *primitive* if it is one; raises `NotAPrimitive` naming the line that yielded something else."""
    if isinstance(primitive, Primitive) and primitive.name in PRIMITIVES:
        wrong = unlike(primitive) if program.anew is not None else None
        if wrong is not None:
            raise NotAPrimitive(f"{program}: {wrong} ({where(generator)})")
        if primitive.name == "choose" and len(primitive.args) > MOST_OPTIONS:
            raise DesignRaised(f"{program} offers {len(primitive.args) - 1} options to choose from at {where(generator)}; "
                               f"at most {MOST_OPTIONS - 1} can be explored")
        return primitive
    meant = "that is a procedure: write 'yield from' for 'yield'" if inspect.isgenerator(primitive) else (
        "a procedure may only 'yield from' the primitives of its host (words/primitives.py)")
    raise NotAPrimitive(f"{program} yielded {shown(primitive)} at {where(generator)}; {meant}")


Started = tuple[Generator[Primitive, Any, Any], Primitive | None]
"""A procedure that is suspended, and the primitive it waits on (None: done)."""


def resume(
    program: Program, path: Sequence[Any], asked: Sequence[Primitive | None] | None = None, *, anew: bool = False
) -> Started:
    """Start *program*, *anew* on new instances, and send it *path*. *asked*: what it asked for before, on the same path.

    Raises DesignRaised when the procedure raises, does not come back, or asks for something else this time; NotAPrimitive
    when it yields something else than primitives.
    """
    # All code of a third party runs inside of a guard: it may raise anything, or not come back, and must then be
    # named.
    with program.guard():
        start = program.anew if anew and program.anew else program.start
        generator = start()
        if not isinstance(generator, GeneratorType):
            raise DesignRaised(f"{program} is no procedure: it is {shown(generator)}; one that has nothing to ask for says "
                               "'yield from ()'")
        at = 0
        try:
            primitive = next(generator)
            for at, result in enumerate(path, 1):
                # The path was taken before, so what was asked for is known. To compare costs little, and it is the
                # check on which both tables rest: the same results lead to the same primitives.
                if asked is None:
                    check_primitive(program, primitive, generator)
                elif primitive != asked[at - 1]:
                    raise differs(program, at - 1, asked[at - 1], primitive, generator)
                primitive = generator.send(result)
        # A procedure that ends before all results are used was longer the last time.
        except StopIteration:
            if at < len(path):
                raise differs(program, at, asked[at] if asked else "something", None, generator) from None
            return generator, None
        return generator, check_primitive(program, primitive, generator)


def dismiss(program: Program, generator: Generator[Primitive, Any, Any]) -> None:
    """Let go of a suspended procedure; what it asks for in a `finally` is no one's to do."""
    # Our own procedures need no closing: they have nothing to do in a `finally`, and the collector takes them.
    for _ in range(MOST_SILENT if program.anew is not None else 0):
        with program.guard():
            try:
                generator.close()
            except RuntimeError:                        # it has ignored GeneratorExit, and may do so once more
                continue
        return


def differs(
    program: Program, results: int, before: object, now: object, generator: Generator[Any, Any, Any]
) -> DesignRaised:
    """*program* is not deterministic: what it asked for *before*, and what *now*, after so many *results*."""
    words = ["came to its end" if what is None else f"did {what if isinstance(what, Primitive) else shown(what)}"
             for what in (before, now)]
    return DesignRaised(f"{program} is not deterministic: after the same {results} results it {words[0]} and then "
                        f"{words[1]} ({where(generator)}); what it does must follow from the results alone")


def send(program: Program, generator: Generator[Primitive, Any, Any], result: Any) -> Primitive:
    """Let the procedure of *program* go on with *result*: what it waits on next; StopIteration at its end.

    Raises DesignRaised when the procedure raises or does not come back, NotAPrimitive when it yields something else.
    """
    with program.guard():
        try:
            return check_primitive(program, generator.send(result), generator)
        except StopIteration as stop:
            returned = stop.value
    # A new one: the other would have this frame in its traceback, and the frame it, and no one collects cycles here
    # (suite/pool.py). With the frames that called this one all tables would stay.
    raise StopIteration(returned)


def perform(machine: ExploredHost, shared: bytes, party: int, primitive: Primitive) -> tuple[Outcome, ...]:
    """The outcomes of *primitive*; raises DesignRaised when carrying it out raises (wrong arguments, a hypercall).

    A machine with a true attribute `foreign` runs code of third parties: it is asked twice, and has to answer the same.
    """
    theirs = getattr(machine, "foreign", "")
    asked = Asked(primitive, theirs)
    outcomes, again = asked_twice(asked, lambda: tuple(machine.outcomes(shared, party, primitive)), theirs=bool(theirs))
    # A hypervisor's hypercalls are third-party code as well, run on the state. What differs between two runs would
    # make the table depend on which of them came first.
    if theirs and again != outcomes:
        first, second = next(pair for pair in itertools.zip_longest(outcomes, again) if pair[0] != pair[1])
        raise DesignRaised(f"{asked} is not deterministic: in the same state it {_end(first)} and then {_end(second)}")
    return outcomes


class Asked(NamedTuple):
    """Who asks for *primitive*, in words, for a message; *theirs*: whose hypervisor carries it out."""

    primitive: Primitive
    theirs: str

    @override
    def __str__(self) -> str:
        return f"{self.primitive}, asked for by {self.primitive.caller}{self.theirs},"


def _end(outcome: Outcome | None) -> str:
    return "did not end so" if outcome is None else f"returned {outcome.result}"
