"""References that outlive mappings, on the emulated machine: GUP-fast, GUP-slow, DMA, and what conversion says to them."""

from __future__ import annotations

from errno import EAGAIN, EFAULT

import pytest

from guest_memfd.designs import DESIGNS
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.machine.boot import Config, Machine
from guest_memfd.machine.primitives.host import EmulatedHost
from guest_memfd.scenarios.gup import pin_user_page
from guest_memfd.words.primitives import Folio
from guest_memfd.words.units import PAGE


class Mapped:
    """A file of two shared pages, mapped by the VMM, nothing faulted in."""

    def __init__(self, hypervisor: str = "pkvm", design: str = "library") -> None:
        self.machine = Machine(hypervisor, Config(ram=16 << 20))
        self.library = DESIGNS[design](HYPERVISORS[hypervisor].ops(), 2)
        self.host = EmulatedHost(self.machine, self.machine.create_vm(2), 2)
        assert self.host.run(self.library.create(2, (0, 1))) == 0
        assert self.host.run(self.library.bind(0, 0, 2)) == 0
        assert self.host.run(self.library.mmap()) == 0

    def pin(self, index: int, *, foll_pin: bool = True) -> Folio | int:
        got: Folio | int = self.host.run(pin_user_page(self.library, index, foll_pin))
        return got


def test_the_slow_path_faults_the_page_in() -> None:
    mapped = Mapped()
    folio = mapped.pin(1)
    assert isinstance(folio, Folio)
    page = mapped.machine.pages[folio.pfn]
    assert (page.pin, page.spec, page.lookup) == (1, 0, 0)
    again = mapped.pin(1, foll_pin=False)
    assert again == folio
    assert (page.pin, page.get) == (1, 1)


def test_dma_through_a_pin_is_seen_by_the_vmm() -> None:
    mapped = Mapped()
    folio = mapped.pin(0)
    assert mapped.host.perform_by_name("pin_access", folio, True, True, caller="mm") == "ok"
    assert mapped.host.perform_by_name("user_access", 0, False) == "ok"
    va = mapped.host.inode.mapping.vmas[0].va(0)
    assert mapped.machine.cpu.user(va, False).x0 == int.from_bytes(b"DEVICEIO", "little")


@pytest.mark.parametrize("foll_pin", [True, False])
def test_a_pinned_page_is_not_converted_until_let_go(foll_pin: bool) -> None:
    mapped = Mapped()
    folio = mapped.pin(1, foll_pin=foll_pin)
    mapped.host.run(mapped.library.munmap())                        # the mapping has gone, the reference has not
    assert mapped.host.run(mapped.library.make_private(0, 2)) == (-EAGAIN, 1)
    mapped.host.perform_by_name("unpin", folio, foll_pin, caller="mm")
    assert mapped.host.run(mapped.library.make_private(0, 2)) == (0, None)
    assert not mapped.machine.linear_map.kernel_page_present(folio.pfn * PAGE)


def test_private_pages_and_secretmem_are_refused() -> None:
    mapped = Mapped()
    assert mapped.host.run(mapped.library.make_private(0, 1)) == (0, None)
    assert mapped.pin(0) == -EFAULT
    assert Mapped(design="secretmem").pin(0) == -EFAULT
