"""Judging while it runs. Every primitive is seen once, with the facts that it left; nothing is passed over.

The same primitives are what `-v` shows: the guest's faults, and what moves a folio or changes a table; all with `-vv`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from guest_memfd.laws import LAWS
from guest_memfd.machine.linux.folio import LinuxFolio
from guest_memfd.words import facts
from guest_memfd.words.primitives import Folio, Primitive
from guest_memfd.words.units import PAGE

MOVES = frozenset({
    "filemap_add_folio", "filemap_remove_folio", "set_direct_map_invalid_noflush", "set_direct_map_default_noflush",
    "flush_tlb_kernel_range", "hyp_call", "unmap_mapping_pages", "vmf_insert_folio", "tree_store_reserved", "vm_kill",
    "vm_destroyed", "load_unaligned_zeropad", "copy_from_kernel_nofault", "clear_folio", "clear_folio_local",
})
"""Primitives that move a folio, change a table, or are a reader of the host."""


def shown(primitive: Primitive) -> str:
    """*primitive* in a line: folios by their frame, addresses in hexadecimal, bytes by how many; what was left out is."""
    given = [arg for arg in primitive.args if arg is not None]
    return f"{primitive.name}({', '.join(map(_shown, given))})"


def _shown(arg: object) -> str:
    if isinstance(arg, Folio):
        return str(arg)
    if isinstance(arg, LinuxFolio):
        return f"pfn{arg.pa // PAGE}"
    if isinstance(arg, bytes):
        return f"{len(arg)} bytes"
    if isinstance(arg, int) and arg >= 1 << 32:
        return hex(arg)
    return f"[{' '.join(map(_shown, arg))}]" if type(arg) is tuple else str(arg)


class LawBroken(NamedTuple):
    """A law that broke first, the evidence, and the primitive that showed it."""

    law: str
    evidence: str
    where: str


class Watch:
    """Told of every primitive on a machine. *level* 1: `MOVES` go to *log*; 2: all. *record* is told of all."""

    def __init__(
        self, level: int, log: Callable[[str], None], record: Callable[[Primitive], None] | None = None
    ) -> None:
        self.level, self.log, self.record = level, log, record
        self.counts: Counter[str] = Counter()
        self.faults = 0
        """Faults that the library was asked to handle for the guest."""
        self.broken: dict[str, LawBroken] = {}

    def __call__(self, primitive: Primitive, facts: Sequence[facts.Note]) -> None:
        """Count *primitive*, log it by the level, and let all laws judge *facts*."""
        self.counts[primitive.name] += 1
        if self.record is not None:
            self.record(primitive)
        fault = primitive.name == "begin_op" and primitive.args[0] == "fault"
        self.faults += fault
        if self.level > 1 or (self.level and (fault or primitive.name in MOVES)):
            self.log(f"  {primitive.caller:8} {shown(primitive)}")
        for fact in facts:
            for law in LAWS.values():
                evidence = law.on_note(fact)
                if evidence is not None:
                    self.breaks(law.name, evidence, shown(primitive))

    def breaks(self, law: str, evidence: str, where: str) -> None:
        """*law* is broken; its first evidence is kept."""
        self.broken.setdefault(law, LawBroken(law, evidence, where))
