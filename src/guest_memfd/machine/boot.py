"""A machine, booted. No other file knows all of the machine.

What a VMM calls - `open`, what it gives, `audit` - may be called from any thread. Code that uses a part of the machine by
itself while other threads are about does so inside of ``with machine.lock``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import ENOENT
from typing import Any

from guest_memfd.designs import DESIGNS
from guest_memfd.errors import BadInput, SyscallFailed
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.machine.adversary import Adversary
from guest_memfd.machine.audit import audit
from guest_memfd.machine.board.board import Board
from guest_memfd.machine.board.config import Config
from guest_memfd.machine.board.tracer import BLOCK
from guest_memfd.machine.dev import gunyah, kvm
from guest_memfd.machine.hw.buddy import Buddy
from guest_memfd.machine.hypcalls.driver import Driver
from guest_memfd.machine.hypcalls.gunyah import GunyahDriver
from guest_memfd.machine.hypcalls.hardware import Hardware
from guest_memfd.machine.hypcalls.kvm import KvmDriver
from guest_memfd.machine.hypcalls.modelled import ModelledDriver
from guest_memfd.machine.hypcalls.pkvm import PkvmDriver
from guest_memfd.machine.stray import stray_mappings
from guest_memfd.uapi.gunyah import PATH as GUNYAH
from guest_memfd.words.units import PAGE, span

__all__ = ["Config", "Machine", "boot"]

KVM = "/dev/kvm"
DEFAULT = Config()


class Machine(Board):
    """A machine under hypervisor *name*, a third party's by its model; raises UnknownName, BadInput, HostUnavailable.

    BadInput: it is too small for a machine, or the model has something that no machine can do.
    """

    def __init__(self, name: str, config: Config = DEFAULT) -> None:
        hypervisor = HYPERVISORS[name]
        if hypervisor.encrypts:
            raise BadInput(f"hypervisor {name!r} keeps its guests' memory encrypted, which no emulated machine does")
        hardware = Hardware(config.ram, config.cpus)
        drivers: dict[str, Callable[[], Driver]] = {
            "kvm": lambda: KvmDriver(hardware, hypervisor),
            "pkvm": lambda: PkvmDriver(hardware, hypervisor),
            "gunyah": lambda: GunyahDriver(hardware, hypervisor, inject=config.inject),
        }
        super().__init__(config, hypervisor, hardware, drivers.get(name, lambda: ModelledDriver(hardware, hypervisor)))
        # After the board is made: the adversary looks at the driver, the CPUs and the linear map.
        self.adversary = Adversary(self)
        self.driver.cpu_of_guest = self.adversary.cpu_of_guest
        if config.scattered or config.blocks:
            self._scatter(config.scattered) if config.scattered else self._lay_out(config.blocks)
            # A CPU may walk the tables at the last moment before a store changes them, so its TLB may hold the old
            # entry.
            self.linear_map.tables.before_store = self.adversary.walk_late

    # What lies between the frames is the kernel's own, such as slabs of names.
    def _scatter(self, nr: int) -> None:
        order = (self.config.apart * nr - 1).bit_length()
        start = self.kernel_pages.alloc(order)
        self.folios = Buddy(self.ram, start, PAGE << order)
        for _ in range(1 << order):
            self.folios.alloc()
        self.watched = [*span(start + PAGE, nr, PAGE * self.config.apart)]
        for pa in self.watched:
            self.ram.fill(pa, PAGE, 0x5A)
            self.folios.free(pa)

    def _lay_out(self, blocks: int) -> None:
        order = BLOCK + (blocks - 1).bit_length()
        start, size = self.kernel_pages.alloc(order), PAGE << BLOCK
        self.folios = Buddy(self.ram, start, blocks * size, by_address=True)
        self.watched = [*span(start + self.config.spot * PAGE, 2 * blocks, size // 2)]
        self.ram.fill(start, blocks * size, 0x5A)
        self.batch = None
        for block in span(start, blocks, size):
            self.driver.host_touches(block)

    def open(self, path: str, design: str = "library") -> Any:
        """open(2) of a device; what it gives is served by *design*. Raises SyscallFailed(ENOENT), UnknownName.

        The device exists where its hypervisor runs: dev/gunyah implements uapi/gunyah.py, dev/kvm uapi/kvm.py. A third
        party's hypervisor is one more backend of KVM, as pKVM is.
        """
        chosen = DESIGNS[design]
        with self.lock:
            if path == GUNYAH and self.hypervisor.name == "gunyah":
                return gunyah.GunyahDeviceFile(self, chosen)
            if path == KVM and self.hypervisor.name != "gunyah":
                return kvm.KvmDevice(self, chosen)
        raise SyscallFailed(ENOENT, f"open {path}", f"the machine runs {self.hypervisor.name}")

    @contextmanager
    def in_child(self) -> Iterator[None]:
        """What the block calls, a child that the VMM has forked calls: its mappings are the same, its mm is another."""
        self.forked = True
        try:
            yield
        finally:
            self.forked = False

    def audit(self) -> list[str]:
        """What has not come back, now that every VM and file is gone: see audit.py."""
        with self.lock:
            return audit(self)

    def stray_mappings(self) -> list[str]:
        """Which mappings lead to memory that is free, or that its file no longer holds, now: see stray.py."""
        with self.lock:
            return stray_mappings(self)


def boot(hypervisor: str, ram: int = 1 << 30) -> Machine:
    """A machine of *ram* bytes under *hypervisor*: `open` its device. Raises UnknownName, BadInput, HostUnavailable."""
    return Machine(hypervisor, Config(ram=ram))
