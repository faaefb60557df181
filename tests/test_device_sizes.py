"""Files of any size behind every device: what a call costs follows the folios there are, not the pages there might be."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from guest_memfd.designs import DESIGNS
from guest_memfd.errors import Signalled, SyscallFailed
from guest_memfd.machine.boot import Config, Machine
from guest_memfd.uapi.kvm import SHARED, MemoryAttributes2
from guest_memfd.words.primitives import Primitive

pytest.importorskip("unicorn")

PAGE = 4096
BOUND = 300
"""Primitives that one of these calls may take, whatever the size of the file."""
CASES = [(hypervisor, design) for design in DESIGNS for hypervisor in ("kvm", "pkvm", "gunyah")
         if DESIGNS[design].hypervisors is None or hypervisor in DESIGNS[design].hypervisors
         if (hypervisor, design) not in (("gunyah", "guestmem-rfc1"), ("gunyah", "guestmem-rfc2"))]


class Counted:
    """A machine with a device, and a bound on what each call may take."""

    def __init__(self, hypervisor: str, design: str) -> None:
        self.machine = Machine(hypervisor, Config(ram=32 << 20))
        device = self.machine.open("/dev/gunyah" if hypervisor == "gunyah" else "/dev/kvm", design)
        maker = device if hypervisor == "gunyah" else device.create_vm()
        self.create: Callable[[int], Any] = (
            maker.create_guest_mem if hypervisor == "gunyah" else lambda size: maker.create_guest_memfd(size, SHARED))
        self.primitives: list[str] = []
        self.machine.judge = self._judge

    def _judge(self, primitive: Primitive, _: object) -> None:
        self.primitives.append(primitive.name)
        assert len(self.primitives) <= BOUND, self.primitives[-5:]

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Within the bound; an errno is an answer, too."""
        self.primitives.clear()
        try:
            return function(*args)
        except (SyscallFailed, Signalled):
            return None


@pytest.mark.parametrize("size", [1 << 40, 1 << 62])
@pytest.mark.parametrize(("hypervisor", "design"), CASES)
def test_a_file_costs_what_its_folios_cost(hypervisor: str, design: str, size: int) -> None:
    counted = Counted(hypervisor, design)
    file = counted.call(counted.create, size)
    assert file is not None
    for offset in (0, size // 2, size - PAGE):
        counted.call(file.fallocate, 1, offset, PAGE)
        mapping = counted.call(file.mmap, offset, PAGE)
        if mapping is not None:
            counted.call(mapping.write, 0, b"here")
            counted.call(mapping.close)
    for offset, nr in ((0, PAGE), (size // 2, size // 2), (0, size)):
        counted.call(file.punch_hole, offset, nr)
    if hypervisor == "kvm":
        counted.call(file.set_memory_attributes2, MemoryAttributes2(0, size, 8))
    counted.call(file.close)
    empty = counted.call(counted.create, size)
    counted.call(empty.close)


@pytest.mark.parametrize(("hypervisor", "design"), CASES)
def test_what_there_is_no_memory_for_fails_at_once(hypervisor: str, design: str) -> None:
    counted = Counted(hypervisor, design)
    file = counted.create(1 << 30)
    file.fallocate(1, 0, 2 * PAGE)
    free = counted.machine.folios.free_pages
    counted.primitives.clear()
    with pytest.raises(SyscallFailed) as failed:
        file.fallocate(1, 0, 1 << 30)
    assert failed.value.errno == errno.ENOMEM
    assert counted.machine.folios.free_pages == free
    file.fallocate(1, 0, 4 * PAGE)
