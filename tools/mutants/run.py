"""All mutants of a target, one after the other or several at a time."""

from __future__ import annotations

import fnmatch
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from mutants.baseline import Baseline, baseline, wrong_anew
from mutants.children import Died, each
from mutants.killer import Killer
from mutants.mutant import Mutant
from mutants.site import Site
from mutants.targets import Target
from mutants.trial import KILLED, Fate, Known, attempt, fate_of

BASELINE_SECONDS = 3600
LIKELY = 3
"""How many scenarios are tried first because they have killed before."""


class NotClean(Exception):  # noqa: N818
    """The code as it is breaks a law or cannot be run, so nothing can be said of mutants."""


def chosen(mutants: Sequence[Mutant], only: str | None, sample: int | None, seed: int) -> list[Mutant]:
    """Those whose name fits the pattern *only*; of them, *sample* drawn with *seed*, in their order."""
    fitting = [mutant for mutant in mutants if only is None or fnmatch.fnmatch(mutant.id, only)]
    if sample is None or sample >= len(fitting):
        return fitting
    drawn = set(random.Random(seed).sample(range(len(fitting)), sample))
    return [mutant for at, mutant in enumerate(fitting) if at in drawn]


def within(target: Target, work: Callable[[], None]) -> None:
    """Do *work* where the scenarios of *target* can be run."""
    for killer in reversed(target.killers):
        work = partial(killer.within, work)
    work()


def known(target: Target, *, jobs: int = 1, values: bool = False) -> Known:
    """What each killer of *target* does without a mutant; NotClean if something is found.

    values: whether mutants of values are to be tried, for which the package is imported anew.
    """
    for killer in target.killers:
        killer.prepare()
    work: list[tuple[tuple[str, Killer], Callable[[], Baseline | str | None]]] = [
        (("as it is", killer), partial(baseline, killer, target.paths())) for killer in target.killers]
    work += [(("imported anew", killer), partial(wrong_anew, killer, target.paths()[0]))
             for killer in target.killers if values and killer.depends_on_import]
    bases: dict[Killer, Baseline] = {}
    for (how, killer), answer in each(work, jobs=jobs, seconds=BASELINE_SECONDS):
        if isinstance(answer, Died):
            raise NotClean(f"the {killer.name} cannot be run {how}: {answer.how}")
        if isinstance(answer, Baseline):
            bases[killer] = answer
            answer = next((f"{ran.label}: {ran.found}" for ran in answer.ran if ran.found is not None), None)
        if answer is not None:
            raise NotClean(f"without any mutant, {answer}")
    return [(killer, bases[killer]) for killer in target.killers]


def tried(mutants: Sequence[Mutant], base: Known, *, jobs: int, seconds: float) -> Iterator[tuple[Mutant, Fate]]:
    """Every mutant and what becomes of it, as it becomes known."""
    killers: dict[Site, Counter[str]] = {}              # what kills one mutant of a function kills the next
    cost = {ran.label: ran.seconds for _, done in base for ran in done.ran}

    def likely(site: Site) -> list[str]:
        hits = killers.get(site, Counter())
        return sorted(hits, key=lambda label: cost.get(label, 0) / hits[label])[:LIKELY]

    tasks = ((mutant, partial(attempt, mutant, base, seconds, likely(mutant.site))) for mutant in mutants)
    for mutant, answer in each(tasks, jobs=jobs, seconds=seconds):
        fate = fate_of(answer)
        if fate.fate == KILLED:
            killers.setdefault(mutant.site, Counter())[fate.by] += 1
        yield mutant, fate
