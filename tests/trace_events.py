"""A strict reader of the Trace Event Format, written from its published description: what a file must have to be shown.

Viewers forgive much and drop the rest without a word. This reader forgives nothing: fields of each phase and their types,
names of metadata, scopes of instants; then what fields alone do not say. Slices of a track nest, those of B and E and those
of X together; an E closes the B above it, on its own track, and carries its name if it has one; every track has a name;
counters are numbers; what flows or is asynchronous begins before it goes on, with the same identifier.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

Event = dict[str, Any]

NUMBER, TEXT = {"type": "number", "minimum": 0}, {"type": "string"}
INTEGER, ANYTHING = {"type": "integer"}, {"type": "object"}
COMMON: dict[str, Any] = {"name": {"type": "string", "minLength": 1}, "cat": TEXT, "pid": INTEGER, "tid": INTEGER,
                          "ts": NUMBER, "args": ANYTHING, "tts": NUMBER, "cname": TEXT}
IDENTIFIER = {"anyOf": [TEXT, INTEGER]}
METADATA = {"process_name": ("name", str), "process_labels": ("labels", str), "process_sort_index": ("sort_index", int),
            "thread_name": ("name", str), "thread_sort_index": ("sort_index", int)}
EPSILON = 1e-6
"""Microseconds that sums of floating-point numbers may be off by."""


def phase(name: str, required: tuple[str, ...], **more: Any) -> dict[str, Any]:
    return {"type": "object", "required": ["ph", "pid", *required], "additionalProperties": False,
            "properties": {"ph": {"const": name}, **COMMON, **more}}


PHASES = {
    "M": phase("M", ("name", "args")), "B": phase("B", ("name", "tid", "ts")), "E": phase("E", ("tid", "ts")),
    "X": phase("X", ("name", "tid", "ts", "dur"), dur=NUMBER, tdur=NUMBER),
    "C": phase("C", ("name", "ts", "args"), id=IDENTIFIER,
               args={"type": "object", "minProperties": 1, "additionalProperties": {"type": "number"}}),
    "i": phase("i", ("name", "ts"), s={"enum": ["g", "p", "t"]}),
    **{name: phase(name, ("name", "ts", "id"), id=IDENTIFIER, bp={"const": "e"}) for name in "stf"},
    **{name: phase(name, ("name", "cat", "ts", "id"), id=IDENTIFIER, scope=TEXT) for name in "bne"},
}
FILE = {
    "type": "object", "required": ["traceEvents"], "additionalProperties": False,
    "properties": {"displayTimeUnit": {"enum": ["ms", "ns"]}, "otherData": ANYTHING, "traceEvents": {
        "type": "array", "items": {"type": "object", "required": ["ph"], "properties": {"ph": {"enum": [*PHASES]}}}}},
}


def problems(trace: Any) -> list[str]:
    """What a viewer would not show as it is meant; empty where all is well."""
    import jsonschema

    top = [error.message for error in jsonschema.Draft202012Validator(FILE).iter_errors(trace)]
    if top:
        return top
    found = []
    for number, event in enumerate(trace["traceEvents"]):
        validator = jsonschema.Draft202012Validator(PHASES[event["ph"]])
        found += [f"event {number}: {error.message}" for error in validator.iter_errors(event)]
    return found or [*_metadata(trace["traceEvents"]), *_nesting(trace["traceEvents"]), *_identified(trace["traceEvents"])]


def _metadata(events: list[Event]) -> Iterator[str]:
    threads, processes = set(), set()
    for event in events:
        if event["ph"] == "M":
            if event["name"] not in METADATA:
                yield f"there is no metadata {event['name']!r}"
                continue
            key, kind = METADATA[event["name"]]
            if type(event["args"].get(key)) is not kind:
                yield f"{event['name']} has no {key}"
            threads |= {(event["pid"], event.get("tid"))} if event["name"] == "thread_name" else set()
            processes |= {event["pid"]} if event["name"] == "process_name" else set()
    for event in events:
        if event["pid"] not in processes:
            yield f"process {event['pid']} has no name"
        if event["ph"] in "BEX" and (event["pid"], event["tid"]) not in threads:
            yield f"track {event['tid']} of process {event['pid']} has no name"


# As viewers do: by time; of the same time as they stand in the file, the longer X before the shorter.
def _nesting(events: list[Event]) -> Iterator[str]:
    tracks = defaultdict(list)
    for event in events:
        if event["ph"] in "BEX":
            tracks[event["pid"], event["tid"]].append(event)
    for track, those in tracks.items():
        open_until: list[tuple[str, float | None]] = []
        for event in sorted(those, key=lambda it: it["ts"]):
            while open_until and open_until[-1][1] is not None and open_until[-1][1] <= event["ts"] + EPSILON:
                open_until.pop()
            if event["ph"] == "E":
                if not open_until or open_until[-1][1] is not None:
                    yield f"an E at {event['ts']} of track {track} closes no B, but {open_until[-1:]}"
                    continue
                name, _ = open_until.pop()
                if event.get("name", name) != name:
                    yield f"an E of {event['name']} closes {name}"
                continue
            end = event["ts"] + event["dur"] if event["ph"] == "X" else None
            if open_until and open_until[-1][1] is not None and (end is None or end > open_until[-1][1] + EPSILON):
                yield f"{event['name']} at {event['ts']} of track {track} ends after {open_until[-1][0]}, in which it begins"
            open_until.append((event["name"], end))
        if any(end is None for _, end in open_until):
            yield f"track {track} ends with {[name for name, end in open_until if end is None]} open"


# An X that is open when an E comes must have ended: that is seen above. What is identified begins first.
def _identified(events: list[Event]) -> Iterator[str]:
    begun: set[tuple[str, str, Any]] = set()
    for event in sorted(events, key=lambda it: it.get("ts", 0)):
        if event["ph"] in "stfbne":
            key = ("flow" if event["ph"] in "stf" else "async", event.get("cat", ""), event["id"])
            if event["ph"] in "sb":
                begun.add(key)
            elif key not in begun:
                yield f"{event['ph']} of {event['id']} comes before it begins"
