"""`gmem run GUEST`: a real guest program whose memory comes from guest_memfd, and what becomes of the host.

Rule of this file: words, exit codes and options. stdout is what the guest says (and a host that panics); everything else
goes to stderr. Running is vmm/'s.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from guest_memfd.cli.options import add_output, seconds
from guest_memfd.cli.output import Output
from guest_memfd.errors import BadInput, HostUnavailable, UnknownName

if TYPE_CHECKING:
    from guest_memfd.vmm.emulated import Order, Report

RUN = "guest-memfd-run/1"
PLACES = ("emulated:arm64/gunyah", "emulated:arm64/pkvm", "emulated:arm64/kvm")
FOLIOS = {"4K": 4 << 10, "2M": 2 << 20, "1G": 1 << 30}
_UNITS = {"": 1, "K": 10, "M": 20, "G": 30, "T": 40}
_PAGE = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this verb."""
    parser.add_argument("guest", metavar="GUEST", help="a built-in guest (gmem list guests), a flat binary, assembly (.s), "
                                                       "or a static ELF")
    parser.add_argument("--on", metavar="HOST", default=PLACES[0], help=f"{', '.join(PLACES)}, or kvm ({PLACES[0]})")
    parser.add_argument("--design", metavar="NAME", default="library", help="which design (gmem list designs)")
    parser.add_argument("--memory", metavar="SIZE", default="16M", help="private memory of the guest, at 0x80000000 (16M)")
    parser.add_argument("--shared", metavar="SIZE", help="its window onto the host, at 0x80000 (64K; 0 with large folios)")
    parser.add_argument("--folio", metavar="SIZE", default="4K", help="folios to ask for: 4K, 2M or 1G (4K)")
    parser.add_argument("--ram", metavar="SIZE", default="256M", help="RAM of the machine (256M)")
    parser.add_argument("--timeout", metavar="S", type=seconds, default=10.0, help="seconds that the guest may take (10)")
    parser.add_argument("--reader", metavar="NAME", help="what the host kernel reads when the guest has ended, before its "
                        "memory is given back: zeropad (a word load 4 bytes before a page of the guest's), kcore "
                        "(all of them), plain (one, by code that expects no fault)")
    parser.add_argument("--zeropad", action="store_true", help="the same as --reader zeropad")
    parser.add_argument("--fail", metavar="WHO:N", help="let allocation N (from 0) of kernel, slab or el2 fail, once")
    parser.add_argument("-v", "--verbose", action="count", default=0,
                        help="exits, faults and what moves a folio or changes a table; -vv: every primitive")
    add_output(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the guest; returns 0 off, 2 crash, panic or a broken law, 3 timeout."""
    order = order_of(arguments)
    from guest_memfd.vmm.emulated import Run

    with Output(arguments.output) as out:
        lines = _Lines((lambda _text: None) if arguments.json else out.write)
        report = Run(order, lines.say, _log).run()
        lines.end()
        code = exit_code(report)
        if arguments.json:
            from guest_memfd.report import json

            out.write(json.dump(_object(arguments, report, code)))
        elif report.panic or report.read:
            out.write(report.panic or _read_line(report))
    _tell(report, arguments)
    if report.failed is not None and code == report.failed.exit_code:
        raise report.failed
    return code


# -- what was asked for ----------------------------------------------------------------------------------------------

def order_of(arguments: argparse.Namespace) -> Order:
    """Everything checked that can be before a machine is built; raises BadInput, UnknownName, HostUnavailable."""
    hypervisor = _hypervisor(arguments.on)
    if not 0 < arguments.timeout < 1e9:
        raise BadInput(f"--timeout {arguments.timeout:g}: a number of seconds above 0")
    memory, ram = size("--memory", arguments.memory), size("--ram", arguments.ram)
    folio = _folio(arguments.folio)
    shared = arguments.shared if arguments.shared is not None else "64K" if folio == _PAGE else "0"
    if ram < 16 << 20:
        raise BadInput(f"--ram {arguments.ram}: a machine needs 16M at least")
    if memory > ram:
        raise BadInput(f"--memory {arguments.memory}: more than the machine's RAM, {arguments.ram}")
    from guest_memfd.guests.loader import load
    from guest_memfd.vmm.emulated import Order
    from guest_memfd.vmm.layout import Layout
    from guest_memfd.vmm.readers import READERS

    reader = "zeropad" if arguments.zeropad else arguments.reader
    if arguments.zeropad and arguments.reader not in (None, "zeropad"):
        raise BadInput(f"--zeropad and --reader {arguments.reader} exclude each other")
    if reader not in (None, "none", *READERS):
        raise UnknownName("reader", reader, ("none", *READERS))
    layout = Layout(memory, size("--shared", shared, least=0), folio)
    return Order(load(arguments.guest), hypervisor, arguments.design, layout, ram, arguments.timeout,
                 None if reader == "none" else reader, arguments.verbose, _fail(arguments.fail))


def _hypervisor(place: str) -> str:
    if place == "kvm":
        raise HostUnavailable("--on kvm: running guests on the real /dev/kvm is not there yet; "
                              f"emulated hosts: {', '.join(PLACES)}")
    if place not in PLACES:
        raise UnknownName("host", place, (*PLACES, "kvm"))
    return place.rpartition("/")[2]


def size(option: str, text: str, least: int = _PAGE) -> int:
    """Bytes: a number, hexadecimal with 0x, and perhaps K, M, G or T; raises BadInput unless whole pages."""
    match = re.fullmatch(r"(0x[0-9a-f]+|\d+)([KMGT]?)(iB|B)?", text.strip(), re.IGNORECASE | re.ASCII)
    if match is None:
        raise BadInput(f"{option} {text!r} is no size; write 64K, 16M or 2G")
    number = int(match[1], 0 if match[1][:2].lower() == "0x" else 10)
    number = number if not match[2] else number << _UNITS[match[2].upper()]
    if number < least:
        raise BadInput(f"{option} {text}: at least a page, {_PAGE} bytes")
    if number % _PAGE:
        raise BadInput(f"{option} {text}: no multiple of a page, {_PAGE} bytes")
    return number


def _folio(text: str) -> int:
    if text.upper() not in FOLIOS:
        raise UnknownName("folio size", text, FOLIOS)
    return FOLIOS[text.upper()]


def _fail(text: str | None) -> Any:
    if text is None:
        return None
    who, _, number = text.partition(":")
    if who not in ("kernel", "el2", "slab") or not number.isdecimal():
        raise BadInput(f"--fail {text}: kernel:N (pages), slab:N (small objects) or el2:N; N counts allocations from 0")
    return who, int(number)


# -- what came of it -------------------------------------------------------------------------------------------------

def exit_code(report: Report) -> int:
    """2 for a broken law, a crash or a panic; 3 when the time was up; that of the error that stopped it; 0."""
    if report.broken or report.panic:
        return 2
    if report.failed is not None:
        return report.failed.exit_code
    assert report.ended is not None
    return {"off": 0, "reset": 0, "timeout": 3}.get(report.ended.how, 2)


class _Lines:
    """What the guest says, passed on a line at a time; `end` passes on a line that the guest did not end."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write, self._kept = write, ""

    def say(self, text: str) -> None:
        """More of it."""
        self._kept += text
        if text.endswith("\n"):
            self.end()

    def end(self) -> None:
        """There is no more."""
        if self._kept:
            self._write(self._kept)
        self._kept = ""


def _log(text: str) -> None:
    print(text, file=sys.stderr)


def _read_line(report: Report) -> str:
    read = report.read
    assert read is not None
    if read.reader == "kcore":
        return f"host: kcore: {read.how}"
    return f"host: {read.reader} at {read.address:#x}: {read.word:#018x}, {read.how}"


# Everything that is not the guest's own word.
def _tell(report: Report, arguments: argparse.Namespace) -> None:
    if arguments.verbose:
        for line in report.log:
            _log(f"host: {line}")
        if report.window is not None and any(report.window):
            _log(f"shared window: {report.window.rstrip(bytes(1))!r}")
    ended = report.ended
    if ended is not None and ended.how not in ("off", "reset"):
        _log(f"gmem: {_ENDINGS[ended.how]}: {ended.why}")
        if ended.how in ("crash", "faults for ever"):
            _registers(ended.registers)
    for broken in report.broken:
        _log(f"gmem: law {broken.law} is broken: {broken.evidence} (in {broken.where})")
    pace = f"{report.instructions / report.seconds:,.0f} a second" if report.seconds else "none"
    _log(f"{report.exits} exits, {report.faults} faults, {report.folios} folios, {report.instructions} instructions, {pace}")


_ENDINGS = {"timeout": "timeout", "crash": "the guest has crashed", "faults for ever": "the guest faults for ever",
            "panic": "the host has panicked"}


def _registers(registers: Mapping[str, int]) -> None:
    words = [f"{name:9} {value:016x}" for name, value in registers.items()]
    for at in range(0, len(words), 4):
        _log("  " + "  ".join(words[at:at + 4]))


def _object(arguments: argparse.Namespace, report: Report, code: int) -> dict[str, Any]:
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
