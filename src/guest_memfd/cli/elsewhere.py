"""Third parties' code once more in two other interpreters: what follows a hash, an address or a process number differs.

What goes to another interpreter, and what comes back, is text. Where none can be started nothing is said.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from guest_memfd.cli.load import load
from guest_memfd.cli.options import Scope
from guest_memfd.designs import DESIGNS
from guest_memfd.errors import DesignRaised, GuestMemfdError
from guest_memfd.explore.suite.plan import NAMED
from guest_memfd.explore.suite.pool import end_with
from guest_memfd.explore.world.scenario import world
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.plugins.guard import foreign
from guest_memfd.scenarios import PARTIES

Pairs = Sequence[tuple[str, str]]
Walks = list[tuple[str, list[str]]]
"""Of each pair, and each party: who it is, in words, and each step."""


def same_elsewhere(pairs: Pairs, scope: Scope, loads: Sequence[str]) -> None:
    """Walk the first paths of *pairs* here and in other interpreters; raises DesignRaised where they part."""
    parties = scope.parties or (NAMED.get(scope.scenario) if scope.scenario else None) or tuple(PARTIES)
    theirs = any(foreign(PARTIES[name].procedure) for name in parties if name in PARTIES)
    pairs = [pair for pair in pairs if theirs or foreign(DESIGNS[pair[0]], HYPERVISORS[pair[1]].ops,
                                                         *HYPERVISORS[pair[1]].hypercalls.values())]
    if not pairs:
        return
    scene = scope.scenes[0] if scope.scenes else "two-pages"
    here = _walks(pairs, scene, parties)
    question = json.dumps({"path": sys.path, "loads": loads, "pairs": pairs, "scene": scene, "parties": parties,
                           "parent": os.getpid()})
    for there in _ask(question):
        _compare(here, there)


def _compare(here: Walks, there: Walks) -> None:
    parties = [[who for who, _ in walks] for walks in (here, there)]
    if parties[0] != parties[1]:
        raise DesignRaised(f"which parties exist is not deterministic: {'; '.join(parties[0])}, and in another process "
                           f"{'; '.join(parties[1])}")
    for (who, mine), (_, others) in zip(here, there, strict=True):
        for at, (first, second) in enumerate(itertools.zip_longest(mine, others, fillvalue="nothing more")):
            if first != second:
                raise DesignRaised(f"{who} is not deterministic: after the same {at} results it did {first}, and in another "
                                   f"process {second}; what it does must follow from the results alone")


def _walks(pairs: Pairs, scene: str, parties: Sequence[str]) -> Walks:
    walks: Walks = []
    for design, hypervisor in pairs:
        rehearsal = world(design, hypervisor, scene=scene).rehearsal
        rehearsal.walk(parties)
        walks += [(str(rehearsal.programs[name]), [f"{asked} -> {result}" for asked, result in walk])
                  for name, walk in sorted(rehearsal.walks.items())]
    return walks


# Of two neighbours one has an odd number, whatever ours is; and their seeds are two others.
def _ask(question: str) -> Iterator[Walks]:
    package = Path(__file__).resolve().parents[2]
    seeds = [seed for seed in ("0", "1", "2") if seed != os.environ.get("PYTHONHASHSEED")][:2]
    with ExitStack() as running:
        others = [running.enter_context(process) for seed in seeds if (process := _start(str(package), seed)) is not None]
        for process in others:
            running.callback(process.kill)              # an error, or a signal, does not wait for the rest
        for process in others:
            answer, _ = process.communicate(question)
            if process.returncode == DesignRaised.exit_code:
                raise DesignRaised(f"in another process it goes otherwise: {answer.strip()}")
            if process.returncode == 0:
                yield _walked(answer)


# An interpreter that ended well has answered, unless someone else ended it, or wrote in between.
def _walked(answer: str) -> Walks:
    try:
        walks: Walks = json.loads(answer)
    except ValueError:
        what = "ends the process" if not answer.strip() else "writes where the answer goes, or goes on twice"
        raise DesignRaised(f"in another process it {what}, and not by raising SystemExit") from None
    return walks


def _start(package: str, seed: str) -> subprocess.Popen[str] | None:
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    try:
        # -P: the folder that someone happens to be in must not lend its modules to this.
        return subprocess.Popen([sys.executable, "-P", "-m", __name__], encoding="utf-8", **pipes,
                                env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": package})
    except OSError:
        return None


def main() -> int:
    """In the other interpreter: answer the question on standard input."""
    question = json.load(sys.stdin)
    end_with(question["parent"])
    sys.path[:] = question["path"]
    answer, sys.stdout = sys.stdout, sys.stderr         # what a plugin prints is no answer
    try:
        for text in question["loads"]:
            load(text)
        print(json.dumps(_walks(question["pairs"], question["scene"], question["parties"])), file=answer)
    except GuestMemfdError as error:
        print(error, file=answer)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
