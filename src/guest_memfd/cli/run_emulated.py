"""`gmem run` on an emulated machine. Words, exit codes and options are here; vmm/emulated.py runs the guest."""

from __future__ import annotations

import argparse
import re
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from guest_memfd.cli.output import opened
from guest_memfd.cli.run import RUN, Lines, fill, log, refuse, size, tell
from guest_memfd.errors import BadInput, HostUnavailable, UnknownName
from guest_memfd.export.perfetto import Recorder
from guest_memfd.guests.loader import load
from guest_memfd.report import json
from guest_memfd.vmm.emulated import EmulatedOrder, EmulatedReport, EmulatedRun
from guest_memfd.vmm.layout import Layout
from guest_memfd.vmm.readers import READERS
from guest_memfd.words.units import PAGE

FOLIOS = {"4K": 4 << 10, "2M": 2 << 20, "1G": 1 << 30}


def run(arguments: argparse.Namespace) -> int:
    """Run the guest; returns 0 off, 2 crash, panic or a broken law, 3 timeout."""
    order = order_of(arguments)
    with ExitStack() as stack:
        out, (target,) = opened(stack, arguments, "perfetto")
        recorder = None if target is None else Recorder()
        order = replace(order, record=recorder)
        with Lines((lambda _text: None) if arguments.json else out.write) as lines:
            report = EmulatedRun(order, lines.say, log).run()
        code = exit_code(report)
        if target is not None and recorder is not None:
            about = {"run": f"{arguments.guest} on {arguments.on}", "design": arguments.design}
            target.write(json.dump(recorder.file(about)))
        if isinstance(report.failed, HostUnavailable) and not arguments.json:
            raise report.failed
        if arguments.json:
            out.write(json.dump(_object(arguments, report, code)))
        elif report.panic or report.read:
            out.write(report.panic or _read_line(report))
    _tell(report, arguments)
    if report.failed is not None and code == report.failed.exit_code:
        raise report.failed
    return code


# -- what was asked for ----------------------------------------------------------------------------------------------

def order_of(arguments: argparse.Namespace) -> EmulatedOrder:
    """Everything checked that can be before a machine is built; raises BadInput, UnknownName, HostUnavailable."""
    refuse(arguments, ("--real-mode",), "is for --on kvm: the emulated machines are arm64's")
    fill(arguments, memory="16M", ram="256M", folio="4K", design="library")
    memory, ram, folio = size("--memory", arguments.memory), size("--ram", arguments.ram), _folio(arguments.folio)
    fill(arguments, shared="64K" if folio == PAGE else "0")
    if ram < 16 << 20:
        raise BadInput(f"--ram {arguments.ram}: a machine needs 16M at least")
    if memory > ram:
        raise BadInput(f"--memory {arguments.memory}: more than the machine's RAM, {arguments.ram}")
    reader = "zeropad" if arguments.zeropad else arguments.reader
    if arguments.zeropad and arguments.reader not in (None, "zeropad"):
        raise BadInput(f"--zeropad and --reader {arguments.reader} exclude each other")
    if reader not in (None, "none", *READERS):
        raise UnknownName("reader", reader, ("none", *READERS))
    layout = Layout(memory, size("--shared", arguments.shared, least=0), folio)
    hypervisor = arguments.on.rpartition("/")[2]
    return EmulatedOrder(load(arguments.guest), hypervisor, arguments.design, layout, ram, arguments.timeout,
                 None if reader == "none" else reader, arguments.verbose, _fail(arguments.fail))


def _folio(text: str) -> int:
    if text.upper() not in FOLIOS:
        raise UnknownName("folio size", text, FOLIOS)
    return FOLIOS[text.upper()]


def _fail(text: str | None) -> Any:
    if text is None:
        return None
    who, _, number = text.partition(":")
    if who not in ("kernel", "el2", "slab") or not re.fullmatch(r"[0-9]{1,9}", number):
        raise BadInput(f"--fail {text}: kernel:N (pages), slab:N (small objects) or el2:N; N counts allocations from 0")
    return who, int(number)


# -- what came of it -------------------------------------------------------------------------------------------------

def exit_code(report: EmulatedReport) -> int:
    """2 for a broken law, a crash or a panic; 3 when the time was up; that of the error that stopped it; 0."""
    if report.broken or report.panic:
        return 2
    if report.failed is not None:
        return report.failed.exit_code
    assert report.ended is not None
    return {"off": 0, "reset": 0, "timeout": 3}.get(report.ended.how, 2)


def _read_line(report: EmulatedReport) -> str:
    read = report.read
    assert read is not None
    if read.reader == "kcore":
        return f"host: kcore: {read.how}"
    return f"host: {read.reader} at {read.address:#x}: {read.word:#018x}, {read.how}"


# Everything that is not the guest's own word.
def _tell(report: EmulatedReport, arguments: argparse.Namespace) -> None:
    if arguments.verbose:
        for line in report.log:
            log(f"host: {line}")
    for split, most in report.splits:
        log(f"host: leaves that a file has split, of those it can: direct map {split.direct_map:,} of {most.direct_map:,}, "
            f"host's stage 2 {split.host:,} of {most.host:,}, guest's {split.guest:,} of {most.guest:,}; "
            f"table pages {split.table_pages:,}")
    tell(report, _ENDINGS, arguments.verbose)
    for broken in report.broken:
        log(f"gmem: law {broken.law} is broken: {broken.evidence} (in {broken.where})")
    if isinstance(report.failed, BadInput):
        return                                          # nothing was run
    pace = f"{report.instructions / report.seconds:,.0f} a second" if report.seconds else "none"
    log(f"{report.exits} exits, {report.faults} faults, {report.folios} folios, {report.instructions} instructions, {pace}")


_ENDINGS = {"timeout": "timeout", "crash": "the guest has crashed", "faults for ever": "the guest faults for ever",
            "panic": "the host has panicked"}


def _object(arguments: argparse.Namespace, report: EmulatedReport, code: int) -> dict[str, Any]:
    ended, read = report.ended, report.read
    return {
        "schema": RUN, "guest": arguments.guest, "on": arguments.on, "design": arguments.design, "exit_code": code,
        "ended": ended.how if ended else None, "why": ended.why if ended else str(report.failed or ""),
        "console": report.console, "panic": report.panic or None,
        "read": None if read is None else {**read._asdict(), "address": hex(read.address), "word": hex(read.word)},
        "shared_window": None if report.window is None else report.window.rstrip(bytes(1)).decode("latin-1"),
        "broken": [broken._asdict() for broken in report.broken], "host_log": report.log,
        "registers": {name: hex(value) for name, value in (ended.registers if ended else {}).items()},
        "exits": report.exits, "faults": report.faults, "folios": report.folios, "instructions": report.instructions,
        "primitives": dict(sorted(report.primitives.items())), "seconds": round(report.seconds, 3),
    }
