"""Words of the library that can be taken for one another."""

from __future__ import annotations

ABSTRACTION = "lockstep/abstraction.py"
"""A file of functions that look at a machine, and do nothing to it."""

TRACEPOINTS = frozenset({"begin_op", "end_op", "warn"})
"""Steps that do nothing: the laws or a person reads them."""

TEXT = frozenset({"title", "name", "source", "notes", "consents", "fallible", "final", "errnos"})
"""Names and arguments that are words for people, or say what a test host may inject."""

NUMBERS = frozenset({"gfn", "index", "start", "nr", "size", "pgoff", "head", "at", "FIRST_PAGE"})
"""Variables, attributes and a constant that hold a page index, a gfn or a length."""

PLACES = (frozenset({"gfn", "head"}), frozenset({"index", "start", "pgoff"}))
"""A gfn, and a page index: what may be taken for the other."""

BATCHES = frozenset({"folios", "zapped", "found", "shared"})
"""Variables that hold several things to be treated alike."""

FLAGS = frozenset({"private", "no_direct_map", "uptodate", "hwpoison", "marked", "sync", "allowed"})
"""Variables and attributes that are true or false."""

LOCKED = ("no_direct_map", "uptodate", "hwpoison")
"""Flags of what `lock_folio` returns."""

OPTIONAL = frozenset({"guest_consents", "guest_touches", "force_reclaim", "pfn_cache", "flush"})
"""Arguments that have a default."""

CONSTANTS: tuple[tuple[str, ...], ...] = (("PRIVATE_PAGE", "SHARED_PAGE"), ("SEA", "DATA_ABORT"))
"""Names of constants."""

OTHER_ERRNO = {
    "EAGAIN": "EBUSY", "EBUSY": "EAGAIN", "ENOMEM": "EBUSY", "EINVAL": "EAGAIN", "EPERM": "EBUSY", "EEXIST": "EAGAIN",
    "ENODEV": "ENOMEM", "EHWPOISON": "EAGAIN", "ENOENT": "EINVAL", "EFAULT": "EAGAIN",
}
"""An errno, and one that could be meant as well."""

STRINGS: tuple[tuple[str, ...], ...] = (
    ("host", "guest", "shared", "borrowed"),
    ("to_private", "to_shared", "teardown", "punch", "unbind", "error"),
    ("notifier", "count", "none"),
    ("ok", "SIGBUS", "retry"),
    ("delayed", "failed"),
    ("kept", "lookup"),
)
"""Owners, reasons, policies, answers, kinds of references. Each is taken for every other (reasons: for the next two)."""

TREES = ("attributes", "bindings")
"""First argument of the tree operations."""

HYPERCALLS: tuple[tuple[str, ...], ...] = (
    ("donate_to_protected", "donate_to_sibling"), ("donate_from_protected", "donate_from_sibling"),
    ("map_private", "map_vmmio"), ("unmap_private", "unmap_vmmio"),
    ("donate_guest", "share_guest"), ("unshare_guest", "unshare", "reclaim_dying_guest_page"),
    ("mmu_map", "mmu_unmap"),
)
"""Hypercalls with the same arguments."""

METHODS: tuple[tuple[str, ...], ...] = (
    ("zap", "zap_noflush"), ("make_private", "make_shared", "reclaim"), ("prepare_private", "prepare_shared"),
    ("give_private", "prepare_private"), ("tree_store", "tree_store_reserved"), ("clear_folio", "clear_folio_local"),
    ("set_direct_map_invalid_noflush", "set_direct_map_default_noflush"), ("unlock_and_put", "unlock_folio", "folio_put"),
    ("make_accessible", "zap"), ("guest_map", "guest_unmap"), ("scrub", "forget", "declassify"),
    ("fput", "iput"), ("gmem_invalidate_begin", "unmap_mapping_pages"), ("tree_reserve", "tree_load"),
)
"""Procedures with the same arguments."""

COUNTED = frozenset({
    "folio_put", "folio_get", "module_put", "close", "account", "gmem_invalidate_begin", "gmem_invalidate_end", "put_all",
    "unlock_folio", "unlock_and_put", "up_read", "up_write", "evict", "release", "iput", "fput",
})
"""Steps that are something else when done twice."""

PAIRS = (
    ("down_write", "up_write"), ("down_read", "up_read"), ("gmem_invalidate_begin", "gmem_invalidate_end"),
    ("lock_folio", "unlock_folio"),
)
"""What begins, and what ends it."""

CALM = {
    "ret": "0", "result": "Conversion(0)", "(ret, index)": "(0, 0)", "(ret, _)": "(0, 0)", "busy": "None", "refs": "0",
    "(result, last)": "(Conversion(0), False)", "folios": "()", "mapped": "True", "answer": "'ok'", "(bound,)": "(0,)",
}
"""What a variable holds when a step went well, or there was nothing to do."""

SUCCESS = {
    "int": "0", "Conversion": "Conversion(0)", "tuple[int, Index]": "(0, FIRST_PAGE)", "Index | None": "None",
    "tuple[Conversion, bool]": "(Conversion(0), False)",
}
"""What a procedure returns when all went well, by the type it says it returns."""

FAILURE = {
    "int": "-EAGAIN", "Conversion": "Conversion(-EAGAIN)", "tuple[int, Index]": "(-EAGAIN, FIRST_PAGE)", "Index | None": "0",
    "tuple[Conversion, bool]": "(Conversion(-EAGAIN), False)", "Grabbed | int": "-EAGAIN",
}
"""And when not."""

PASSED_ON = {"int": "ret", "Conversion": "Conversion(ret)", "tuple[int, Index]": "(ret, FIRST_PAGE)"}
"""How it passes an error on that is in `ret`."""
