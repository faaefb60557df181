"""One run of one guest on an emulated machine. Whatever happens, everything is closed and accounted for.

The order is that of life: boot, load, run, let the host kernel read something if asked to, close, audit. A host that has
panicked gives nothing back; there is nothing to close then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from errno import ENOMEM
from typing import Any, Literal, Protocol, get_args

from guest_memfd.designs import DESIGNS, Design
from guest_memfd.errors import BadInput, DesignRaised, GuestMemfdError, PluginError, Signalled, SyscallFailed
from guest_memfd.guests.loader import GuestImage
from guest_memfd.machine.boot import Config, Machine
from guest_memfd.machine.dev.gunyah.memory import PMD_ORDER
from guest_memfd.machine.el2.gunyah.vcpu import VcpuState
from guest_memfd.machine.hw.buddy import OutOfMemory
from guest_memfd.machine.hypcalls.modelled import ModelledDriver
from guest_memfd.machine.hypcalls.vm import Vm
from guest_memfd.machine.linux.panic import KernelPanic
from guest_memfd.machine.primitives.host import EmulatedHost
from guest_memfd.vmm import readers
from guest_memfd.vmm.devices import Console
from guest_memfd.vmm.ghosts import ProgramTracer
from guest_memfd.vmm.gunyah import GunyahGuest
from guest_memfd.vmm.kvm import KvmGuest
from guest_memfd.vmm.layout import Layout
from guest_memfd.vmm.loop import SLICE, LoopEnded, LoopOutcome, drive
from guest_memfd.vmm.readers import Read
from guest_memfd.vmm.watch import LawBroken, Watch
from guest_memfd.words.outcome import Blocked
from guest_memfd.words.pagestate import GONE
from guest_memfd.words.primitives import Primitive, Splits
from guest_memfd.words.units import PAGE

THEIRS = PluginError, DesignRaised
"""What code of third parties has done wrong."""

Where = Literal["kernel", "el2", "slab"]
"""Whose allocator is made to fail: Linux's for pages, the hypervisor's, Linux's for small objects."""


class RunRecord(Protocol):
    """Who notes a run while it goes on. splits, cpu: where it can ask how many leaves of the direct map have been split, and
    which CPU of the host is at work."""

    splits: Callable[[], int]
    cpu: Callable[[], int]

    def __call__(self, primitive: Primitive) -> None:
        """*primitive* has just ended."""

    def exit(self, words: str) -> None:
        """The vCPU has come back to the VMM."""


@dataclass(frozen=True)
class EmulatedOrder:
    """What to run, and how. ram: bytes. timeout: seconds. reader: of readers.READERS. fail: (whose, which allocation).

    record: who is told of every primitive and exit, None for no one.
    """

    image: GuestImage
    hypervisor: str
    design: str = "library"
    layout: Layout = Layout()           # noqa: RUF009 - frozen
    ram: int = 256 << 20
    timeout: float = 10.0
    reader: str | None = None
    verbose: int = 0
    fail: tuple[Where, int] | None = None
    record: RunRecord | None = None


@dataclass
class EmulatedReport(LoopOutcome):
    """What came of it. *lost*: what the audit found. *splits*, with -v: leaves that each file has split, and can split."""

    panic: str = ""
    read: Read | None = None
    broken: list[LawBroken] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    faults: int = 0
    folios: int = 0
    splits: list[tuple[Splits, Splits]] = field(default_factory=list)
    instructions: int = 0
    primitives: Mapping[str, int] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)


