"""Refinement: the same schedule on the abstract and on the emulated host, compared after every primitive.

Theory of operation. Verdicts are about the abstract host: a few bytes a page, small enough to explore every interleaving.
They are worth something only if the abstract host allows everything that a machine does. This file checks that. The same
procedures run on both hosts at once: each primitive is carried out on the abstract host, which works on a bytes object, and
on the emulated machine, which has page tables, TLBs, EL2 and instructions. After each primitive three things must be equal:

    the result     what the procedure is sent, negative errnos included
    the facts      what the laws are told: who touched what, what an operation returned
    the state      the machine's, as abstraction.py reads it, against the abstract one, byte by byte

The first difference raises `Diverged`, with the step, the field, and the last steps before it. This is a simulation
proof by testing: the relation between the two states is a function (the abstraction), and it is checked at every step of
random schedules, not proved for all.

The abstract host leads. It says which outcomes are allowed; one is chosen; the machine has to do just that. A failure is
injected only where the machine can really fail as it is now (`Adversary.can_fail`), for example where a large leaf still has
to be split. So the machine may do less than the abstract host allows, never more.

Order within a step: first the adversary lets all CPUs fill their TLBs with whatever they may (`speculate`), then the
failure is armed, then the primitive runs on the machine. TLBs are filled before the primitive and not after it, as the
worst moment to walk is just before an entry changes: a flush that is missing then leaves a stale entry, and the field
``stale`` or ``gstale`` differs. A party that has to wait must wait on both hosts.

Frames have numbers on the abstract host and addresses on the machine; singles.py translates arguments and results, and in
scenes with large folios blocks.py. Facts are compared in an order of their own, and without the words that are each host's
evidence.

A run ends early when the kernel has stopped, and when a guest reaches memory that is not its own: the abstract host lets
such a guest change nothing, the machine does what it does, and the two would drift apart.

Left out: scenes of two VMs or two files, of folios of four pages, kernels that do not ask AS_NO_DIRECT_MAP (`unfit`), and
kernels that merge leaves. Schedules are random, so a pair of steps that differ only in a rare order can be missed; that they
are not is what the other direction of tests is for: tests/test_abstraction.py sets each field of the state to 0 in turn and
expects a divergence. tests/test_refinement.py runs every design under every hypervisor, and all scenes of single pages that
fit; tests/test_refinement_blocks.py the others.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from guest_memfd.abstract import state as st
from guest_memfd.errors import BadInput, GuestMemfdError
from guest_memfd.explore.world.scenario import World, set_scene
from guest_memfd.laws import LAWS
from guest_memfd.lockstep.abstraction import abstraction
from guest_memfd.lockstep.blocks import Blocks, Unlike
from guest_memfd.lockstep.halves import SHARE
from guest_memfd.lockstep.singles import Singles
from guest_memfd.machine.adversary import Adversary
from guest_memfd.machine.boot import Machine
from guest_memfd.machine.linux.panic import KernelPanic
from guest_memfd.machine.primitives.host import EmulatedHost
from guest_memfd.words import facts
from guest_memfd.words.outcome import STAY, Blocked, Outcome
from guest_memfd.words.primitives import SILENT, Primitive, Steps
from guest_memfd.words.scene import Scene


class Diverged(GuestMemfdError):  # noqa: N818 - named after what happened
    """The two hosts do not agree; the message says in which step, and on what."""


@dataclass
class Pair:
    """Both hosts, in the same state, and what has happened to them."""

    world: World
    host: EmulatedHost
    adversary: Adversary
    machine: Singles | Blocks                                     # the same machine, as the abstract host speaks of it
    shared: bytes = b""
    steps: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)         # law -> first evidence, from the emulated side
    ended: str = ""                                               # why nothing more can happen: a panic, a stray guest

    # -- one primitive on both -----------------------------------------------------------------------------------

    def blocked(self, who: int, primitive: Primitive) -> bool:
        """Whether *primitive* has to wait; both hosts must say the same."""
        if self.world.machine.outcomes(self.shared, who, primitive):
            return False
        try:
            # It must wait here, too: a lock that the machine grants and the abstract host does not would be an
            # interleaving that was never explored.
            result = self.machine.perform(primitive, who)
        except Blocked:
            return True
        raise self._diverged(who, primitive, f"waits on the abstract host, returns {result!r} on the emulated one")

    def outcomes(self, who: int, primitive: Primitive) -> list[Outcome]:
        """What the abstract host allows and the emulated machine can do."""
        allowed = self.world.machine.outcomes(self.shared, who, primitive)
        # The abstract host lets any fallible call fail. The machine can fail only where there is something to fail:
        # an allocation, a leaf to split.
        if len(allowed) > 1 and not self.adversary.can_fail(self.host, self.machine.real(primitive)):
            return allowed[:1]
        return allowed

    def step(self, who: int, primitive: Primitive, outcome: Outcome) -> Any:
        """Carry *primitive* out on both, as *outcome* has it; the result. Raises Diverged."""
        self.steps.append(f"{who} {primitive}{' fails' if outcome.failed else ''}")
        # Before the primitive: the worst moment for a CPU to walk is just before the entry changes. What its TLB has
        # then is stale until someone flushes it, and both hosts must say so.
        self.adversary.speculate(self.host)
        if outcome.failed:
            if not self.adversary.can_fail(self.host, self.machine.real(primitive)):
                raise self._diverged(who, primitive, "cannot fail on the emulated machine as it is now")
            # Armed for exactly this primitive, so that the machine fails where the abstract host has chosen to.
            self.machine.arm(primitive, outcome.result)
        try:
            result = self.machine.perform(primitive, who, fails=outcome.failed)
        except Unlike as one:
            raise self._diverged(who, primitive, str(one)) from None
        except Blocked:
            raise self._diverged(who, primitive, "waits on the emulated host only") from None
        # No result: the kernel has stopped, and the state, compared below, must say so.
        except KernelPanic:
            result = None
        self._compare(who, primitive, outcome, result)
        self.shared = outcome.shared
        self._judge()
        return result

    def abstracted(self, shared: bytes) -> bytes:
        """The state that the machine is in; what may still be injected is the scheduler's to know, and is in *shared*."""
        left = st.State(shared)
        return abstraction(self.host, self.world.machine.sizes, left.failures, left.given, left.refusals)

    def _compare(self, who: int, primitive: Primitive, outcome: Outcome, result: Any) -> None:
        if result is not outcome.result and result != outcome.result:
            raise self._diverged(who, primitive, f"returns {outcome.result!r} on the abstract host, {result!r} here")
        # Sorted: within one step the two hosts may note facts in different orders, and the laws judge each by itself.
        said, seen = _comparable(outcome.notes), _comparable(self.machine.notes)
        if said != seen:
            raise self._diverged(who, primitive, f"abstract facts {said}\n  emulated facts {seen}")
        now = self.abstracted(outcome.shared)
        stray = any(isinstance(note, facts.StrayGuest) for note in outcome.notes)
        # The machine's state is read anew from RAM, tables and TLBs. Nothing that lock step has remembered can make
        # it agree.
        if now != outcome.shared and not stray:
            differences = ", ".join(f"{name}: abstract {old}, emulated {new}"
                                    for name, old, new in st.changes(outcome.shared, now))
            raise self._diverged(who, primitive, differences)
        self._alike(who, primitive, now, stray=stray)
        # The abstract host lets a stray guest read and write nothing; from here on the two would drift apart.
        if stray:
            self.ended = "a guest strayed"
        elif self.world.machine.halted(outcome.shared):
            self.ended = "the kernel has stopped"

    def _alike(self, who: int, primitive: Primitive, now: bytes, *, stray: bool) -> None:
        for difference in () if stray or self.host.machine.dead else self.machine.unlike(now):
            raise self._diverged(who, primitive, difference)

    def all_alike(self) -> None:
        """Raise Diverged where, of the pages that are one page of the scene, any is not like the one that is compared."""
        for difference in () if self.ended else self.machine.unlike(self.abstracted(self.shared), thorough=True):
            raise Diverged(f"{self.world.design.name} on {self.world.hypervisor.name}, {self.host.machine}, in the end:\n"
                           f"  {difference}")

    # The state is the machine's as well: they have just been compared.
    def _judge(self) -> None:
        for law in self.world.laws:
            words = [law.in_state(self.shared), *map(law.on_note, self.machine.notes)]
            for evidence in words:
                if evidence is not None:
                    self.broken.setdefault(law.name, evidence)

    def _diverged(self, who: int, primitive: Primitive, what: str) -> Diverged:
        last = "\n  ".join(self.steps[-12:])
        return Diverged(f"{self.world.design.name} on {self.world.hypervisor.name}, {self.host.machine}: party {who}, "
                        f"{primitive}:\n  {what}\nafter\n  {last}")


