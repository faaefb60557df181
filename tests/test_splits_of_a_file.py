"""What a file has split is what its tables say before and after, and no more than the library says that it can."""

from __future__ import annotations

import pytest

from guest_memfd.cli.main import main
from guest_memfd.core.library import Library
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.words.primitives import Splits
from guest_memfd.words.units import PAGE, Gfn, Index, Pa, gfn_to_gpa

pytest.importorskip("unicorn")

from guest_memfd.vmm.counted_file import CountedFile

BLOCK = 9
FIRST, LAST = Index(5), Index(700)


def whole_leaves(file: CountedFile) -> dict[tuple[str, int], bool]:
    """(whose table, address) -> whether one entry of 2 MiB or more covers the block there: read from the tables."""
    machine, driver, found = file.machine, file.machine.driver, {}
    step = PAGE << BLOCK
    for pa in range(machine.ram.base, machine.ram.base + machine.ram.size, step):
        va = machine.linear_map.va(Pa(pa))
        machine.linear_map.fault_in(va)
        found["direct map", pa] = machine.linear_map.tables.lookup(va).level < 3
        if driver.host_order(Pa(pa)) is not None:
            found["host", pa] = all((driver.host_order(Pa(pa + at)) or 0) >= BLOCK for at in (0, step // 2))
    for gfn in range(0, file.pages, 1 << BLOCK):
        orders = [driver.guest_order(file.host.vm, gfn_to_gpa(Gfn(gfn + at))) for at in (0, 1, 256, 511)]
        found["guest", gfn] = all(order >= BLOCK for order in orders)
    return found


@pytest.mark.parametrize("hypervisor", ["kvm", "pkvm", "gunyah"])
def test_what_is_accounted_for_is_what_the_tables_say(hypervisor: str) -> None:
    file = CountedFile(OurLibrary, hypervisor, 4 << BLOCK, BLOCK)
    file.machine.begin_accounting()
    file.lend()
    before, so_far = whole_leaves(file), file.host.inode.split
    for index in (FIRST, LAST, Index(FIRST + 1)):
        file.consent(Gfn(index))
        assert file.convert(index, shared=True).ret == 0
    after, split = whole_leaves(file), file.host.inode.split.more_than(so_far)
    gone = [whose for (whose, at), whole in before.items() if whole and not after[whose, at]]
    assert split == Splits(gone.count("direct map"), gone.count("host"), gone.count("guest"))
    assert split == (Splits(2, 0, 0) if hypervisor == "kvm" else Splits(2, 2, 2))      # KVM drops the block
    assert split.table_pages == sum(split)
    most = file.library.most_split()
    assert all(one <= bound for one, bound in zip(file.host.inode.split, most, strict=True))


def test_nobody_who_does_not_ask_pays_for_it() -> None:
    file = CountedFile(OurLibrary, "pkvm", 1 << BLOCK, BLOCK)
    file.lend()
    assert file.host.inode.split == Splits()


@pytest.mark.parametrize(("size", "order", "splits", "most"), [
    (4 << 9, 9, True, Splits(8, 8, 4)),         # four folios, each in a leaf of 1 GiB of its own, and each a leaf of 2 MiB
    (4 << 9, 9, False, Splits(4, 4, 0)),        # which stay as they are
    (1 << 18, 18, True, Splits(513, 513, 513)),     # one leaf of 1 GiB, and 512 that it is made of
    (3, 0, True, Splits(6, 6, 0)),              # each page in leaves of its own, of either size
])
def test_how_many_there_can_be(size: int, order: int, splits: bool, most: Splits) -> None:
    library = Library(HYPERVISORS["kvm"].ops(), size)
    library.order, library.splits = order, splits
    assert library.most_split() == most


@pytest.mark.parametrize(("hypervisor", "split"), [("kvm", "0 of 4, guest's 0 of 2"), ("pkvm", "1 of 4, guest's 1 of 2"),
                                                   ("gunyah", "0 of 4, guest's 1 of 2")])
def test_what_a_guest_splits_on_its_own_is_its_files(
    hypervisor: str, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It gives a page of its block up, by its own hypercall."""
    assert main(["run", "relinquish", "--on", f"emulated:arm64/{hypervisor}", "--folio", "2M", "--memory", "4M", "-v"]) == 0
    said = capsys.readouterr()
    assert f"host's stage 2 {split}" in said.out + said.err
