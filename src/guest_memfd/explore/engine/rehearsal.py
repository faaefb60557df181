"""Code of third parties does the same in every process: it is walked once before they part, and again in each.

It judges nothing. Where a procedure raises, waits or stops the kernel, the walk ends; the explorer tells. What never
comes back is told at once: no one waits for it twice.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from guest_memfd.errors import BadInput, DesignRaised
from guest_memfd.explore.engine.program import ExploredHost, Program, differs, dismiss, perform, resume, send
from guest_memfd.plugins.guard import Endless
from guest_memfd.words.outcome import STAY
from guest_memfd.words.primitives import Primitive

LONGEST = 300
"""Primitives of a walk."""


class Rehearsal:
    """Walks of *programs* that are third parties', each alone on *machine*, from *initial*."""

    def __init__(self, machine: ExploredHost, programs: Mapping[str, Program], initial: bytes) -> None:
        self.machine, self.initial = machine, initial
        self.programs = {name: program for name, program in programs.items() if program.anew is not None}
        self.walks: dict[str, list[tuple[Primitive, Any]]] = {}
        self.process = os.getpid()

    def walk(self, names: Iterable[str]) -> None:
        """Walk the parties *names*, once, and once more on other instances; DesignRaised where that is not the same."""
        for name in sorted(self.programs.keys() & set(names) - self.walks.keys()):
            self.walks[name] = self._walk(self.programs[name])
            self._again(name, anew=True)

    def repeat(self, names: Iterable[str]) -> None:
        """In another process: do the same. Raises DesignRaised where that is not what comes."""
        # The pool's processes are forked. In the first one there is nothing to compare with.
        if os.getpid() == self.process:
            return
        for name in sorted(self.walks.keys() & set(names)):
            self._again(name)
            walk = self.walks.pop(name)
            # Code that depends on an address or a hash seed does one thing in one process, and another in the next.
            for at, (now, then) in enumerate(zip(self._walk(self.programs[name]), walk, strict=False)):
                if now != then:
                    raise DesignRaised(f"{self.programs[name]} is not deterministic: after the same {at} results {then[0]} "
                                       f"came to {then[1]}, and in another process to {now[1]}")

    def _again(self, name: str, *, anew: bool = False) -> None:
        asked, path = [primitive for primitive, _ in self.walks[name]], [result for _, result in self.walks[name]]
        if path:                                        # what follows the last result may be what ended the walk
            generator, now = resume(self.programs[name], path[:-1], asked[:-1], anew=anew)
            if now != asked[-1]:
                raise differs(self.programs[name], len(path) - 1, asked[-1], now, generator)
            dismiss(self.programs[name], generator)

    def _walk(self, program: Program) -> list[tuple[Primitive, Any]]:
        walk: list[tuple[Primitive, Any]] = []
        try:
            self._take(program, walk)
        except StopIteration:
            pass
        except BadInput as error:
            if isinstance(error.__cause__, Endless):
                raise
        return walk

    def _take(self, program: Program, walk: list[tuple[Primitive, Any]]) -> None:
        shared = self.initial
        generator, primitive = resume(program, ())
        while primitive is not None and len(walk) < LONGEST:
            if primitive.name == "choose":
                result = primitive.args[1]
            else:
                outcomes = perform(self.machine, shared, program.number, primitive)
                if not outcomes or outcomes[0].result is STAY or self.machine.halted(outcomes[0].shared):
                    break
                result, shared = outcomes[0].result, outcomes[0].shared
            walk.append((primitive, result))
            primitive = send(program, generator, result)
        dismiss(program, generator)
