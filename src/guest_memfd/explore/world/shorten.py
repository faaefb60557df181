"""From a schedule of fifteen parties to the few steps that matter, as a trace like any other.

What is left out is tried: a whole party, then stretches of steps, shorter and shorter (Zeller and Hildebrandt, 2002). A step
that cannot be taken any more is passed over. Where what is left is small, the explorer has the last word: the shortest of
all runs of these parties.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from guest_memfd.explore.engine.finding import Finding, Step
from guest_memfd.explore.world.scenario import World
from guest_memfd.explore.world.walk import Stumble, Walks

FEW, MANY = 3, 200_000
"""Parties that are explored together, and states of them at most."""


def shortened(world: World, stumble: Stumble) -> Stumble:
    """*stumble* with as few parties and steps as were found to do; the same law breaks by the same evidence."""
    walks, finding = Walks(world), stumble.finding
    parties, steps = stumble.parties, finding.steps
    for name in stumble.parties:
        fewer = tuple(party for party in parties if party != name)
        shorter = _follow(walks, fewer, [step for step in steps if step.party != name], finding) if fewer else None
        if shorter is not None:
            parties, steps = fewer, shorter
    length = len(steps) // 2
    while length:
        at = 0
        while at < len(steps):
            shorter = _follow(walks, parties, steps[:at] + steps[at + length:], finding)
            if shorter is not None and len(shorter) < len(steps):
                steps = shorter
            else:
                at += length
        length //= 2
    # Who takes no step may still be needed at the end, where all have to be done.
    found = replace(stumble, parties=parties, finding=Finding(finding.law, finding.evidence, steps, world.initial))
    return _explored(world, found) if len(parties) <= FEW else found


# The run of *parties* that takes those of *steps* that can be taken, until what *wanted* says breaks; None if it does not.
def _follow(walks: Walks, parties: Sequence[str], steps: Sequence[Step], wanted: Finding) -> list[Step] | None:
    at = walks.start(walks.world.programs[name] for name in parties)
    broken = wanted.law, wanted.evidence
    for step in steps:
        if broken in at.broken:
            break
        if step.party not in parties:                   # the teardown's, which is judged at the end
            continue
        i = parties.index(step.party)
        like = step.choices, step.primitive, step.result, step.failed
        for way in at.ways(i):
            if (way.choices, way.primitive, way.result, way.failed) == like:
                at.take(i, way)
                break
    if broken in at.broken:
        return at.steps
    if any(at.ways(i) for i in range(len(parties))):
        return None
    return next((at.steps + more for *what, more in at.at_end() if tuple(what) == broken), None)


def _explored(world: World, stumble: Stumble) -> Stumble:
    wanted = stumble.finding
    names = [name for name in world.programs if name in stumble.parties]
    result = world.explorer(names, world.tables.empty()).run(max_states=MANY, max_steps=len(wanted.steps))
    for found in result.findings:
        if (found.law, found.evidence) == (wanted.law, wanted.evidence) and len(found.steps) <= len(wanted.steps):
            return replace(stumble, parties=tuple(names), finding=found)
    return stumble
