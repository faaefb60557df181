"""The guests that come with the package, each executed under both hypervisors' hypercalls on a stage 2 of the test's own."""

from __future__ import annotations

import pytest

from guest_memfd.errors import UnknownName
from guest_memfd.guests import CONSOLE, GUESTS, PRIVATE_BASE, SECRET, SHARED_BASE, SHARED_LINE, SYSTEM_OFF, guest, source
from guest_memfd.guests.bootinfo import BootHypervisor, BootInfo
from guest_memfd.guests.loader import fits, load
from guest_memfd.machine.hw.arm64.access import access_of
from guest_memfd.machine.hw.arm64.cpu import Bus, Cpu, CpuAbort, Expired, Hvc, Stop
from guest_memfd.machine.hw.arm64.fault import EXTERNAL_ABORT, TRANSLATION, Fault
from guest_memfd.machine.hw.arm64.regime import Stage1
from guest_memfd.machine.hw.arm64.registers import Tcr
from guest_memfd.machine.hw.arm64.walk import walk
from guest_memfd.machine.hw.ram import Ram

PAGE = 4096
PRIVATE, SHARED = 32 * PAGE, 2 * PAGE
NOT_SUPPORTED, INVALID = (1 << 64) - 1, (1 << 64) - 3
BOTH = pytest.mark.parametrize("hypervisor", [BootHypervisor.GUNYAH, BootHypervisor.PKVM])


