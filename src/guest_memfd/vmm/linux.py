"""One run of one guest on the kernel's own /dev/kvm. The kernel is asked what is there, before and after.

Before: can this kernel's guest_memfd be mapped, and does such a guest reach it by a fault of its own. After: the counters of
KVM_GET_STATS_FD. Everything that was opened is closed, whatever happens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from errno import EMFILE, ENOMEM

from guest_memfd.errors import GuestMemfdError, HostUnavailable, Signalled, SyscallFailed
from guest_memfd.guests.loader import GuestImage
from guest_memfd.guests.target import ARM64, X86_64
from guest_memfd.linux import fault_path
from guest_memfd.linux.system import System
from guest_memfd.vmm.devices import Console
from guest_memfd.vmm.kvm import KvmGuest
from guest_memfd.vmm.kvm_x86 import X86Guest, fit
from guest_memfd.vmm.layout import Layout
from guest_memfd.vmm.loop import LoopOutcome, drive

_HELP = {
    ENOMEM: "the machine, or a limit of this process (ulimit -v), has no room for it: give the guest less memory",
    EMFILE: "this process may open more descriptors with ulimit -n",
}
_REFUSED = "the KVM of this kernel refuses it; without: --on emulated:arm64/kvm"


@dataclass(frozen=True)
class LinuxOrder:
    """What to run, and how. *architecture*: of this machine, and the image. timeout: seconds."""

    image: GuestImage
    architecture: str = X86_64.architecture
    real_mode: bool = False
    layout: Layout = Layout()           # noqa: RUF009 - frozen
    timeout: float = 10.0


@dataclass
class LinuxReport(LoopOutcome):
    """What came of it. *native*: as `fault_path.native`; *pages* of its memory, None where the kernel did not tell."""

    native: bool | None = None
    pages: int | None = None
    statistics: Mapping[str, int] = field(default_factory=dict)


def run(order: LinuxOrder, say: Callable[[str], None], log: Callable[[str], None]) -> LinuxReport:
    """The whole life of a guest; *say* gets what it says, as it says it, and *log* what happens.

    Raises HostUnavailable, and BadInput for an image that does not fit; whatever else goes wrong is in the report, a call
    that fails as HostUnavailable.
    """
    # Before the kernel is asked: what does not fit is bad input whatever the kernel can do.
    arm64 = order.architecture == ARM64.architecture
    if arm64:
        order.layout.boot_info(order.image)
    else:
        fit(order.layout, order.image, order.real_mode)
    report, console = LinuxReport(), Console(say)
    with System() as system:
        if why := system.lacks_shared():
            raise HostUnavailable(f"{why}; without: --on emulated:arm64/kvm")
        try:
            report.native = arm64 or fault_path.native(system, order.real_mode)     # KVM emulates no arm64
            with ExitStack() as stack:
                _inside(order, system, stack, console, report, log)
        except HostUnavailable:
            raise
        except SyscallFailed as error:
            report.failed = HostUnavailable(f"{error}; {_HELP.get(error.errno, _REFUSED)}")
        except GuestMemfdError as error:
            report.failed = error
    console.end()
    report.console = console.text
    return report


def _inside(order: LinuxOrder, system: System, stack: ExitStack, console: Console, report: LinuxReport,
            log: Callable[[str], None]) -> None:
    guest: KvmGuest | X86Guest = (
        KvmGuest(system, order.layout, order.image, console, stack, log, converts=False)
        if order.architecture == ARM64.architecture
        else X86Guest(system, order.layout, order.image, order.real_mode, console, stack, log))
    began = time.perf_counter()
    try:
        report.ended = drive(guest, order.timeout)
    finally:
        report.seconds = time.perf_counter() - began
        report.exits = guest.exits
        _count(guest, report, log)


# What cannot be counted here is left out: the guest has run all the same.
def _count(guest: KvmGuest | X86Guest, report: LinuxReport, log: Callable[[str], None]) -> None:
    try:
        report.statistics = guest.vcpu.statistics()
        report.pages = guest.memory.resident()
        report.window = guest.window()
    except (HostUnavailable, Signalled, SyscallFailed) as error:
        log(f"not counted: {error}")
