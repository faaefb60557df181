"""`gmem conform --kernel`: the real half in QEMU, on another kernel, and the emulated half here.

The guest gets the sequences and gives the answers, so it needs neither an emulator nor much time: one process a sequence.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence as List
from pathlib import Path
from typing import Any

from guest_memfd.cli.conform import compare_all, finish, release_of, sequences
from guest_memfd.cli.kernel import job_of, tell
from guest_memfd.cli.output import Output
from guest_memfd.conform.compare import BothHosts, Tally
from guest_memfd.conform.emulated import EmulatedWorld
from guest_memfd.conform.report import ConformReport, emulated_kvm
from guest_memfd.conform.sequence import Sequence, tables
from guest_memfd.conform.subject import StepAnswer
from guest_memfd.errors import BadInput, HostUnavailable
from guest_memfd.kernels import find
from guest_memfd.kernels.run import run

_THERE = "/sequences.json"


class Recorded:
    """Answers that have come already."""

    def __init__(self, answers: List[List[str]]) -> None:
        self._answers = [StepAnswer(*each) for each in answers]

    def answers(self) -> list[StepAnswer]:
        """All of them, at once."""
        return self._answers


def elsewhere(arguments: argparse.Namespace) -> int:
    """Ask the kernel, emulate, compare, print. Raises BadInput, HostUnavailable."""
    for name in ("replay", "save"):
        if getattr(arguments, name) is not None:
            raise BadInput(f"--{name} is for the kernel of this machine")
    release = release_of(arguments.release)
    table = [] if arguments.no_tables else list(tables())
    drawn = list(sequences(arguments, frozenset()))
    with Output(arguments.output) as out:
        said = ask(arguments, [*table, *drawn])
        skipped = said["skipped"]
        kept = [tuple(step for step in each if step.op not in skipped) for each in (*table, *drawn)]
        # By identity: two sequences may be equal, and a real kernel need not answer both alike.
        pairs = dict(zip(map(id, kept), said["answers"], strict=True))
        world = EmulatedWorld(release or said["release"], {"amd64": "x86_64"}.get(arguments.arch, arguments.arch),
                              arguments.design)
        pair = BothHosts(lambda each: Recorded(pairs[id(each)]), world)
        began, tabled, at_random = time.monotonic(), Tally(), Tally()
        for given, tally, resume in ((kept[:len(table)], tabled, True), (kept[len(table):], at_random, False)):
            compare_all(pair, given, len(given), tally, resume=resume, shrinks=False)
        emulated = emulated_kvm(world.release, arguments.design)
        return finish(arguments, ConformReport(said["kernel"], emulated, world.release, arguments.design, arguments.seed,
                                               tabled, at_random, time.monotonic() - began, skipped), None, out)


def ask(arguments: argparse.Namespace, given: list[Sequence], *options: str) -> dict[str, Any]:
    """What `gmem conform --answer` says in a guest, with *options*, of the sequences *given*.

    Raises HostUnavailable: the kernel or QEMU cannot be had, or it has nothing to compare with.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sequences.json"
        file.write_text(json.dumps([[[step.op, *step.args] for step in each] for each in given]), encoding="utf-8")
        job = job_of(arguments, ("gmem", "conform", *options, "--answer", _THERE), files=((file, _THERE),))
        answer = run(find.find(arguments.kernel, arguments.arch, tell, arguments.modules), job, tell)
    if answer.code:
        said = answer.err.strip().rpartition("\n")[2].removeprefix("gmem: ")
        raise HostUnavailable(f"{answer.kernel}: {said or f'exit code {answer.code}'}")
    found: dict[str, Any] = json.loads(answer.out)
    return found