class Ipa:
    """The guest's physical addresses as the walker wants to read them."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def read64(self, ipa: int) -> int:
        return self.machine.ram.read64(self.machine.stage2(ipa))


class Machine:
    """A guest and its VMM: private memory is RAM at the same address, the shared window follows it, the console prints."""

    def __init__(self, name: str, hypervisor: BootHypervisor, shared: int = SHARED) -> None:
        image = load(name)
        fits(image, [(PRIVATE_BASE, PRIVATE)])
        self.ram = Ram(PRIVATE + SHARED, PRIVATE_BASE)
        for ipa, data in image.segments:
            self.ram.write(ipa, data)
        self.shared = shared
        self.console, self.calls, self.opened = "", [], []
        self.memory = Ipa(self)
        self.cpu = cpu = Cpu(self.ram, self.translate)
        info = BootInfo(hypervisor, PRIVATE_BASE, PRIVATE, SHARED_BASE if shared else 0, shared)
        where = -(-image.end // 16) * 16
        self.ram.write(where, info.pack())
        cpu.pc = image.entry
        cpu.set_x(0, where)

    def stage2(self, ipa: int) -> int:
        if PRIVATE_BASE <= ipa < PRIVATE_BASE + PRIVATE or CONSOLE <= ipa < CONSOLE + PAGE:
            return ipa
        if SHARED_BASE <= ipa < SHARED_BASE + self.shared:
            return ipa - SHARED_BASE + PRIVATE_BASE + PRIVATE
        raise Fault(TRANSLATION, 3, 2, ipa=ipa)

    def translate(self, va: int, access: str, el: int) -> tuple[int, int, bool, bool, bool]:
        cpu = self.cpu
        regime = Stage1(Tcr.decode(cpu.sysreg("TCR_EL1")), cpu.sysreg("TTBR0_EL1"), cpu.sysreg("TTBR1_EL1"),
                        enabled=bool(cpu.sysreg("SCTLR_EL1") & 1))
        found = walk(self.memory, va, access, el, regime, None)
        try:
            return self.stage2(found.pa), PAGE, found.readable, found.writable, found.executable
        except Fault as fault:
            raise Fault(fault.kind, fault.level, 2, va=va, ipa=found.pa, access=access, el=el) from None

    def hypercall(self) -> None:
        function, *args = (self.cpu.x(n) for n in range(5))
        self.calls.append(function)
        mine = ((PRIVATE_BASE, PRIVATE), (SHARED_BASE, SHARED))
        page = {0xc600_8069: args[1], 0xc600_0003: args[0]}.get(function)
        if page is None:
            self.cpu.set_x(0, NOT_SUPPORTED)
        elif page % PAGE or not any(start <= page < start + size for start, size in mine):
            self.cpu.set_x(0, INVALID)
        else:
            self.opened.append(page)
            self.cpu.set_x(0, 0)

    # The VMM's loop, until the guest is off or does something a VMM cannot handle.
    def run(self, deliver: int = 0, timeout: float = 10) -> Stop | None:
        while True:
            stop = self.cpu.run(timeout)
            if stop == Hvc(0) and self.cpu.x(0) == SYSTEM_OFF:
                return None
            if isinstance(stop, Hvc):
                if stop.imm:
                    self.cpu.set_x(0, NOT_SUPPORTED)
                else:
                    self.hypercall()
            elif isinstance(stop, Bus):
                transfer = access_of(self.cpu.fetch(stop.pc))
                assert transfer is not None
                assert (transfer.write, transfer.size, stop.pa) == (True, 1, CONSOLE)
                self.console += chr(self.cpu.x(transfer.register) & 0xff if transfer.register < 31 else 0)
                self.cpu.pc += 4
            elif isinstance(stop, CpuAbort) and deliver:
                deliver -= 1
                fault = stop.fault
                seen = Fault(EXTERNAL_ABORT, None, 1, va=fault.va, access=fault.access, el=fault.el)
                self.cpu.take_exception(seen.esr_el1(), seen.far)
            else:
                return stop


@BOTH
def test_hello_prints_and_keeps_a_secret(hypervisor: BootHypervisor) -> None:
    machine = Machine("hello", hypervisor)
    assert machine.run() is None
    assert machine.console == "hello from a guest\nsecret written\n"
    assert machine.ram.read(PRIVATE_BASE + PRIVATE - PAGE, len(SECRET)) == SECRET
    assert machine.calls == []


@BOTH
def test_memory_counts_its_pages(hypervisor: BootHypervisor) -> None:
    machine = Machine("memory", hypervisor)
    assert machine.run() is None
    assert machine.console == "31 pages hold what was written\n"


def test_memory_notices_a_lost_page() -> None:
    machine = Machine("memory", BootHypervisor.PKVM)
    lost = PRIVATE_BASE + 7 * PAGE
    translate = machine.translate

    def forgetful(va: int, access: str, el: int) -> tuple[int, int, bool, bool, bool]:
        if va == lost and access == "r":
            machine.ram.zero(lost, PAGE)
        pa, size, *_ = translate(va, access, el)
        return pa, size, access == "r" or va < PRIVATE_BASE + PAGE, access == "w" or va < PRIVATE_BASE + PAGE, access == "x"

    machine.cpu.translate = forgetful
    assert machine.run() is None
    assert machine.console == f"lost page {lost:016x}\n"


@BOTH
def test_shared_leaves_a_line(hypervisor: BootHypervisor) -> None:
    machine = Machine("shared", hypervisor)
    assert machine.run() is None
    assert machine.console == "line left in the shared window\n"
    assert machine.ram.read(PRIVATE_BASE + PRIVATE, len(SHARED_LINE) + 1) == SHARED_LINE + b"\0"
    assert machine.opened == ([SHARED_BASE] if hypervisor is BootHypervisor.PKVM else [])


def test_shared_without_a_window() -> None:
    machine = Machine("shared", BootHypervisor.GUNYAH, shared=0)
    assert machine.run() is None
    assert machine.console == "there is no shared window\n"


@BOTH
def test_relinquish_gives_one_page_up(hypervisor: BootHypervisor) -> None:
    machine = Machine("relinquish", hypervisor)
    page = PRIVATE_BASE + PRIVATE // 2
    assert machine.run() is None
    reads = {BootHypervisor.GUNYAH: "page still holds the secret\n", BootHypervisor.PKVM: "page reads zeros\n"}[hypervisor]
    assert machine.console == "page given up\n" + reads + "page in use again\n"
    assert machine.opened == [page]
    assert machine.ram.read64(page) == 1
    assert machine.calls == [{BootHypervisor.GUNYAH: 0xc600_8069, BootHypervisor.PKVM: 0xc600_0003}[hypervisor]]


@BOTH
def test_relinquish_sees_what_the_host_did(hypervisor: BootHypervisor) -> None:
    machine = Machine("relinquish", hypervisor)
    hypercall = machine.hypercall
    page = PRIVATE_BASE + PRIVATE // 2
    found = []

    def taken() -> None:
        hypercall()
        found.append(machine.ram.read(page, len(SECRET)))
        machine.ram.write(page, b"the host's")

    machine.hypercall = taken
    assert machine.run() is None
    assert machine.console == "page given up\npage holds something else\npage in use again\n"
    assert found == [SECRET if hypervisor is BootHypervisor.GUNYAH else bytes(len(SECRET))]


@BOTH
def test_mmu_runs_on_its_own_tables(hypervisor: BootHypervisor) -> None:
    machine = Machine("mmu", hypervisor)
    assert machine.run() is None
    assert machine.console == "MMU off\nMMU on\nsecond mapping agrees\n"
    assert machine.cpu.sysreg("SCTLR_EL1") & 1


def test_jump_nowhere_is_a_fetch_from_nowhere() -> None:
    stop = Machine("jump-nowhere", BootHypervisor.GUNYAH).run()
    assert isinstance(stop, CpuAbort)
    assert (stop.fault.access, stop.fault.ipa, stop.pc) == ("x", 0x70_0000_0000, 0x70_0000_0000)


def test_loop_ends_by_the_clock() -> None:
    assert Machine("loop", BootHypervisor.GUNYAH).run(timeout=0.05) == Expired()


def test_fault_forever_faults_again_after_every_delivery() -> None:
    machine = Machine("fault-forever", BootHypervisor.PKVM)
    stop = machine.run(deliver=5)
    assert isinstance(stop, CpuAbort)
    assert (stop.fault.access, stop.pc) == ("x", 0x70_0000_0200)


def test_outside_is_stopped_or_told() -> None:
    stop = Machine("outside", BootHypervisor.GUNYAH).run()
    assert isinstance(stop, CpuAbort)
    assert (stop.fault.access, stop.fault.ipa) == ("r", PRIVATE_BASE + PRIVATE)
    machine = Machine("outside", BootHypervisor.GUNYAH)
    assert machine.run(deliver=1) is None
    assert machine.console == f"guest: abort, esr 0000000096000010 far {PRIVATE_BASE + PRIVATE:016x}\n"


@BOTH
def test_bad_hypercalls_are_all_answered(hypervisor: BootHypervisor) -> None:
    machine = Machine("bad-hypercall", hypervisor)
    assert machine.run() is None
    assert machine.console.split() == [f"{NOT_SUPPORTED:016x}"] * 2 + [f"{INVALID:016x}"] * 3
    assert machine.opened == []


ARM64 = [name for name, found in GUESTS.items() if "arm64" in found.architectures]


@pytest.mark.parametrize("name", ARM64)
def test_every_guest_says_what_it_shows_and_fits_its_needs(name: str) -> None:
    found = guest(name)
    assert source("arm64", name).read_text(encoding="ascii").startswith("// ")
    assert found.title
    image = load(name)
    fits(image, [(PRIVATE_BASE, found.needs.private - PAGE)])       # a page is left to work with
    assert load(name, base=0xc000_0000).entry == 0xc000_0000


@pytest.mark.parametrize("name", [name for name in ARM64 if name != "loop"])
def test_without_boot_info_a_guest_only_powers_off(name: str) -> None:
    machine = Machine(name, BootHypervisor.GUNYAH)
    machine.ram.write(machine.cpu.x(0), bytes(8))
    assert machine.run() is None
    assert machine.console == ""


def test_an_unknown_guest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'hello'"):
        guest("helo")
