"""Runs in the Trace Event Format (JSON), which Perfetto and chrome://tracing open.

A counterexample has a track for each party; a step takes a thousand units, because the explorer knows an order and no time.
A run of a guest has for each CPU of the host a track for whose code asks (library, driver, mm, user, guest), and real
microseconds. Operations are slices, and the primitives in them slices below. Counters: direct-map writes, TLB flushes,
hypercalls, leaf splits.

Source: "Trace Event Format", the phases M (names), B and E (begin, end), X (complete), i (instant), C (counter).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from guest_memfd.abstract import show
from guest_memfd.abstract import state as st
from guest_memfd.report import steps as said
from guest_memfd.report.counterexample import Counterexample
from guest_memfd.words.primitives import OPS, Primitive

Event = dict[str, Any]
STEP = 1000
"""Microseconds that stand for a step."""
COUNTED = {
    "set_direct_map_invalid_noflush": "direct-map writes", "set_direct_map_default_noflush": "direct-map writes",
    "flush_tlb_kernel_range": "TLB flushes", "hyp_call": "hypercalls",
}
"""Primitive -> the counter that it moves."""
SPLITS = "leaf splits"
_PID = 1


def counterexample(example: Counterexample) -> dict[str, Any]:
    """The whole file of a counterexample."""
    finding = example.finding
    parties = list(dict.fromkeys([*example.parties, *(step.party for step in finding.steps)]))
    title = f"{example.design} on {example.hypervisor}: {finding.law} is broken"
    return _file([*_named(_PID, title, parties), *_of_steps(example, parties)], {
        "law": finding.law, "evidence": finding.evidence, "scene": example.scene.name})


def _file(events: list[Event], about: Mapping[str, str]) -> dict[str, Any]:
    return {"displayTimeUnit": "ms", "otherData": dict(about), "traceEvents": events}


def _named(pid: int, process: str, tracks: Sequence[str]) -> Iterator[Event]:
    yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": process}}
    for number, name in enumerate(tracks, 1):
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": number, "args": {"name": name}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": number, "args": {"sort_index": number}}


def _of_steps(example: Counterexample, parties: list[str]) -> Iterator[Event]:
    finding = example.finding
    names = said.lock_holders(finding.steps, finding.initial)
    tracks = {number: 1 + parties.index(name) for number, name in names.items()}
    counters = dict.fromkeys((*COUNTED.values(), SPLITS), 0)
    under_way: dict[int, str] = {}
    before, at = finding.initial, 0
    for at, step in enumerate(finding.steps):
        track = {"pid": _PID, "tid": 1 + parties.index(step.party)}
        changed = [(_number(name), new) for name, _, new in st.changes(before, step.shared)
                   if show.ghost(name) and name.endswith(".op")]
        begun = [(number, OPS[new - 1]) for number, new in changed if new and number in tracks]
        for number, op in begun:
            # Its end and this begin are in one step, in which the ghost goes
            # from one operation to the next and is never 0.
            if number in under_way:
                yield {"ph": "E", "pid": _PID, "tid": tracks[number], "ts": at * STEP}
            under_way[number] = op
            yield {"ph": "B", "name": op, "pid": _PID, "tid": tracks[number], "ts": at * STEP}
        call = step.primitive.name if step.primitive else "done"
        told = {"call": said.action(step), "changed": show.changed(before, step.shared, names),
                "notes": [*said.told_of(step, before)]}
        yield {"ph": "X", "name": call, "cat": step.primitive.caller if step.primitive else "party", **track,
               "ts": at * STEP, "dur": STEP, "args": {**told, "step": at + 1, "injected failure": step.failed}}
        if call in COUNTED and not step.failed:
            counters[COUNTED[call]] += 1
            yield _counter(COUNTED[call], counters[COUNTED[call]], at * STEP)
        split = sum(max(new - old, 0) for name, old, new in st.changes(before, step.shared) if name.endswith(".splits"))
        if split:
            counters[SPLITS] += split
            yield _counter(SPLITS, counters[SPLITS], at * STEP)
        for number in (number for number, new in changed if not new and number in under_way):
            del under_way[number]
            yield {"ph": "E", "pid": _PID, "tid": tracks[number], "ts": (at + 1) * STEP}
        before = step.shared
    end = (at + 1) * STEP if finding.steps else 0
    for number in under_way:
        yield {"ph": "E", "pid": _PID, "tid": tracks[number], "ts": end}
    yield {"ph": "i", "name": f"{finding.law} is broken", "s": "g", "pid": _PID, "tid": 0, "ts": end,
           "args": {"evidence": finding.evidence}}


def _number(ghost: str) -> int:
    return int(ghost.partition(".")[0].removeprefix("party"))


def _counter(name: str, value: int, ts: float) -> Event:
    return {"ph": "C", "name": name, "pid": _PID, "tid": 0, "ts": ts, "args": {name: value}}


class Recorder:
    """Notes every primitive of a run as it ends; `file` is what it was told.

    Only the ends are known. A primitive within an operation lasts from the one before it, which is nearly true, because
    nothing else runs there; outside of operations it is as short as can be shown. splits: how many leaves have been split;
    cpu: on which CPU of the host it is.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._began = clock, clock()
        self._tracks: dict[str, int] = {}
        self._events: list[Event] = []
        self._counters = dict.fromkeys((*COUNTED.values(), SPLITS), 0)
        self._open: dict[str, list[Event]] = {}
        self._last = 0.0
        self.splits: Callable[[], int] = lambda: 0
        self.cpu: Callable[[], int] = lambda: 0

    def __call__(self, primitive: Primitive) -> None:
        """*primitive* has just ended."""
        now, where = self._now(), self._where(primitive.caller)
        running = self._open.setdefault(primitive.caller, [])
        if primitive.name == "begin_op":
            running.append({"ph": "B", "name": str(primitive.args[0]), **where, "ts": now, "args": {"call": str(primitive)}})
            self._events.append(running[-1])
        elif primitive.name == "end_op":
            if running:
                self._events.append(_end(running.pop(), now) | {"args": {"call": str(primitive)}})
        else:
            start = max(self._last, running[-1]["ts"] if running else now - 1)
            self._events.append({"ph": "X", "name": primitive.name, "cat": primitive.caller, **where, "ts": start,
                                 "dur": round(now - start, 3)})
            self._count(primitive.name, now)
        self._last = now

    def exit(self, words: str) -> None:
        """The vCPU has come back to the VMM."""
        self._events.append({"ph": "i", "name": words, "s": "t", **self._where("vCPU exits"), "ts": self._now()})

    def file(self, about: Mapping[str, str]) -> dict[str, Any]:
        """The whole file; *about*: what was run."""
        now = self._now()
        closed = [_end(begun, now) for running in self._open.values() for begun in reversed(running)]
        cpus = sorted({event["pid"] for event in self._events} | {_PID})
        names = [name for pid in cpus
                 for name in _named(pid, f"CPU {pid - _PID}: {about.get('run', 'gmem run')}", list(self._tracks))]
        return _file([*names, *self._events, *closed], about)

    def _now(self) -> float:
        return round((self._clock() - self._began) * 1e6, 3)

    def _where(self, track: str) -> Event:
        return {"pid": _PID + self.cpu(), "tid": self._tracks.setdefault(track, len(self._tracks) + 1)}

    def _count(self, primitive: str, now: float) -> None:
        moved = {COUNTED[primitive]: self._counters[COUNTED[primitive]] + 1} if primitive in COUNTED else {}
        # Only what changes the direct map can split a leaf of it; the others need not be asked about.
        if moved and (splits := self.splits()) != self._counters[SPLITS]:
            moved[SPLITS] = splits
        self._counters |= moved
        self._events += (_counter(name, value, now) for name, value in moved.items())


# On the CPU and the track on which it began, whoever ends it.
def _end(begun: Event, now: float) -> Event:
    return {"ph": "E", "pid": begun["pid"], "tid": begun["tid"], "ts": now}
