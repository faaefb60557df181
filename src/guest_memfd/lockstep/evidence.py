"""A counterexample on the emulated machine: the same law, and what a kernel developer would look at.

Everything printed is read from the machine in which the trace has just ended: descriptors, EL2's records, the kernel log.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from guest_memfd.explore.engine.finding import Step
from guest_memfd.explore.replay import Replay, replay
from guest_memfd.explore.trace import Trace
from guest_memfd.explore.world.scenario import World
from guest_memfd.lockstep.refinement import Pair, kernel_of, pair
from guest_memfd.machine.boot import Config, Machine
from guest_memfd.machine.hw.arm64.descriptor import describe
from guest_memfd.machine.primitives.host import EmulatedHost
from guest_memfd.words.pagestate import GONE
from guest_memfd.words.units import Pa, gpa_to_gfn

APART = 512
"""Pages between the frames of the scene: each lies in a 2 MiB leaf of its own, so that splitting can fail for each."""


@dataclass
class OnMachine:
    """A trace replayed on the abstract host and on the machine of `both`."""

    again: Replay
    both: Pair
    notes: Mapping[int, Sequence[str]]
    """Number of a step -> what it did, in lines (`StepByStep`)."""

    @property
    def same(self) -> bool:
        """Whether the machine took every step, and the law that breaks is broken there, too."""
        return self.again.same and (self.again.trace.law in self.both.broken or not self._judged_on_the_way)

    # Deadlocks and what is left at the end of the world are said of states, which are the same on both hosts.
    @property
    def _judged_on_the_way(self) -> bool:
        return self.again.trace.law not in ("progress", "nothing-lost")

    def evidence(self) -> str:
        """In the machine's own words, what broke the law."""
        return self.both.broken.get(self.again.trace.law, self.again.trace.evidence)

    def lines(self) -> Iterator[str]:
        """Entries and records of every frame of the scene, and the kernel log."""
        host = self.both.host
        for number, pa in enumerate(host.machine.watched):
            yield f"pfn{number} at {pa:#x}"
            yield from (f"  {what:<9} {words}" for what, words in entries(host, pa))
            yield f"  holds     {host.machine.ram.read(pa, 8).hex(' ')}"
        yield from host.machine.console


def entries(host: EmulatedHost, pa: Pa) -> Iterator[tuple[str, str]]:
    """What stage 1, stage 2 and the guest's tables say of the frame at *pa*, each with its name."""
    machine = host.machine
    s1 = machine.linear_map.leaf(pa)
    yield "stage 1", f"{describe(s1.value, s1.level, 1)} = {s1.value:#018x}"
    reached = "lets the host touch it" if machine.driver.host_may(pa) else "withheld from the host"
    yield "stage 2", f"{reached}, owner {machine.driver.owner(pa)}"
    if host.vm.state != GONE and (ipa := machine.driver.ipa_of(host.vm, pa)) is not None:
        yield "guest", f"IPA {ipa:#x} (gfn {gpa_to_gfn(ipa)})"


class StepByStep:
    """What each step of a replay does to the machine: entries that it changes, and lines of the kernel log.

    notes: number of the step, from 1 -> lines; a step that does neither is not there.
    """

    def __init__(self, host: EmulatedHost) -> None:
        self.notes: dict[int, list[str]] = {}
        self._host, self._number = host, 0
        self._entries, self._logged = self._look(), len(host.machine.console)

    def taken(self, _step: Step) -> None:
        """Note what has changed since the last step."""
        self._number += 1
        now, console = self._look(), self._host.machine.console
        changed = [f"{what}  {words}" for what, words in now.items() if self._entries.get(what) != words]
        gone = [f"{what}  nothing" for what in self._entries if what not in now]
        if lines := [*changed, *gone, *console[self._logged:]]:
            self.notes[self._number] = lines
        self._entries, self._logged = now, len(console)

    def _look(self) -> dict[str, str]:
        return {f"pfn{number} {what}": words for number, pa in enumerate(self._host.machine.watched)
                for what, words in entries(self._host, pa)}


def on_machine(trace: Trace) -> OnMachine:
    """Replay *trace* on the emulated arm64 machine beside the abstract host.

    Raises BadInput when the scene cannot be set, HostUnavailable when nothing can execute instructions.
    """
    made: list[tuple[Pair, StepByStep]] = []

    def beside(world: World) -> Pair:
        # Frames far apart, each in a large leaf of its own: then every zap of the trace has a leaf to split, and can
        # fail where the trace says so.
        config = Config(**{"ram": 32 << 20, "apart": APART, "bbml3": True, "sea_fixup": world.design.sea_fixup,
                           **kernel_of(world.scene)})
        both = pair(world, Machine(world.hypervisor.name, config), trace.failures)
        made.append((both, StepByStep(both.host)))
        return both

    again = replay(trace, beside=beside, seen=lambda step: made[0][1].taken(step))
    both, watched = made[0]
    return OnMachine(again, both, watched.notes)
