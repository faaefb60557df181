"""`zeroed-once`: no page is zeroed that holds zeros; to clear it a second time holds up a fault, or a teardown."""

from __future__ import annotations

from typing import Any

from guest_memfd import Law, Violator, facts


def zeroed_once(note: Any) -> str | None:
    """A page is zeroed for a reason: someone has written to it, or no one knows."""
    if isinstance(note, facts.Access) and note.what.startswith("clear_folio") and note.content == "zero":
        return f"{note.what} clears a page that holds zeros"
    return None


ZEROED_ONCE = Law(
    name="zeroed-once",
    sentence="no page is zeroed that holds zeros already",
    source="core/ops.py, `scrubs`; mm/page_alloc.c want_init_on_free()",
    when="whenever a page is zeroed",
    note=zeroed_once,
    broken_by=Violator("secretmem", "pkvm", ("vcpu",), "clear_folio clears a page that holds zeros"),
)
