"""Units are types: mypy refuses one where another belongs, and lets every right use through."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from guest_memfd.core import Library
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.words.units import (
    FIRST_PAGE,
    Gfn,
    Index,
    Ipa,
    Pa,
    Pfn,
    Va,
    gfn_to_gpa,
    gpa_to_gfn,
    identity_ipa,
    identity_pa,
    pa_to_pfn,
    page_index,
    pfn_to_pa,
    span,
)

pytest.importorskip("mypy")
ROOT = Path(__file__).parent.parent

HEAD = """
from __future__ import annotations
from collections.abc import Sequence
from guest_memfd.core import Library
from guest_memfd.core.hypervisor import Stage2
from guest_memfd.machine.dev.kvm.slots import Memslot
from guest_memfd.machine.hw.arm64.mmu import Mmu
from guest_memfd.machine.hw.arm64.regime import Stage1
from guest_memfd.machine.hw.arm64.tlb import Tlb
from guest_memfd.machine.hw.arm64.tlbi import vaale1
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.words.primitives import Host, Folio, Steps
from guest_memfd.words.scene import Slot
from guest_memfd.words.units import *
"""

# What is written, and what mypy says of it; None: nothing.
USES: tuple[tuple[str, str | None], ...] = (
    ("def right(d: Library, gfn: Gfn, index: Index) -> Steps[int]: return d.guest_fault(gfn, index)", None),
    ("def crossed(d: Library, gfn: Gfn, index: Index) -> Steps[int]: return d.guest_fault(index, gfn)",
     'Argument 1 has incompatible type "Index"; expected "Gfn"'),
    ("def twice(d: Library, gfn: Gfn) -> Steps[int]: return d.guest_fault(gfn, gfn)",
     'Argument 2 has incompatible type "Gfn"; expected "Index"'),
    ("def bound(d: Library, gfn: Gfn, index: Index) -> Steps[int]: return d.bind(gfn, index, 1)", None),
    ("def bound_at(d: Library, gfn: Gfn) -> Steps[int]: return d.bind(gfn, gfn, 1)",
     'Argument 2 has incompatible type "Gfn"; expected "Index"'),
    # v17's S4: bytes where page indexes belong. S16: what is no index, but a distance in the binding.
    ("def s4(h: Host, index: Index) -> Steps[None]: return h.unmap_mapping_pages(index * 4096, 1)",
     'Argument 1 to "unmap_mapping_pages" of "Host" has incompatible type "int"; expected "Index"'),
    ("def s16(h: Host, gfn: Gfn, first: Gfn) -> object: return h.filemap_get_folio(gfn - first)",
     'Argument 1 to "filemap_get_folio" of "Host" has incompatible type "int"; expected "Index"'),
    ("def slotted(slot: Slot, gfn: Gfn) -> Index | None: return slot.index(gfn)", None),
    ("def by_index(slot: Slot, index: Index) -> Index | None: return slot.index(index)",
     'Argument 1 to "index" of "Slot" has incompatible type "Index"; expected "Gfn"'),
    # v17's tree of provided pages is by gfn, the trees of a file are by page index.
    ('def provided(h: Host, gfn: Gfn) -> Steps[Sequence[int]]: return h.tree_load("provided", gfn, 1)', None),
    ('def of_file(h: Host, gfn: Gfn) -> Steps[Sequence[int]]: return h.tree_load("bindings", gfn, 1)',
     'No overload variant of "tree_load" of "Host" matches argument types "str", "Gfn", "int"'),
    ("def mapped(stage2: Stage2, gfn: Gfn, folio: Folio) -> None: stage2.guest_map(gfn, folio.pfn)", None),
    ("def mapped_at(stage2: Stage2, gfn: Gfn, folio: Folio) -> None: stage2.guest_map(folio.pfn, gfn)",
     'Argument 1 to "guest_map" of "Stage2" has incompatible type "Pfn"; expected "Gfn"'),
    ("def read(ram: Ram, pfn: Pfn) -> bytes: return ram.read(pfn_to_pa(pfn), 8)", None),
    ("def read_frame(ram: Ram, pfn: Pfn) -> bytes: return ram.read(pfn, 8)",
     'Argument 1 to "read" of "Ram" has incompatible type "Pfn"; expected "Pa"'),
    ("def read_guest(ram: Ram, ipa: Ipa) -> bytes: return ram.read(ipa, 8)",
     'Argument 1 to "read" of "Ram" has incompatible type "Ipa"; expected "Pa"'),
    ('def walked(mmu: Mmu, va: Va, s1: Stage1) -> Pa: return mmu.translate(va, "r", 1, s1).pa', None),
    ('def walked_ipa(mmu: Mmu, ipa: Ipa, s1: Stage1) -> Pa: return mmu.translate(ipa, "r", 1, s1).pa',
     'Argument 1 to "translate" of "Mmu" has incompatible type "Ipa"; expected "Va"'),
    ("def flushed(tlb: Tlb, ipa: Ipa) -> None: vaale1(tlb, ipa, 0)",
     'Argument 2 to "vaale1" has incompatible type "Ipa"; expected "Va"'),
    ("def slot_page(slot: Memslot, ipa: Ipa) -> Index: return slot.page(gpa_to_gfn(ipa))", None),
    ("def slot_byte(slot: Memslot, ipa: Ipa) -> Index: return slot.page(ipa)",
     'Argument 1 to "page" of "Memslot" has incompatible type "Ipa"; expected "Gfn"'),
    # What arithmetic keeps, and what it does not.
    ("def further(index: Index) -> Index: return index + 1", None),
    ("def head(gfn: Gfn, folio: Folio) -> Gfn: return gfn & -folio.nr", None),
    ("def apart(gfn: Gfn, first: Gfn) -> Index: return gfn - first",
     'Incompatible return value type (got "int", expected "Index")'),
    ("def mixed(index: Index, gfn: Gfn) -> Index: return index + gfn",
     'Incompatible return value type (got "int", expected "Index")'),
    ("def address(pfn: Pfn) -> Pa: return pfn << 12", 'Incompatible return value type (got "int", expected "Pa")'),
    ("def every(gfn: Gfn) -> list[Gfn]: return [one for one in span(gfn, 3)]", None),
)


def test_mypy_refuses_one_unit_for_another_and_nothing_else(tmp_path: Path) -> None:
    snippet = tmp_path / "uses.py"
    snippet.write_text(HEAD + "".join(f"{line}\n" for line, _ in USES))
    options = ("--config-file", "pyproject.toml", "--cache-dir", str(tmp_path / "cache"))
    done = subprocess.run([sys.executable, "-m", "mypy", *options, str(snippet)], cwd=ROOT, capture_output=True, text=True,
                          check=False)
    told: dict[int, list[str]] = {}
    for line, words in re.findall(r"uses\.py:(\d+): error: (.*?)  \[", done.stdout):
        told.setdefault(int(line), []).append(words)
    first = HEAD.count("\n") + 1
    assert told.keys() == {first + at for at, (_, said) in enumerate(USES) if said is not None}, done.stdout + done.stderr
    assert all(said in told[first + at] for at, (_, said) in enumerate(USES) if said is not None), done.stdout


# -- at run time -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [Pfn, Gfn, Index, Pa, Ipa, Va], ids=lambda unit: unit.__name__)
def test_a_unit_is_a_number(unit: type[int]) -> None:
    assert type(unit(7)) is int
    assert unit(7) == 7


@pytest.mark.parametrize(("there", "back", "small", "large"), [
    (pfn_to_pa, pa_to_pfn, 3, 0x3000), (gfn_to_gpa, gpa_to_gfn, 3, 0x3000), (identity_ipa, identity_pa, 0x3abc, 0x3abc)])
def test_conversions_and_the_way_back(there: object, back: object, small: int, large: int) -> None:
    assert there(small) == large
    assert back(large) == small


def test_frames_and_pages_are_rounded_down() -> None:
    assert pa_to_pfn(0x3fff) == gpa_to_gfn(0x3fff) == page_index(0x3fff) == 3


def test_a_span_is_what_a_range_is() -> None:
    assert [*span(FIRST_PAGE, 3)] == [0, 1, 2]
    assert [*span(0x1000, 3, 0x1000)] == [0x1000, 0x2000, 0x3000]
    assert [*span(5, 0)] == [*span(5, -1)] == []


def test_who_annotates_with_int_is_served() -> None:
    class Plain(Library):
        def guest_fault(self, gfn: int, index: int) -> object:
            return gfn, index

    assert Plain(HYPERVISORS["kvm"].ops(), 2).guest_fault(0, 1) == (0, 1)
