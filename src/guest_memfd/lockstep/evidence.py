"""A counterexample on the emulated machine: the same law, and what a kernel developer would look at.

Everything printed is read from the machine in which the trace has just ended: descriptors, EL2's records, the kernel log.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from guest_memfd.explore.replay import Replay, replay
from guest_memfd.explore.trace import Trace
from guest_memfd.explore.world.scenario import World
from guest_memfd.lockstep.refinement import Pair, kernel_of, pair
from guest_memfd.machine.boot import Config, Machine
from guest_memfd.machine.hw.arm64.descriptor import describe
from guest_memfd.words.pagestate import GONE
from guest_memfd.words.units import gpa_to_gfn

APART = 512
"""Pages between the frames of the scene: each lies in a 2 MiB leaf of its own, so that splitting can fail for each."""


@dataclass
class OnMachine:
    """A trace replayed on the abstract host and on the machine of `both`."""

    again: Replay
    both: Pair

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
        machine = host.machine
        for number, pa in enumerate(machine.watched):
            s1 = machine.linear_map.leaf(pa)
            yield f"pfn{number} at {pa:#x}"
            yield f"  stage 1   {describe(s1.value, s1.level, 1)} = {s1.value:#018x}"
            reached = "lets the host touch it" if machine.driver.host_may(pa) else "withheld from the host"
            yield f"  stage 2   {reached}, owner {machine.driver.owner(pa)}"
            if host.vm.state != GONE and (ipa := machine.driver.ipa_of(host.vm, pa)) is not None:
                yield f"  guest     IPA {ipa:#x} (gfn {gpa_to_gfn(ipa)})"
            yield f"  holds     {machine.ram.read(pa, 8).hex(' ')}"
        yield from machine.console


def on_machine(trace: Trace) -> OnMachine:
    """Replay *trace* on the emulated arm64 machine beside the abstract host.

    Raises BadInput when the scene cannot be set, HostUnavailable when nothing can execute instructions.
    """
    made: list[Pair] = []

    def beside(world: World) -> Pair:
        # Frames far apart, each in a large leaf of its own: then every zap of the trace has a leaf to split, and can
        # fail where the trace says so.
        config = Config(ram=32 << 20, apart=APART, bbml3=True, sea_fixup=world.design.sea_fixup, **kernel_of(world.scene))
        made.append(pair(world, Machine(world.hypervisor.name, config), trace.failures))
        return made[0]

    return OnMachine(replay(trace, beside=beside), made[0])
