"""The list of mutants that cannot be noticed, because they do the same: judged by people, checked by every run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from mutants.trial import KILLED, Fate

LIST = Path(__file__).parent / "equivalent.txt"


def entries(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(id, reason) of each entry; the reason is empty if there is none."""
    for line in lines:
        if line.strip() and not line.startswith("#"):
            name, _, reason = line.partition("#")
            yield name.strip(), reason.strip()


def listed(path: Path = LIST) -> dict[str, str]:
    """Id -> reason."""
    return dict(entries(path.read_text().splitlines()))


def mistakes(equivalent: Mapping[str, str], names: Iterable[str], fates: Mapping[str, Fate]) -> list[str]:
    """What is wrong with the list, given the *names* of all mutants and what became of those that were tried."""
    there = set(names)
    wrong = []
    for name, reason in equivalent.items():
        if name not in there:
            wrong.append(f"{name}: there is no such mutant")
        elif not reason:
            wrong.append(f"{name}: no reason is given")
        elif name in fates and fates[name].fate == KILLED:
            wrong.append(f"{name}: it is killed, by {fates[name].by} ({fates[name].why})")
    return wrong
