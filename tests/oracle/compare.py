"""Our walker against another MMU, and what is known to differ."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

from oracle.format import Ok, Probe, Probes, Refused
from oracle.scenes import Scene

from guest_memfd.machine.hw.arm64 import walk as walker
from guest_memfd.machine.hw.arm64.fault import ADDRESS_SIZE, Fault
from guest_memfd.machine.hw.arm64.walk import Memory, Stage1, Stage2

NO_ADDRESS_SIZE = "QEMU 5.0 raises no address size faults"
S1PTW_CODE = "QEMU 5.0 gives another status code to stage-2 faults on a stage-1 walk"
MODES = (("r", 1), ("w", 1), ("r", 0), ("w", 0))


class Mmu(Protocol):
    def load(self, registers: dict[str, int]) -> None: ...

    def translate(self, vas: list[int], access: str, el: int) -> list[int]: ...


@dataclass
class Tally:
    """Counts of probes by outcome, of explained differences by name, and the others in full."""

    outcomes: Counter[str] = field(default_factory=Counter)
    explained: Counter[str] = field(default_factory=Counter)
    different: list[str] = field(default_factory=list)

    @property
    def probes(self) -> int:
        return sum(self.outcomes.values())

    def __str__(self) -> str:
        lines = [f"{self.probes} probes, {len(self.different)} unexplained differences"]
        lines += [f"  {count:8} {what}" for what, count in sorted(self.outcomes.items())]
        lines += [f"  {count:8} explained: {what}" for what, count in sorted(self.explained.items())]
        return "\n".join(lines + self.different[:8])


# PAR_EL1 as an implementation would answer: PA[47:12], or F, FST, PTW and S.
def expected(memory: Memory, va: int, access: str, el: int, s1: Stage1, s2: Stage2 | None) -> tuple[int, Fault | None]:
    try:
        return walker.walk(memory, va, access, el, s1, s2).pa & ~0xfff, None  # type: ignore[arg-type]
    except Fault as fault:
        return 1 | fault.fsc << 1 | fault.s1ptw << 8 | (fault.stage == 2) << 9, fault


_OK, _FAULT = (1 << 48) - (1 << 12), 1 | 63 << 1 | 3 << 8


def judge(tally: Tally, ours: int, fault: Fault | None, par: int, describe: str) -> None:
    theirs = par & (_FAULT if par & 1 else _OK)
    tally.outcomes["ok" if fault is None else
                   f"{fault.kind} stage {fault.stage}{' on a stage-1 walk' if fault.s1ptw else ''}"] += 1
    if ours == theirs:
        return
    if fault is not None and fault.kind == ADDRESS_SIZE:
        tally.explained[NO_ADDRESS_SIZE] += 1
    elif fault is not None and fault.s1ptw and (ours ^ theirs) & ~(63 << 1) == 0:
        tally.explained[S1PTW_CODE] += 1
    else:
        tally.different.append(f"{describe}: ours {fault or hex(ours)}, theirs PAR {par:#x}")


def compare(scene: Scene, other: Mmu, count: int, tally: Tally) -> None:
    """*count* probes of one scene, in all four modes of AT."""
    other.load(scene.registers())
    memory, s1, s2 = scene.ram, scene.s1, scene.s2
    for access, el in MODES:
        vas = scene.vas(count // len(MODES))
        for va, par in zip(vas, other.translate(vas, access, el), strict=True):
            ours, fault = expected(memory, va, access, el, s1, s2)
            judge(tally, ours, fault, par, f"{access} EL{el} {va:#x} {s1.tcr} {s2 and s2.vtcr}"
                  if ours != par & (_FAULT if par & 1 else _OK) else "")


def to_probes(scene: Scene, vas: list[int], low: int, high: int) -> Probes:
    """A scene as a file: every word of [low, high) that is not zero, and the answers of our walker."""
    words = {at: value for at in range(low, high, 8) if (value := scene.ram.read64(at))}
    file = Probes(scene.registers(), words)
    for va in vas:
        for access, el in MODES:
            file.probes.append(Probe(va, access, el))
            try:
                file.answers.append(Ok(walker.walk(scene.ram, va, access, el, scene.s1, scene.s2).pa))  # type: ignore[arg-type]
            except Fault as fault:
                file.answers.append(Refused(fault.fsc, fault.stage, fault.s1ptw))
    return file
