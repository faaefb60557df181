"""`gmem run GUEST`: a real guest program whose memory comes from guest_memfd, and what becomes of it.

Options are here, and the words that do not depend on the host.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Self

from guest_memfd.cli.load import add_load, load_all
from guest_memfd.cli.options import add_output, seconds
from guest_memfd.errors import BadInput, UnknownName
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.report.style import style_for
from guest_memfd.words.units import PAGE

if TYPE_CHECKING:
    from guest_memfd.vmm.loop import LoopOutcome

RUN = "guest-memfd-run/1"
EMULATED = ("emulated:arm64/gunyah", "emulated:arm64/pkvm", "emulated:arm64/kvm")
_ARM64 = "emulated:arm64/"
_MODULES = {**dict.fromkeys(EMULATED, "run_emulated"), "kvm": "run_kvm"}
_UNITS = {"": 1, "K": 10, "M": 20, "G": 30, "T": 40}
_DIGITS = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this verb; those of one kind of host have no default here, so that they can be refused elsewhere."""
    parser.add_argument("guest", metavar="GUEST", help="a built-in guest (gmem list guests), a flat binary, assembly (.s), "
                                                       "or a static ELF")
    parser.add_argument("--on", metavar="HOST", default=EMULATED[0],
                        help=f"{', '.join(EMULATED)}, the same with a third party's hypervisor, emulated for the first of "
                             f"them, or kvm: the /dev/kvm of this machine ({EMULATED[0]})")
    add_load(parser)
    parser.add_argument("--memory", metavar="SIZE", help="private memory of the guest, at 0x80000000 (16M); "
                                                         "in real mode at 0 (512K)")
    parser.add_argument("--shared", metavar="SIZE", help="its window onto the host, at 0x80000 (64K; 0 with large folios)")
    parser.add_argument("--timeout", metavar="S", type=seconds, default=10.0, help="seconds that the guest may take (10)")
    parser.add_argument("-v", "--verbose", action="count", default=0,
                        help="exits, faults and what moves a folio or changes a table; -vv: every primitive")
    group = parser.add_argument_group("on an emulated machine")
    group.add_argument("--design", metavar="NAME", help="which design (gmem list designs; library)")
    group.add_argument("--folio", metavar="SIZE", help="folios to ask for: 4K, 2M or 1G (4K)")
    group.add_argument("--ram", metavar="SIZE", help="RAM of the machine (256M)")
    group.add_argument("--reader", metavar="NAME", help="what the host kernel reads when the guest has ended, before its "
                       "memory is given back: zeropad (a word load 4 bytes before a page of the guest's), kcore "
                       "(all of them), plain (one, by code that expects no fault)")
    group.add_argument("--zeropad", action="store_true", default=None, help="the same as --reader zeropad")
    group.add_argument("--perfetto", metavar="TRACE", help="write the run to TRACE for Perfetto or chrome://tracing as "
                       "well: operations, primitives, exits, and counters of what they cost")
    group.add_argument("--fail", metavar="WHO:N", help="let allocation N (from 0) of kernel, slab or el2 fail, once")
    group = parser.add_argument_group("on kvm")
    group.add_argument("--real-mode", action="store_true", default=None,
                       help="a flat binary is real-mode code, entered at 0:0x7c00 (assembly says .code16)")
    add_output(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the guest; returns 0 off, 2 crash, panic or a broken law, 3 timeout. Raises BadInput, HostUnavailable."""
    load_all(arguments)
    host, _, machine = arguments.on.partition(":")
    if arguments.on == "emulated":
        arguments.on = EMULATED[0]
    if host == "emulated" and machine.partition("/")[0] == "x86_64":
        raise BadInput(f"--on {arguments.on}: not yet; emulated machines are arm64 ({', '.join(EMULATED)}), and x86-64 "
                       "guests run on kvm, where this machine has one")
    modules = {**_MODULES, **{f"{_ARM64}{name}": "run_emulated" for name in _given_by_models(arguments.on)}}
    if arguments.on not in modules:
        own = f"; {_ARM64}NAME runs on a hypervisor of your own: --load FILE" if arguments.on.startswith(_ARM64) else ""
        raise UnknownName("host", arguments.on, modules, own)
    if not 0 < arguments.timeout < 1e9:
        raise BadInput(f"--timeout {arguments.timeout:g}: a number of seconds above 0 and below 1e9")
    module = import_module(f"guest_memfd.cli.{modules[arguments.on]}")
    return int(module.run(arguments))


# Hypervisors of third parties, if one may have been meant: to look for them takes time.
def _given_by_models(on: str) -> list[str]:
    if not on.startswith(_ARM64):
        return []
    return [name for name in HYPERVISORS if f"{_ARM64}{name}" not in _MODULES and not HYPERVISORS[name].encrypts]


def fill(arguments: argparse.Namespace, **defaults: str) -> None:
    """Give what was not given its value on this kind of host."""
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)


def refuse(arguments: argparse.Namespace, options: tuple[str, ...], why: str) -> None:
    """Raise BadInput if one of *options*, which belong to another kind of host, was given."""
    for option in options:
        if getattr(arguments, option.removeprefix("--").replace("-", "_")) is not None:
            raise BadInput(f"{option} {why}")


def size(option: str, text: str, least: int = PAGE) -> int:
    """Bytes: a number, hexadecimal with 0x, and perhaps K, M, G or T; raises BadInput unless whole pages."""
    match = re.fullmatch(r"(0x[0-9a-f]+|\d+)([KMGT]?)(iB|B)?", text.strip(), re.IGNORECASE | re.ASCII)
    if match is None:
        raise BadInput(f"{option} {text!r} is no size; write 64K, 16M or 2G")
    # int() of some thousand digits is an error of its own since Python 3.11, and one that says nothing of sizes.
    if len(match[1]) > _DIGITS:
        raise BadInput(f"{option}: a size of {len(match[1])} digits")
    number = int(match[1], 0 if match[1][:2].lower() == "0x" else 10)
    number = number if not match[2] else number << _UNITS[match[2].upper()]
    if number < least:
        raise BadInput(f"{option} {text}: at least a page, {PAGE} bytes")
    if number % PAGE:
        raise BadInput(f"{option} {text}: no multiple of a page, {PAGE} bytes")
    return number


# -- what came of it -------------------------------------------------------------------------------------------------

class Lines:
    """What the guest says, passed on a line at a time; at the end of the block also a line that the guest did not end."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write, self._kept = write, ""

    def say(self, text: str) -> None:
        """Take more of the guest's output; it is written as soon as it ends with a newline."""
        self._kept += text
        if text.endswith("\n"):
            self._pass_on()

    def _pass_on(self) -> None:
        if self._kept:
            self._write(self._kept)
        self._kept = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pass_on()


def log(text: str) -> None:
    """A line for people, wrapped on a terminal; if no one can get it, the guest runs all the same."""
    if sys.stderr.isatty():
        text = "\n".join(style_for(sys.stderr).wrap(text, "", "  ")) if text.strip() == text else text
    with suppress(OSError):
        print(text, file=sys.stderr)


def tell(outcome: LoopOutcome, endings: dict[str, str], verbose: int) -> None:
    """How it ended, in words, unless by the guest's own wish; with registers where they say something.

    Before that, with *verbose*, what it left in its shared window.
    """
    ended, window = outcome.ended, outcome.window
    if verbose and window is not None and any(window):
        log(f"shared window: {window.rstrip(bytes(1))!r}")
    if ended is None or ended.how not in endings:
        return
    log(f"gmem: {endings[ended.how]}: {ended.why}")
    if ended.how in ("crash", "faults for ever"):
        words = [f"{name:9} {value:016x}" for name, value in ended.registers.items()]
        for at in range(0, len(words), 4):
            log("  " + "  ".join(words[at:at + 4]))
