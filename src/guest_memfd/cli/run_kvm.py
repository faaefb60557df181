"""`gmem run --on kvm`: on the /dev/kvm of this machine. Words, exit codes and options are here; vmm/linux.py runs the
guest.

What kind of vCPU it is comes first: it decides whether a guest's touch of its memory takes guest_memfd's own fault path.
"""

from __future__ import annotations

import argparse
import platform
from typing import Any

from guest_memfd.cli.output import Output
from guest_memfd.cli.run import EMULATED, RUN, Lines, fill, log, refuse, size, tell
from guest_memfd.errors import HostUnavailable
from guest_memfd.guests.loader import load, read, x86_target
from guest_memfd.guests.target import ARM64, REAL_MODE, X86_64
from guest_memfd.report import json
from guest_memfd.vmm.layout import Layout
from guest_memfd.vmm.linux import LinuxOrder, LinuxReport
from guest_memfd.vmm.linux import run as run_guest
from guest_memfd.words.units import Ipa

_THEIRS = ("--design", "--folio", "--ram", "--reader", "--zeropad", "--perfetto", "--fail")
_FAULT_PATHS = {
    True: "native: what the guest touches for the first time is faulted in by kvm_gmem_get_pfn()",
    False: "emulated: KVM executes its instructions one by one and reaches the memory through userspace_addr, a mapping of "
           "the same guest_memfd; pages come by kvm_gmem_fault_user_mapping(), not by guest_memfd's path for guests",
    None: "of a kind that could not be found out",
}
_ENDINGS = {"timeout": "timeout", "crash": "the guest has crashed", "faults for ever": "the guest faults for ever"}


def run(arguments: argparse.Namespace) -> int:
    """Run the guest; returns 0 off, 2 crash, 3 timeout."""
    order = order_of(arguments)
    with Output(arguments.output) as out:
        with Lines((lambda _text: None) if arguments.json else out.write) as lines:
            report = run_guest(order, lines.say, log if arguments.verbose else lambda _text: None)
        code = exit_code(report)
        if report.failed is not None and not (report.exits or arguments.json):
            raise report.failed
        if arguments.json:
            out.write(json.dump(_object(arguments, order, report, code)))
    if report.exits:
        _tell(order, report, arguments.verbose)
    if report.failed is not None:
        raise report.failed
    return code


def order_of(arguments: argparse.Namespace) -> LinuxOrder:
    """Everything checked that can be without a VM; raises BadInput, UnknownName, HostUnavailable."""
    refuse(arguments, _THEIRS, f"is for emulated machines ({', '.join(EMULATED)}); here the kernel that runs is what it is")
    machine = platform.machine()
    if machine not in ("x86_64", "aarch64"):
        raise HostUnavailable(f"guests for the real /dev/kvm are x86-64 or arm64 programs, and this machine is {machine}; "
                              f"emulated hosts: {', '.join(EMULATED)}")
    if machine == "aarch64":
        refuse(arguments, ("--real-mode",), "is x86's, and this machine is arm64")
        fill(arguments, memory="16M", shared="64K")
        layout = Layout(size("--memory", arguments.memory), size("--shared", arguments.shared, least=0))
        image = load(read(arguments.guest, ARM64.architecture), ARM64)
        return LinuxOrder(image, ARM64.architecture, layout=layout, timeout=arguments.timeout)
    found = read(arguments.guest, X86_64.architecture)
    target = x86_target(found, bool(arguments.real_mode))
    real_mode = target is REAL_MODE
    fill(arguments, memory="512K" if real_mode else "16M", shared="64K")
    memory, shared = size("--memory", arguments.memory), size("--shared", arguments.shared, least=0)
    layout = Layout(memory, shared, base=Ipa(0)) if real_mode else Layout(memory, shared)
    return LinuxOrder(load(found, target), X86_64.architecture, real_mode, layout, arguments.timeout)


def exit_code(report: LinuxReport) -> int:
    """2 for a crash; 3 when the time was up; that of the error that stopped it; 0."""
    if report.failed is not None:
        return report.failed.exit_code
    assert report.ended is not None
    return {"off": 0, "reset": 0, "crash": 2, "faults for ever": 2, "timeout": 3}[report.ended.how]


def _mode(order: LinuxOrder) -> str:
    if order.architecture == ARM64.architecture:
        return "at EL1 with its MMU off"
    return "in real mode" if order.real_mode else "in 64-bit mode at CPL 3"


def _tell(order: LinuxOrder, report: LinuxReport, verbose: int) -> None:
    log(f"vCPU {_mode(order)}: {_FAULT_PATHS[report.native]}")
    if verbose:
        counted = ", ".join(f"{name} {count}" for name, count in sorted(report.statistics.items()) if count)
        log(f"KVM counts: {counted or 'nothing'}")
    tell(report, _ENDINGS, verbose)
    pages = "" if report.pages is None else f", {report.pages} pages of guest_memfd"
    log(f"{report.exits} exits{pages}, {report.seconds:.3f} s")


def _object(arguments: argparse.Namespace, order: LinuxOrder, report: LinuxReport, code: int) -> dict[str, Any]:
    ended = report.ended
    return {
        "schema": RUN, "guest": arguments.guest, "on": arguments.on, "exit_code": code,
        "vcpu": {"mode": _mode(order).partition(" ")[2], "native": report.native, "fault_path": _FAULT_PATHS[report.native]},
        "ended": ended.how if ended else None, "why": ended.why if ended else str(report.failed or ""),
        "console": report.console,
        "shared_window": None if report.window is None else report.window.rstrip(bytes(1)).decode("latin-1"),
        "registers": {name: hex(value) for name, value in (ended.registers if ended else {}).items()},
        "exits": report.exits, "pages": report.pages, "kvm_statistics": dict(sorted(report.statistics.items())),
        "seconds": round(report.seconds, 3),
    }
