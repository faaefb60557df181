"""What folios of 4K, 2M and 1G cost the library, by the operations that the emulated machine carries out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from guest_memfd.designs.ours import OurLibrary
from guest_memfd.explore.world.cost import FolioCost
from guest_memfd.vmm.counted_file import CountedFile
from guest_memfd.words.units import Index

PAGES, BLOCK, GIGABYTE = 0, 9, 18
"""Orders of folios of 4 KiB, 2 MiB and 1 GiB."""
_TABLES = 512
"""Blocks of 2 MiB in 1 GiB."""
PAGE_WITHIN, ANOTHER = Index(5), Index(7)


def counted_folios(hypervisors: Sequence[str]) -> dict[tuple[str, str], FolioCost | None]:
    """(case, hypervisor) -> what it costs under `library`, None where it is refused. Raises HostUnavailable."""
    found = {hypervisor: dict(_cases(hypervisor)) for hypervisor in hypervisors}
    cases = dict.fromkeys(case for counted in found.values() for case in counted)
    return {(case, hypervisor): counted[case] for case in cases for hypervisor, counted in found.items()}


def _cases(hypervisor: str) -> Iterator[tuple[str, FolioCost | None]]:
    for order, name in ((PAGES, "4K"), (BLOCK, "2M")):
        # The first block pays for what all share: tables above it, the split of its
        # gigabyte. Each further one costs the difference to two.
        first, two = (lent_and_back(hypervisor, blocks << BLOCK, order) for blocks in (1, 2))
        yield f"1 GiB as {name}", _plus(first, _less(two, first), _TABLES - 1)
    yield "1 GiB as 1G", lent_and_back(hypervisor, 1 << GIGABYTE, GIGABYTE)
    yield from _parts(hypervisor)


def lent_and_back(hypervisor: str, pages: int, order: int) -> FolioCost:
    """All of a file of *pages* pages, in folios of *order*, is lent to the guest and taken back."""
    file = CountedFile(OurLibrary, hypervisor, pages, order)
    before = file.counted()
    file.lend()
    file.take_back()
    return _less(file.counted(), before)


# One page of a folio of 2 MiB goes its own way.
def _parts(hypervisor: str) -> Iterator[tuple[str, FolioCost | None]]:
    file = CountedFile(OurLibrary, hypervisor, 1 << BLOCK, BLOCK)
    file.lend()
    # The second time the leaf is split already, and stays so.
    for case in ("4K of 2M, round trip", "4K of 2M, another"):
        before = file.counted()
        file.to_and_fro(PAGE_WITHIN)
        yield case, _less(file.counted(), before)
    before = file.counted()
    refused = file.punch(ANOTHER).ret
    yield "4K of 2M, punched", None if refused else _less(file.counted(), before)


def _less(one: FolioCost, other: FolioCost) -> FolioCost:
    return _plus(one, other, -1)


def _plus(one: FolioCost, other: FolioCost, times: int) -> FolioCost:
    return FolioCost(**{name: count + times * vars(other)[name] for name, count in vars(one).items()})
