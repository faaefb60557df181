"""`gmem conform`: the same calls on the real /dev/kvm and on the emulated one, compared after every call."""

from __future__ import annotations

import argparse
import json as text_json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from guest_memfd.cli.kernel import add_machine
from guest_memfd.cli.options import add_output, whole
from guest_memfd.cli.output import Output
from guest_memfd.errors import BadInput, HostUnavailable
from guest_memfd.report import json
from guest_memfd.report.progress import Progress
from guest_memfd.uapi.kvm import PATH

if TYPE_CHECKING:
    from guest_memfd.conform.compare import BothHosts, Difference, Tally
    from guest_memfd.conform.report import ConformReport
    from guest_memfd.conform.sequence import Sequence

REPLAY = "guest-memfd-conform-replay/1"
OPERATIONS = 20_000
MOST = 10
"""Differences, each of another operation or answer, after which there is no point in looking for more."""

EXIT_CODES = """\
exit codes: 0 no difference without a known reason, 2 there is one (a replay: the file's last step is answered in two ways),
1 failure of gmem itself, 4 bad input, 5 no /dev/kvm here, or none whose guest_memfd can be mapped."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this verb."""
    parser.epilog = EXIT_CODES
    group = parser.add_argument_group("what to compare")
    group.add_argument("--pkvm", action="store_true", help="a protected guest with anonymous memory instead: "
                       "upstream's pKVM, 7.1 or later, in QEMU, against the emulated pKVM")
    group.add_argument("--operations", metavar="N", type=whole,
                       help=f"drawn at random, in sequences (default {OPERATIONS}; with --pkvm 1500)")
    group.add_argument("--seed", metavar="N", type=whole, default=1, help="of what is drawn (default 1)")
    group.add_argument("--no-tables", action="store_true", help="leave out the tables: every operation with every edge")
    group.add_argument("--replay", metavar="FILE", help="this sequence alone, as --save has written it")
    group.add_argument("--save", metavar="FOLDER", type=Path, help="write every difference there, as a file to replay "
                       "and as a C program")
    group.add_argument("--release", metavar="R", help="the release that the emulated device speaks for: 6.18, 7.2, 7.3, 7.4 "
                       "(default: whose answers the kernel gives)")
    group.add_argument("--design", metavar="NAME", default="library", help="who serves the emulated files (default library)")
    group.add_argument("--kvm", metavar="PATH", default=PATH, help=f"the device node of KVM (default {PATH})")
    group.add_argument("--answer", metavar="FILE", help="only the real half: perform the sequences of FILE and print the "
                       "answers, for --kernel")
    group = parser.add_argument_group("on another kernel, in QEMU")
    group.add_argument("--kernel", metavar="KERNEL", help="as for gmem kernel run; differences are not shrunk there")
    add_machine(parser)
    add_output(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compare and print; 2 when something differs for which there is no known reason."""
    if arguments.operations is not None and arguments.operations < 0:
        raise BadInput(f"--operations {arguments.operations}: 0 at least")
    if not sys.platform.startswith("linux"):
        raise HostUnavailable(f"gmem conform needs a Linux kernel; this is {sys.platform}")
    if arguments.pkvm:
        from guest_memfd.cli import conform_pkvm

        return conform_pkvm.compare(arguments) if arguments.answer is None else conform_pkvm.answer(arguments)
    if arguments.answer is not None:
        return _answer(arguments)
    if arguments.kernel is not None:
        from guest_memfd.cli.conform_kernel import elsewhere

        return elsewhere(arguments)
    return _here(arguments)


def _here(arguments: argparse.Namespace) -> int:
    from guest_memfd.conform.child import Child
    from guest_memfd.conform.compare import BothHosts, Tally
    from guest_memfd.conform.emulated import EmulatedWorld
    from guest_memfd.conform.linux import LinuxSubject, lacking
    from guest_memfd.conform.release import shown
    from guest_memfd.conform.report import ConformReport, emulated_kvm
    from guest_memfd.conform.sequence import read, tables

    given = None if arguments.replay is None else read(arguments.replay)
    folder = _folder(arguments.save)
    release = release_of(arguments.release) or shown(arguments.kvm)
    skipped = lacking(arguments.kvm)
    world = EmulatedWorld(release, {"aarch64": "arm64"}.get(platform.machine(), platform.machine()), arguments.design)
    pair = BothHosts(partial(Child, partial(LinuxSubject, arguments.kvm)), world)
    kernel = f"{arguments.kvm} of Linux {platform.release()}, {platform.machine()}"
    with Output(arguments.output) as out:
        if given is not None:
            return _replay(arguments, pair, given, out)
        began, table, drawn = time.monotonic(), Tally(), Tally()
        names = frozenset(skipped)
        if not arguments.no_tables:
            rows = list(tables(names))
            compare_all(pair, rows, len(rows), table, resume=True)
        compare_all(pair, sequences(arguments, names), sequence_count(arguments), drawn, resume=False)
        emulated = emulated_kvm(release, arguments.design)
        report = ConformReport(kernel, emulated, release, arguments.design, arguments.seed, table, drawn,
                               time.monotonic() - began, skipped)
        return finish(arguments, report, folder, out)


def release_of(given: str | None) -> str | None:
    """What `--release` says; raises UnknownName for one whose answers are not known."""
    from guest_memfd.machine.dev.kvm.release import rules

    return None if given is None else rules(given, "arm64").release


def sequence_count(arguments: argparse.Namespace) -> int:
    """How many random sequences come to the number of operations that was asked for."""
    from guest_memfd.conform.sequence import LENGTH

    return -(-int(OPERATIONS if arguments.operations is None else arguments.operations) // LENGTH)


def sequences(arguments: argparse.Namespace, skipped: frozenset[str]) -> Iterator[Sequence]:
    """So many random sequences, one after the other."""
    from guest_memfd.conform.sequence import random_sequence

    return (random_sequence(arguments.seed, number, skipped) for number in range(sequence_count(arguments)))


def compare_all(
    pair: BothHosts, given: Iterable[Sequence], total: int, tally: Tally, *, resume: bool, shrinks: bool = True,
) -> None:
    """Compare *given*, *total* sequences, and shrink each difference that is not like one that was found before."""
    from guest_memfd.conform.compare import Tally
    from guest_memfd.conform.shrink import shrink

    seen = set[tuple[str, str, str]]()
    with Progress() as progress:
        for number, sequence in enumerate(given):
            progress(number, total, "sequences")
            found = pair.compare(sequence, tally, resume=resume)
            if found is None:
                continue
            # One of a kind is enough: a mistake that is in every sequence would be shrunk for a minute each time.
            kind = found.step.op, found.real.said, found.emulated.said
            if kind in seen:
                continue
            seen.add(kind)
            attempt: Callable[[Sequence], Difference | None] = lambda each: pair.compare(each, Tally())     # noqa: E731
            tally.differences.append(shrink(found, attempt) if shrinks else found)
            if len(seen) >= MOST:
                return


def finish(arguments: argparse.Namespace, report: ConformReport, folder: Path | None, out: Output) -> int:
    """Print, save, and say it by the exit code."""
    from guest_memfd.conform.report import as_dict, as_text

    out.write(json.dump(as_dict(report)) if arguments.json else "\n".join(as_text(report, out.style)))
    if folder is not None:
        for number, found in enumerate(report.differences, 1):
            _save(folder / f"difference-{number}", found, report)
    return 2 if report.differences else 0


def _folder(given: Path | None) -> Path | None:
    if given is not None:
        try:
            given.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"--save {given}: {error.strerror}") from error
    return given


def _save(base: Path, found: Difference, report: ConformReport) -> None:
    from guest_memfd.conform.c_program import program
    from guest_memfd.conform.sequence import as_json

    more = {"kernel": report.kernel, "release": report.release, "real": list(found.real), "emulated": list(found.emulated)}
    says = (f"On {report.kernel}: {found.step}\nreal      {found.real}\nemulated  {found.emulated}")
    try:
        base.with_suffix(".json").write_text(json.dump(as_json(found.sequence, **more)) + "\n", encoding="utf-8")
        base.with_suffix(".c").write_text(program(found.sequence, says), encoding="utf-8")
    except OSError as error:
        raise BadInput(f"--save {base}: {error.strerror}") from error


def _replay(arguments: argparse.Namespace, pair: BothHosts, given: Sequence, out: Output) -> int:
    from guest_memfd.conform.compare import Tally
    from guest_memfd.conform.report import difference_text

    tally = Tally()
    found = pair.compare(given, tally, resume=True)
    if arguments.json:
        told = {"schema": REPLAY, "same": found is None, "known": dict(tally.known)}
        if found is not None:
            told |= {"at": len(found.sequence), "real": list(found.real), "emulated": list(found.emulated)}
        out.write(json.dump(told))
    elif found is None:
        known = f", {', '.join(tally.known)} apart" if tally.known else ""
        out.write(f"{len(given)} steps, answered alike{known}")
    else:
        out.write("\n".join(difference_text(found, out.style, "answered in two ways")))
    return 0 if found is None else 2


# In the guest of another kernel. The sequences come from us, and have been looked at.
def _answer(arguments: argparse.Namespace) -> int:
    from guest_memfd.conform.child import Child
    from guest_memfd.conform.linux import LinuxSubject, lacking
    from guest_memfd.conform.operations import UserCall
    from guest_memfd.conform.release import shown

    given = text_json.loads(Path(arguments.answer).read_text(encoding="utf-8"))
    release, skipped = shown(arguments.kvm), lacking(arguments.kvm)
    make = partial(LinuxSubject, arguments.kvm)
    # Left out here as the other side does: answers are matched by their place.
    kept = (tuple(UserCall(op, tuple(args)) for op, *args in steps if op not in skipped) for steps in given)
    answers = [Child(make, sequence).answers() for sequence in kept]
    with Output(arguments.output) as out:
        out.write(text_json.dumps({"kernel": f"Linux {platform.release()}, {platform.machine()}", "release": release,
                                   "skipped": skipped, "answers": answers}))
    return 0
