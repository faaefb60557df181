"""Drive one procedure alone on the abstract host, making the n-th thing that can fail fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from guest_memfd.abstract import AbstractHost
from guest_memfd.abstract import state as st
from guest_memfd.designs import Design
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.laws import LAWS, judging
from guest_memfd.words.primitives import Primitive, Steps
from guest_memfd.words.scene import Kernel, Scene

MERGING = Scene(kernel=Kernel(merges_leaves=True))
"""Two pages, on a kernel where restoring a page in the direct map may fail, too."""


class Bench:
    """A library on an abstract host under one hypervisor, its state, and every note since the beginning."""

    def __init__(
        self, hypervisor: str, design: type[Design] = OurLibrary, *, opened: bool = True, scene: Scene = MERGING,
    ) -> None:
        self.hypervisor = HYPERVISORS[hypervisor]
        self.library = design(self.hypervisor.ops(), scene.pages)
        self.library.scene = scene
        if design.large and scene.order:
            self.library.order, self.library.splits = scene.order, True
        self.machine = AbstractHost(self.hypervisor, scene, 1, bounds=design.bounds, errnos=design.errnos,
                                    resumes=design.resumes)
        self.shared = self.machine.initial()
        self.notes: list[Any] = []
        self.fail_at = -1
        self.failed = ""
        if opened:
            assert self.do(lambda lib: lib.create(scene.pages, scene.shared)) == 0
            for slot in scene.slots:
                assert self.do(lambda lib, slot=slot: lib.bind(slot.gfn, slot.start, slot.nr)) == 0

    @property
    def state(self) -> st.State:
        return st.State(self.shared)

    def do(self, procedure: Callable[[Design], Steps[Any]], *, takes: int = 0) -> Any:
        """Run to the end; AssertionError when it would wait, or the kernel panics.

        Or when it leaves more than *takes* references of look-ups.
        """
        most = self._lookups() + takes
        generator = procedure(self.library)
        result: Any = None
        while True:
            try:
                primitive = generator.send(result)
            except StopIteration as stop:
                assert self._lookups() <= most, "a reference of a look-up is left"
                return stop.value
            result = self._perform(primitive)
            assert not self.machine.halted(self.shared), f"panic in {primitive}: {self.notes[-1]}"

    def _lookups(self) -> int:
        return sum(frame.lookup for frame in self.state.frames())

    def _perform(self, primitive: Primitive) -> Any:
        state = self.state
        state.failures = 1
        outcomes = self.machine.outcomes(state.save(), 0, primitive)
        assert outcomes, f"{primitive} waits for ever"
        outcome = outcomes[0]
        if len(outcomes) > 1:
            if self.fail_at == 0:
                outcome, self.failed = outcomes[1], str(primitive)
            self.fail_at -= 1
        self.shared = outcome.shared
        self.notes += outcome.notes
        return outcome.result

    def evidence(self) -> list[str]:
        """What the laws say of everything that has happened, and of the state now."""
        found = [f"{law.name}: {e}" for law in LAWS.values() for note in self.notes if (e := law.on_note(note))]
        judged = judging(type(self.library), LAWS.values())
        return found + [f"{law.name}: {e}" for law in judged if (e := law.in_state(self.shared))]

    def at_end(self) -> list[str]:
        """What the laws say of the state as the end of the world."""
        return [f"{law.name}: {e}" for law in LAWS.values() if (e := law.at_end(self.shared))]
