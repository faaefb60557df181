"""The same sequence on both, and the first step whose answers differ without a known reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from guest_memfd.conform.known import KNOWN, KnownDifference
from guest_memfd.conform.operations import OPERATIONS, UserCall
from guest_memfd.conform.sequence import Sequence
from guest_memfd.conform.subject import Performing, StepAnswer
from guest_memfd.errors import InternalError
from guest_memfd.machine.linux.panic import KernelPanic

Known = tuple[KnownDifference, ...]


class Difference(NamedTuple):
    """The last step of *sequence* is answered in two ways."""

    sequence: Sequence
    real: StepAnswer
    emulated: StepAnswer

    @property
    def step(self) -> UserCall:
        """The one that is answered in two ways."""
        return self.sequence[-1]


@dataclass
class Tally:
    """What came of all sequences so far: how many *steps* were compared, *known* differences by name, the others."""

    steps: int = 0
    sequences: int = 0
    by_operation: Counter[str] = field(default_factory=Counter)
    known: Counter[str] = field(default_factory=Counter)
    differences: list[Difference] = field(default_factory=list)


class Answering(Protocol):
    """Who is at work on a sequence."""

    def answers(self) -> list[StepAnswer]:
        """One for each step, fewer if the process died: then the last says of what."""


class ProcessHost(Protocol):
    """An emulated machine, on which one process lives after the other."""

    def subject(self) -> Performing:
        """A new process, with nothing open."""

    def renew(self) -> None:
        """Something went wrong: the next process runs on another machine."""


class BothHosts:
    """A real kernel, which *real* puts to work on a sequence, and the emulated *world*; what is *known* to differ."""

    def __init__(self, real: Callable[[Sequence], Answering], world: ProcessHost, known: Known = KNOWN) -> None:
        self.real, self.world, self.known = real, world, known

    def compare(self, sequence: Sequence, tally: Tally, *, resume: bool = False) -> Difference | None:
        """Run *sequence* on both, count into *tally*, and return the first difference without a known reason.

        resume: go on after a known difference, as where the next steps make the state anew.
        """
        child = self.real(sequence)                     # runs while this process emulates
        try:
            emulated = self._emulate(sequence)
        finally:
            real = child.answers()
        tally.sequences += 1
        uncompared = 0                                  # steps that make the state anew after a known difference
        # The real half may have died: it is compared as far as it came, and its last answer names the signal.
        for at, (step, ours, theirs) in enumerate(zip(sequence, emulated, real, strict=False)):
            if theirs.said.startswith("our own failure"):
                raise InternalError(f"{step}: {theirs.said}")
            tally.steps += 1
            tally.by_operation[step.op] += 1
            uncompared -= 1
            if ours == theirs or uncompared >= 0:
                continue
            why = next((each for each in self.known if each.about(step, theirs, ours)), None)
            if why is None:
                return Difference(sequence[:at + 1], theirs, ours)
            tally.known[why.name] += 1
            if not resume:
                break
            uncompared = len(OPERATIONS[step.op].undo or ())
        return None

    # What is left at the end is a difference, too: that of the last step.
    def _emulate(self, sequence: Sequence) -> list[StepAnswer]:
        subject, answers, left = self.world.subject(), list[StepAnswer](), list[str]()
        try:
            for step in sequence:
                answers.append(subject.perform(step))
            left = subject.end()
        except KernelPanic as panic:
            self.world.renew()
            # A panic while everything is closed comes after the last answer. It
            # takes that one's place: there is no step to blame it on.
            return [*answers[:len(sequence) - 1], StepAnswer(f"the emulated kernel stops: {panic.text.splitlines()[0]}", "")]
        except BaseException:
            self.world.renew()
            raise
        if left:
            self.world.renew()
            # On the last step as well: shrinking leaves out all others, and so never loses this.
            answers[-1] = StepAnswer(f"{answers[-1].said}; then everything is closed, and {left[0]}", answers[-1].files)
        return answers
