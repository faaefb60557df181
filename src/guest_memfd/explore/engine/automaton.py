"""The automaton of a party: (local, result) -> local, filled by running its procedure again along a recorded path."""

from __future__ import annotations

from typing import Any

from guest_memfd.errors import DesignRaised
from guest_memfd.explore.engine.frames import END, Chain, Frames, Place
from guest_memfd.explore.engine.place import chain_of, freeze
from guest_memfd.explore.engine.program import Program, differs, dismiss, resume, send
from guest_memfd.words.primitives import Primitive

LOCAL_BITS = 16
LOCAL_MASK = (1 << LOCAL_BITS) - 1
"""65 thousand places for each party. It is checked where numbers are given out, so a procedure that is too large ends in an
error and never in a wrong answer."""

MOST_STEPS = 1000
"""Primitives that lead a party to where it stands: the longest way of what is shipped takes a tenth of them."""


class Automaton:
    """All places where one party can stand, discovered as results arrive. Local 0 is its start.

    frames: those of all parties. share: what one party was found to do serves the others.
    """

    def __init__(self, program: Program, frames: Frames | None = None, *, share: bool = True) -> None:
        self.program = program
        # Third parties' code is run for each place.
        self.shared = share and program.anew is None
        self.frames = frames or Frames()
        self.ids: dict[Any, int] = {}                            # a place; where locals are live, and what is asked for
        self.places: list[Place] = []
        self.before: list[int] = []                              # per place: the one that it was first reached from
        self.paths: list[tuple[Any, ...]] = []
        self.waits_on: list[Primitive | None] = []
        self.asked: list[Any] = []                               # per place: what tells that primitive from all others
        self.ways: list[Any] = []                                # per place: the tree of what was worked out (Tables)
        self.moves: dict[tuple[int, Any], int] = {}
        # Place 0 is the start of the procedure, before any result.
        generator, primitive = resume(program, ())
        self._found(-1, (), generator, primitive)

    # Where *result* leads to from the place *before*, by running the procedure.
    def _run(self, before: int, result: Any) -> int:
        path = self.paths[before]
        generator, primitive = resume(self.program, path, self._asked(before)[:-1])
        if primitive != self.waits_on[before]:
            raise differs(self.program, len(path), self.waits_on[before], primitive, generator)
        then = chain_of(generator)
        try:
            primitive = send(self.program, generator, result)
        except StopIteration:
            primitive = None
        return self._found(before, (*path, result), generator, primitive, then)

    # The place of *generator*, which *path* has led to, by way of the place *before*, where its chain was *then*.
    def _found(
        self, before: int, path: tuple[Any, ...], generator: Any, primitive: Primitive | None, then: Chain = (),
    ) -> int:
        # The same path on new instances of design and hypervisor: what an instance remembers of earlier runs would
        # show here.
        if self.program.anew is not None:
            now, again = resume(self.program, path, self._asked(before), anew=True)
            if again != primitive:
                raise differs(self.program, len(path), primitive, again, now)
            dismiss(self.program, now)
        with self.program.guard():                      # of what they keep in local variables
            # The key is read while the generator is suspended: closing it runs its `finally` blocks and changes its
            # frames.
            place = END
            if primitive is not None:
                chain = chain_of(generator)
                try:
                    place = self.frames.place(chain) if not (self.shared and then) else self.frames.learn(
                        self.places[before], then, freeze(path[-1]), chain, primitive)
                except TypeError as error:
                    raise DesignRaised(f"{self.program} keeps what has no hash in a local variable ({error}); "
                                       "use tuples, numbers and strings") from error
        known = self._intern(place, before, path, primitive)
        dismiss(self.program, generator)
        return known

    def _asked(self, local: int) -> list[Primitive | None]:
        asked = []
        while local >= 0:
            asked.append(self.waits_on[local])
            local = self.before[local]
        asked.reverse()
        return asked

    def _intern(self, place: Place, before: int, path: tuple[Any, ...], primitive: Primitive | None) -> int:
        asked = freeze(tuple(primitive)) if primitive else None
        # What is asked for is dead once it was, and two live frames may have asked for different things.
        key = (place, asked) if self.frames.live and primitive else place
        known = self.ids.get(key)
        if known is None:
            known = self.ids[key] = len(self.paths)
            if known > LOCAL_MASK:
                raise DesignRaised(f"{self.program} has more than {LOCAL_MASK} places to stand; does it "
                                   "count without end, or keep objects that equal nothing but themselves?")
            if len(path) > MOST_STEPS:
                raise DesignRaised(f"{self.program} goes on and on: {MOST_STEPS} steps have led to no end, and to no place "
                                   f"where it has stood before, at {primitive}; does it count without end?")
            self.places.append(place)
            self.before.append(before)
            self.paths.append(path)
            self.waits_on.append(primitive)
            self.asked.append(asked)
            self.ways.append(None)
        # The key says too little: something that the procedure depends on is not in it. To go on would hide
        # interleavings.
        elif self.waits_on[known] != primitive:
            raise DesignRaised(
                f"{self.program}: two histories share a local state but continue with "
                f"{self.waits_on[known]} and {primitive}; keep loop state in local variables"
            )
        return known

    def after(self, local: int, result: Any) -> int:
        """The local state that *result* leads to from *local*."""
        # A result may be a list or a named tuple; two that are equal lead to the same place.
        memo = (local, freeze(result))
        known = self.moves.get(memo)
        if known is None:
            shared = self.frames.after(self.places[local], memo[1]) if self.shared else None
            known = self.moves[memo] = (
                self._run(local, result) if shared is None
                else self._intern(shared[0], local, (*self.paths[local], result), shared[1]))
        return known

    @property
    def done(self) -> int:
        """The place where the procedure has ended; -1 while it has never been seen to."""
        return self.ids.get(END, -1)

    def cyclic(self) -> bool:
        """Whether some place can be reached again from itself (so that running it might never end)."""
        follow: dict[int, set[int]] = {}
        for (local, _), to in self.moves.items():
            follow.setdefault(local, set()).add(to)
        done: set[int] = set()
        path: set[int] = set()
        stack: list[tuple[int, bool]] = [(0, False)]
        while stack:
            node, leaving = stack.pop()
            if leaving:
                path.discard(node)
                done.add(node)
            elif node in path:
                return True
            elif node not in done:
                path.add(node)
                stack.append((node, True))
                stack.extend((n, False) for n in follow.get(node, ()) if n not in done)
        return False
