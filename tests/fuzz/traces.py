"""Trace files with something wrong: a value of another type, a field that is gone, bytes that are no text."""

from __future__ import annotations

import copy
import json
import random
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from fuzz.kind import Kind
from fuzz.lines import answer
from guest_memfd.explore.suite.check import check
from guest_memfd.explore.trace import save

ODD: tuple[Any, ...] = (None, True, -1, 0, 1 << 70, 1.5, "", "x" * 3000, "\x1b[2J", "\udc80", [], {}, [[]], [None] * 20,
                        "kvm", {"Folio": [0, 0]}, {"Folio": [-1, "x"]}, {"Entries": [1, -5]}, "vcpu")


@cache
def trace() -> Any:
    """A trace that replays."""
    report = check("none", "gunyah", parties=["vcpu", "zeropad"])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        save(report, report.findings[0], file)
        return json.loads(file.read_text())


class Traces(Kind):
    """`gmem explain` and `gmem replay` of a trace that somebody has changed."""

    name = "traces"

    def try_one(self, choose: random.Random, said: list[str]) -> str | None:
        """Answered as any command line is."""
        changed = copy.deepcopy(trace())
        said += [_change(changed, choose) for _ in range(choose.choice((1, 1, 1, 2, 5)))]
        raw = bytearray(json.dumps(changed), "utf-8", "surrogatepass")
        if choose.random() < 0.2:
            at = choose.randrange(len(raw))
            raw[at:at + choose.randrange(3)] = choose.randbytes(choose.randrange(3))
            said.append(f"bytes at {at}")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "trace.json")
            file.write_bytes(raw)
            verb = choose.choice((["explain"], ["replay"], ["explain", "--json"], ["replay", "--json"]))
            said.append(" ".join(verb))
            return answer([verb[0], str(file), *verb[1:]])


# Walks down to some place, and puts something else there, or nothing.
def _change(thing: Any, choose: random.Random) -> str:
    path: list[Any] = []
    while True:
        keys = list(thing) if isinstance(thing, dict) else list(range(len(thing)))
        if not keys:
            return f"{path}: is empty"
        key = choose.choice(keys)
        path.append(key)
        below = thing[key]
        if isinstance(below, dict | list) and below and choose.random() < 0.8:
            thing = below
        elif choose.random() < 0.2:
            del thing[key]
            return f"{path}: gone"
        else:
            thing[key] = copy.deepcopy(choose.choice(ODD))
            return f"{path}: {thing[key]!r}"