def design_of(name: str, hypervisor: str, folio: int) -> type[Design]:
    """The design called *name*, asking for folios of *folio* bytes; raises UnknownName, BadInput where it was not posted."""
    found = DESIGNS[name]
    if found.hypervisors is not None and hypervisor not in found.hypervisors:
        raise BadInput(f"design {name!r} was posted for {', '.join(found.hypervisors)} only, not for {hypervisor!r}")
    order = (folio // PAGE).bit_length() - 1
    return type(found.__name__, (found,), {"order": order, "splits": found.large}) if order else found


# What a third party has done wrong in a teardown: what was closed after it has waited for the locks that were left.
def _theirs(error: BaseException | None) -> GuestMemfdError | None:
    while error is not None and not isinstance(error, THEIRS):
        error = error.__context__
    return error


class EmulatedRun:
    """One run; *say* gets what the guest says, as it says it, and *log* what `-v` shows. Raises BadInput, UnknownName."""

    def __init__(self, order: EmulatedOrder, say: Callable[[str], None], log: Callable[[str], None]) -> None:
        self.order, self.log = order, log
        self.design = design_of(order.design, order.hypervisor, order.layout.folio)
        self.watch = Watch(order.verbose, log, order.record)
        # Blocks in the direct map where folios are as large; without FEAT_BBM level 3 it is made of pages.
        self.machine = Machine(order.hypervisor, Config(
            ram=order.ram, sea_fixup=self.design.sea_fixup, bbml3=order.layout.folio > PAGE))
        if order.layout.folio > PAGE and isinstance(self.machine.driver, ModelledDriver):
            raise BadInput(f"folios of {order.layout.folio:#x} bytes: hypervisor {order.hypervisor!r} is given by a model "
                           "of single pages")
        if order.hypervisor == "gunyah" and order.layout.folio > PAGE << PMD_ORDER:
            raise BadInput(f"folios of {order.layout.folio:#x} bytes: a file of /dev/gunyah has folios of 4K or 2M")
        # Asked before: to run out later would be ENOMEM at some access of the guest's, and say nothing of --memory.
        free = self.machine.kernel_pages.free_pages * PAGE
        if order.layout.private + order.layout.shared > free:
            raise BadInput(f"--memory {order.layout.private:#x}: of --ram {order.ram:#x}, {free:#x} bytes are free")
        order.layout.boot_info(order.image)
        self.machine.tracer = ProgramTracer(self.machine)
        self.machine.judge = self.watch
        if order.verbose:
            self.machine.begin_accounting()
        self._pages = self._countable()
        tables = self.machine.linear_map.table_pages
        if order.record is not None:
            order.record.splits = lambda: self.machine.linear_map.table_pages - tables
            order.record.cpu = lambda: self.machine.cpu.current
        self.console = Console(say)
        self.report = EmulatedReport()
        self.guest: KvmGuest | GunyahGuest | None = None

    def run(self) -> EmulatedReport:
        """From boot to audit."""
        report, machine = self.report, self.machine
        try:
            with ExitStack() as stack:
                try:
                    self._inside(stack)
                except THEIRS:
                    stack.pop_all()                     # what was under way still has its locks: a teardown would wait
                    raise
                # These are answers: what was opened is closed, and the audit says whether anything is lost.
                except (KernelPanic, Blocked, OutOfMemory, GuestMemfdError):
                    raise
                except Exception:
                    stack.pop_all()                     # a mistake of this program: what a teardown finds then says nothing
                    raise
        except KernelPanic:
            pass
        except Blocked as blocked:
            report.failed = _theirs(blocked)
            if report.failed is None:
                self.watch.breaks("progress", "a procedure waits for ever, with nobody else around", "the library")
        except OutOfMemory as error:
            report.failed = SyscallFailed(ENOMEM, "the machine", str(error))
        except GuestMemfdError as error:
            report.failed = error
        # An allocation that was to fail and never came would fail in the audit.
        for who in get_args(Where):
            self._fail(who, None)
        self.console.end()
        report.console = self.console.text
        if machine.dead is not None:
            report.panic = machine.dead.text
            report.ended = LoopEnded("panic", report.panic.splitlines()[0])
        elif not isinstance(report.failed, THEIRS):
            self._audit()
        report.broken = list(self.watch.broken.values())
        report.primitives = self.watch.counts
        report.log = machine.console
        return report

    def _inside(self, stack: ExitStack) -> None:
        order, report, machine = self.order, self.report, self.machine
        self._fail(*(order.fail or ("kernel", None)))
        device = stack.enter_context(self._open())
        if order.hypervisor == "gunyah":
            self.guest = GunyahGuest(device, order.layout, order.image, self.console, stack, self, self._exit)
            machine.vms[0].handle.vcpus[-1].budget = SLICE          # the host's own timer interrupts a guest, too
        else:
            protected = order.hypervisor == "pkvm"
            self.guest = KvmGuest(device, order.layout, order.image, self.console, stack, self._exit, protected=protected,
                                  debugger=self)
        names = readers.Names(machine) if order.reader else None
        if names is not None:
            stack.callback(names.free)
        self._core().count()
        began = time.perf_counter()
        try:
            report.ended = drive(self.guest, order.timeout)
        finally:
            report.seconds = time.perf_counter() - began
            # After an interrupted call nothing of the machine can be asked.
            if not machine.lock.abandoned:
                self._count()
        report.window = self._window()
        if order.reader and names is not None:
            report.read = readers.read(order.reader, machine, self._kernel(), names)

    def _fail(self, who: Where, n: int | None) -> None:
        machine = self.machine
        if who == "slab":
            machine.fail_slab_at(n)
        else:
            (machine.kernel_pages if who == "kernel" else machine.el2_pool).fail_at(n)

    def _open(self) -> Any:
        device = self.machine.open("/dev/gunyah" if self.order.hypervisor == "gunyah" else "/dev/kvm", self.order.design)
        device.design = self.design
        return device

    # The kernel itself: no file and no VM is involved.
    def _kernel(self) -> EmulatedHost:
        return EmulatedHost(self.machine, Vm(None, 0, GONE), 1)

    def _window(self) -> bytes | None:
        try:
            return self.guest.window() if self.guest is not None else None
        except (Signalled, SyscallFailed):
            return None

    # -- looking at the guest as a debugger of the emulator does -----------------------------------------------------

    def _core(self) -> Any:
        return self.machine.vms[0].handle.vcpus[-1].cpu

    def pc(self) -> int:
        """The vCPU's, whatever a hypervisor would let the host see."""
        return int(self._core().pc)

    def registers(self) -> Mapping[str, int]:
        """The vCPU's, whatever a hypervisor would let the host see."""
        core = self._core()
        named = {name.lower(): core.sysreg(name) for name in ("ELR_EL1", "ESR_EL1", "FAR_EL1", "VBAR_EL1", "SCTLR_EL1")}
        return {"pc": core.pc, "sp": core.sp, "pstate": core.pstate, **named, **{f"x{n}": core.x(n) for n in range(31)}}

    def stopped(self) -> str | None:
        """Gunyah's vCPU state FAULT: Linux logs it, and enters the guest again."""
        last = getattr(self.machine.vms[0].handle.vcpus[-1], "last", None)
        if last is None or last.state != VcpuState.FAULT:
            return None
        return f"it touched {last.data[0]:#x}, where it has nothing, and the hypervisor has stopped it"

    def _exit(self, words: str) -> None:
        if self.order.record is not None:
            self.order.record.exit(words)
        if self.order.verbose:
            self.log(words)

    def _count(self) -> None:
        report, core = self.report, self._core()
        report.folios = sum(len(inode.pages) for inode in self.machine.inodes)
        report.exits = 0 if self.guest is None else self.guest.exits
        report.faults, report.instructions = self.watch.faults, core.instructions
        if self.order.verbose:
            ops = self.machine.hypervisor.ops()
            for inode in self.machine.inodes:
                self.machine.account(inode, by_guest=True)
                report.splits.append((inode.split, self.design(ops, inode.size).most_split()))

    # -- the end -----------------------------------------------------------------------------------------------------

    # Free pages, and tables of the direct map: once split, it is not merged again (bounded-cost counts that).
    def _countable(self) -> int:
        return self.machine.kernel_pages.free_pages + self.machine.linear_map.table_pages

    def _audit(self) -> None:
        machine = self.machine
        self._kernel().perform(Primitive("lru_add_drain_all", (), "mm"), 0)
        self.report.lost = machine.audit()
        missing = self._pages - self._countable()
        if missing:
            self.report.lost.append(f"{missing} pages of the kernel are not free again")
        for words in self.report.lost:
            self.watch.breaks("nothing-lost", words, "audit after everything was closed")
