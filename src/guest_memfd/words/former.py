"""What primitives and operations were called: in earlier versions of this package, and in the tables that were posted."""

from __future__ import annotations

from collections.abc import Mapping

PRIMITIVES: Mapping[str, str] = {
    "folio_set_private": "folio_set_no_direct_map", "hypercall": "hyp_call",
    "mmu_invalidate_begin": "gmem_invalidate_begin", "mmu_invalidate_end": "gmem_invalidate_end",
    **{f"xa_{name}": f"tree_{name}" for name in ("load", "store", "store_reserved", "reserve", "release")},
}
"""Primitives that had another name, and the one that they have."""

OPERATIONS: Mapping[str, str] = {
    "prepare": "prepare_private and prepare_shared", "prepare_inaccessible": "prepare_private",
    "prepare_accessible": "make_shared", "accessible": "make_shared", "invalidate_begin": "invalidate",
    "invalidate_end": "nothing: the library ends what it has begun", "release_folio": "reclaim", "free_folio": "reclaim",
    "supports_mmap": "nothing: every file can be mapped",
}
"""Operations of the tables of the posted libraries, RFC v1 to v6, and what has taken their place here."""

GUIDE = "docs/move-a-plugin.md"
"""The page that says how code moves from the former to the latter."""