# Facts in an order of their own, and without the words that say why: those are each host's evidence.
def _comparable(notes: Sequence[Any]) -> list[str]:
    return sorted(repr(f._replace(why="") if isinstance(f, facts.Abort) else f) for f in notes)


@dataclass
class Runner:
    """A party on its way: its number, its procedure, and the primitive it wants next (None: it has ended).

    pace: how fast it is beside the others; without differences, short parties would always be over early.
    """

    number: int
    procedure: Steps[Any]
    pending: Primitive | None = None
    pace: float = 1.0

    def resume(self, result: Any, choose: Callable[[Sequence[Any]], Any]) -> None:
        """Let it go on with *result* up to its next primitive."""
        try:
            self.pending = self.procedure.send(result)
            while self.pending.name == "choose":
                self.pending = self.procedure.send(choose(self.pending.args[1:]))
        except StopIteration:
            self.pending = None


def unfit(scene: Scene) -> str | None:
    """Why no machine can be put into *scene*, in words; None where one can."""
    if scene.files > 1 or scene.vms > 1:
        return "a machine beside the abstract host has one file and one VM"
    if scene.order > 1:
        return "a machine has no folios, and no leaves, between 2M and 1G"
    if not scene.kernel.asks_mapping:
        return "readers of the emulated kernel ask AS_NO_DIRECT_MAP"
    return None


