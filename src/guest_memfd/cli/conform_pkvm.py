"""`gmem conform --pkvm`: a protected guest on upstream's pKVM in QEMU, and the same guest on the emulated pKVM here."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from guest_memfd.cli.conform import compare_all, finish
from guest_memfd.cli.conform_kernel import Recorded, ask
from guest_memfd.cli.output import Output
from guest_memfd.conform.child import Child
from guest_memfd.conform.compare import BothHosts, Tally
from guest_memfd.conform.known import PKVM_KNOWN
from guest_memfd.conform.operations import PKVM_OPERATIONS, UserCall
from guest_memfd.conform.pkvm.linux import LinuxPkvm, without_protection
from guest_memfd.conform.pkvm.sequences import LENGTH, random_sequence, tables
from guest_memfd.conform.report import ConformReport
from guest_memfd.conform.sequence import Sequence
from guest_memfd.errors import BadInput, HostUnavailable
from guest_memfd.kernels import find

OPERATIONS = 1_500
"""Drawn at random, unless it is said how many; with the tables QEMU takes two minutes of CPU."""

_RELEASE = "7.3"
"""Whose mem_protect.c the emulated EL2 is (machine/el2/pkvm/)."""
_SKIPPED = {"share of an address without a slot": "on 7.3.4 the vCPU never comes back from KVM_RUN"}


def compare(arguments: argparse.Namespace) -> int:
    """Ask the kernel, emulate, compare, print. Raises BadInput, HostUnavailable."""
    for name in ("replay", "save", "release"):
        if getattr(arguments, name) is not None:
            raise BadInput(f"--{name} is for the kernel of this machine, and --pkvm runs in QEMU")
    from guest_memfd.conform.pkvm.emulated import EmulatedPkvmWorld

    arguments.arch = "arm64"
    arguments.append = f"kvm-arm.mode=protected {arguments.append}"
    arguments.kernel = arguments.kernel or _newest()
    table = [] if arguments.no_tables else list(tables())
    drawn = list(_random(arguments))
    with Output(arguments.output) as out:
        said = ask(arguments, [*table, *drawn], "--pkvm")
        # In order, for a Recorded is asked for once a sequence: nothing is shrunk here, and nothing skipped.
        answers = iter(said["answers"])
        pair = BothHosts(lambda _: Recorded(next(answers)), EmulatedPkvmWorld(), PKVM_KNOWN)
        began, tabled, at_random = time.monotonic(), Tally(), Tally()
        for given, tally in ((table, tabled), (drawn, at_random)):
            compare_all(pair, given, len(given), tally, resume=False, shrinks=False)
        return finish(arguments, ConformReport(
            f"pKVM of {said['kernel']}", f"pKVM of {_RELEASE}, with the anonymous memory of a process", _RELEASE, "",
            arguments.seed, tabled, at_random, time.monotonic() - began, _SKIPPED, PKVM_KNOWN, PKVM_OPERATIONS), None, out)


def answer(arguments: argparse.Namespace) -> int:
    """In the guest: perform what was asked. Raises HostUnavailable where there are no protected VMs."""
    if why := without_protection(arguments.kvm):
        raise HostUnavailable(why)
    given = json.loads(Path(arguments.answer).read_text(encoding="utf-8"))
    make = partial(LinuxPkvm, arguments.kvm)
    answers = [Child(make, tuple(UserCall(op, tuple(args)) for op, *args in steps)).answers() for steps in given]
    with Output(arguments.output) as out:
        out.write(json.dumps({"kernel": f"Linux {platform.release()}, {platform.machine()}", "answers": answers}))
    return 0


def _random(arguments: argparse.Namespace) -> Iterator[Sequence]:
    operations = OPERATIONS if arguments.operations is None else arguments.operations
    return (random_sequence(arguments.seed, number) for number in range(-(-operations // LENGTH)))


def _newest() -> str:
    found = find.releases("arm64")
    if not found:
        raise HostUnavailable("no kernel for arm64 can be had; --kernel names the path of an image")
    return found[-1]
