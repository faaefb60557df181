"""A hypervisor's own half on the abstract host: pages placed as a test wants them, one primitive, and what it changes."""

from __future__ import annotations

from typing import Any

from driver import Bench

from guest_memfd.abstract import state as st
from guest_memfd.words.pagestate import ANY, CONTENTS, OWNERS
from guest_memfd.words.primitives import Primitive
from guest_memfd.words.scene import Scene
from guest_memfd.words.units import Index

WORDS: dict[str, dict[int, str]] = {
    "owner": dict(enumerate(OWNERS)), "content": dict(enumerate(CONTENTS)),
    "expect": {**dict(enumerate(CONTENTS)), ANY: "any"},
}
FIELDS = {"pfn": tuple(field for field in st.FRAME_FIELDS if field != "asked"), "folio": st.FOLIO_FIELDS,
          "page": st.PAGE_FIELDS, "gfn": st.GFN_FIELDS, "vm": st.VM_FIELDS}


def placed(before: dict[str, Any], hypervisor: str, scene: Scene, pages: int = 1) -> Bench:
    """The first *pages* pages of the file are the first frames, zeroed, and all that *before* says is so."""
    bench = Bench(hypervisor, scene=scene)
    assert bench.do(lambda lib: lib.allocate(Index(0), pages)) == 0
    state = bench.state
    for name, value in {**{f"pfn{pfn}.content": "zero" for pfn in range(pages)}, **before}.items():
        record, _, field = name.partition(".")
        numbers = {word: number for number, word in WORDS.get(field, {}).items()}
        setattr(records(state)[record], field, numbers.get(value, value))
    bench.shared = state.save()
    return bench


def records(state: st.State) -> dict[str, Any]:
    """All records that a hypercall may change, by kind and number."""
    kinds = {"pfn": state.frames(), "folio": state.folios(), "page": state.pages(), "gfn": state.gfns(), "vm": state.vms()}
    return {f"{kind}{record.number}": record for kind, members in kinds.items() for record in members}


def fields(state: st.State) -> dict[str, Any]:
    """All that there is of pages, folios, gfns and VMs, ghosts left out."""
    return {f"{name}.{field}": WORDS[field][getattr(record, field)] if field in WORDS else getattr(record, field)
            for name, record in records(state).items()
            for field in (*FIELDS[name.rstrip("0123456789")],)}


def done(bench: Bench, primitive: Primitive) -> tuple[Any, dict[str, Any]]:
    """What *primitive* says, and what it has changed."""
    was = fields(bench.state)
    outcome = next(o for o in bench.machine.outcomes(bench.shared, 0, primitive) if not o.failed)
    now = fields(st.State(outcome.shared))
    return outcome.result, {name: value for name, value in now.items() if value != was[name]}