def kernel_of(scene: Scene) -> dict[str, Any]:
    """How the machine for *scene* has to be configured (machine/boot.py Config).

    It never merges leaves. So putting a page back splits none and cannot fail; what a kernel that merges may do is not seen.
    """
    # There are blocks in the linear map only of a kernel that can split them.
    blocks = {"blocks": scene.frames // 2, "release": "7.3", "bbml3": True}
    return {**(blocks if scene.order else {"scattered": scene.frames}),
            "rodata": "full" if scene.kernel.changes_direct_map else "noalias",
            "on_free": "poison" if scene.kernel.init_on_free else "nothing"}


def pair(world: World, machine: Machine, failures: int = 0) -> Pair:
    """Both hosts in the scene of *world*, as the explorer's initial state; *failures* may be injected then.

    Raises BadInput where no machine can be put into that scene.
    """
    scene, why = world.scene, unfit(world.scene)
    if why is not None:
        raise BadInput(f"scene {scene.name!r} is none for a machine: {why}")
    if scene.order and not world.library.splits:
        raise BadInput(f"scene {scene.name!r} is one of large folios, and design {world.design.name!r} has none")
    share = SHARE if scene.order else 1
    vm = machine.create_vm(scene.guest_frames * share)
    host = EmulatedHost(machine, vm, scene.pages * share, tasks=world.machine.tasks, scene=scene, bounds=world.design.bounds,
                        errnos=world.design.errnos, resumes=world.design.resumes)
    spoken = (Blocks if scene.order else Singles)(host, machine.adversary)
    both = Pair(world, host, machine.adversary, spoken, world.machine.initial())
    if scene.made:
        alone(both, Runner(world.setting, set_scene(world.library)))
    both.steps.clear()
    state = st.State(both.shared)
    # Only now: setting the scene must not spend the failures that the run is to have.
    state.failures, state.given, state.refusals = failures, failures, scene.refusals
    both.shared = state.save()
    return both


def alone(both: Pair, runner: Runner) -> None:
    """Drive one procedure to its end with no one else around and no failures."""
    runner.resume(None, lambda options: options[0])
    while runner.pending is not None and not both.ended:
        primitive = runner.pending
        if both.blocked(runner.number, primitive):
            return
        outcome = both.outcomes(runner.number, primitive)[0]
        result = both.step(runner.number, primitive, outcome)
        if result is not STAY:
            runner.resume(result, lambda options: options[0])


def run(both: Pair, names: Sequence[str], rng: random.Random) -> int:
    """One random schedule of the parties *names*, then the end of the world: how many steps. Raises Diverged."""
    world = both.world
    runners = [Runner(world.programs[n].number, world.programs[n].start()) for n in names]
    for runner in runners:
        runner.pace = 10 ** rng.uniform(-2, 0)
        runner.resume(None, rng.choice)
    while not both.ended and _turn(both, [r for r in runners if r.pending is not None], rng):
        pass
    both.all_alike()
    if not both.ended and not any(r.pending for r in runners):
        alone(both, Runner(world.teardown.number, world.teardown.start()))
        if not both.ended:
            end = both.abstracted(both.shared)
            for law in LAWS.values():
                evidence = law.at_end(end)
                if evidence is not None:
                    both.broken.setdefault(law.name, evidence)
    return len(both.steps)


# One step of a party that can move, silent primitives and all; False when no one can.
def _turn(both: Pair, runners: list[Runner], rng: random.Random) -> bool:
    for runner in sorted(runners, key=lambda r: rng.expovariate(r.pace)):
        moved = False
        while runner.pending is not None and not both.ended:
            primitive = runner.pending
            if both.blocked(runner.number, primitive):
                break
            outcomes = both.outcomes(runner.number, primitive)
            outcome = rng.choice(outcomes[1:]) if len(outcomes) > 1 and rng.random() < 0.1 else outcomes[0]
            result = both.step(runner.number, primitive, outcome)
            moved = True
            if result is not STAY:
                runner.resume(result, rng.choice)
            # Silent primitives and the step that follows are one step to others, as the explorer has it.
            if primitive.name not in SILENT:
                break
        if moved:
            return True
    return False
