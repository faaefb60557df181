"""Code for earlier versions, or after a posted table: told in one line what has taken the place of what it uses."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import run

from guest_memfd.core.gmem import Conversion
from guest_memfd.core.ops import GuestMemfdOps, Reason
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.errors import DesignRaised, PluginError
from guest_memfd.explore.suite.check import check
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.hypervisors.kvm.default import KVM, KvmOps
from guest_memfd.words import former
from guest_memfd.words.primitives import PRIMITIVES, Folio, Host, Steps

POSTED = '''
from dataclasses import replace

from guest_memfd.core.ops import GuestMemfdOps
from guest_memfd.hypervisors.kvm.default import KVM


class PostedOps(GuestMemfdOps):
    module = "kvm"

    def prepare(self, inode, offset, folio):
        yield from ()

    def invalidate_begin(self, inode, offset, nr):
        yield from ()
        return 0


posted = replace(KVM, name="posted", ops=PostedOps)
'''


def test_a_posted_table_is_told(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(POSTED)
    done = run("check", "library", "--load", f"{tmp_path}/mine.py", "--hypervisor", "posted", "--parties", "vmm2")
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.count("\n") == 1
    assert ("PostedOps has prepare, invalidate_begin, of the tables that were posted, and lacks invalidate, make_private, "
            "make_shared, prepare_private, prepare_shared, reclaim; docs/move-a-plugin.md says what has taken their place"
            ) in done.stderr


class BothOps(KvmOps):
    """Has all that there is, and an entry of a posted table as well."""

    def invalidate_begin(self, inode: object, offset: int, nr: int) -> Steps[int]:
        yield from ()
        return 0


def test_an_entry_of_a_posted_table_is_told() -> None:
    said = ("hypervisor plugin 'both': BothOps defines 'invalidate_begin', which nothing calls; it is of a table that was "
            "posted, and docs/move-a-plugin.md says what has taken its place")
    with pytest.raises(PluginError, match=f"^{re.escape(said)}$"):
        HYPERVISORS.add("both", replace(KVM, name="both", ops=BothOps))


class HypercallOps(KvmOps):
    """A driver's half of last month."""

    def invalidate(self, gfn: int, folio: Folio, private: bool, reason: Reason) -> Steps[int]:
        host: Any = self.host
        return (yield from host.hypercall("mmu_unmap", gfn, folio))


class Begins(OurLibrary):
    """A design of last month."""

    name = "begins"

    def punch_hole(self, start: int, nr: int) -> Steps[Conversion]:
        host: Any = self.host
        yield from host.mmu_invalidate_begin(start, nr)
        return Conversion(0)


@pytest.mark.parametrize(("design", "hypervisor", "was", "now"), [
    (OurLibrary, replace(KVM, ops=HypercallOps), "hypercall", "hyp_call"),
    (Begins, KVM, "mmu_invalidate_begin", "gmem_invalidate_begin")])
def test_a_primitive_that_has_another_name_is_told(design: Any, hypervisor: Any, was: str, now: str) -> None:
    said = re.escape(f"no host has the primitive {was!r}: it is called {now!r} now ({former.GUIDE})")
    with pytest.raises(DesignRaised, match=said):
        check(design, hypervisor, parties=["vmm2"], jobs=1)


def test_the_page_has_every_name() -> None:
    page = (Path(__file__).parent.parent / former.GUIDE).read_text(encoding="utf-8")
    told = {}
    for line in page.splitlines():
        if line.startswith("| `"):
            old, *_, new = [re.findall(r"`(\w+)`", cell) for cell in line.split("|")[1:-1]][:3]
            told.update(dict.fromkeys(old, new))
    assert {name: [now] for name, now in former.PRIMITIVES.items()}.items() <= told.items()
    for name, now in former.OPERATIONS.items():
        assert told[name] == [word for word in re.findall(r"\w+", now.partition(":")[0]) if hasattr(GuestMemfdOps, word)]


def test_what_has_taken_their_place_is_there() -> None:
    assert {*former.PRIMITIVES.values()} <= PRIMITIVES
    assert not {*former.PRIMITIVES} & PRIMITIVES
    assert not any(hasattr(GuestMemfdOps, name) for name in former.OPERATIONS)
    with pytest.raises(AttributeError, match=r"^no host has the primitive 'tree_lod'$"):
        getattr(Host("library"), "tree_lod")  # noqa: B009
