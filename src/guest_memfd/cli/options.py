"""The options that verbs share, and what they ask for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass

from guest_memfd.cli.gently import Gently
from guest_memfd.cli.stop import Stopped
from guest_memfd.designs import DESIGNS
from guest_memfd.errors import BadInput, UnknownName
from guest_memfd.explore.suite.check import compare
from guest_memfd.explore.suite.plan import FEW, NAMED, PARTNER, QUICK, QUICK_PARTNERS, QUICK_WITHOUT, TRIPLES, WHOLE
from guest_memfd.explore.suite.verdict import Limits, Report
from guest_memfd.explore.world.choice import ENGINES
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.report.progress import Progress
from guest_memfd.report.sentence import listed
from guest_memfd.scenarios import SCENES

_MOST = 10**18


def add_scope(parser: argparse.ArgumentParser) -> None:
    """What to explore, and how far."""
    group = parser.add_argument_group("what to explore")
    group.add_argument("--hypervisor", action="append", metavar="NAME",
                       help="under which hypervisor (repeat, or a,b); default: all the design was posted for")
    group.add_argument("--scene", action="append", metavar="NAME",
                       help="in which scene (repeat, or a,b; gmem list scenes); default: all, for one scenario the plainest")
    group.add_argument("--parties", metavar="A,B,...", help="one scenario of these parties instead of the whole suite")
    group.add_argument("--scenario", metavar="NAME", help="one named scenario (gmem list scenarios)")
    group.add_argument("--parties-per-scenario", type=whole, metavar="N",
                       help="every N parties together in place of the suite; default scene: the plainest")
    group.add_argument("--law", action="append", metavar="NAME", help="judge by this law only (repeat, or a,b)")
    group.add_argument("--failures", type=whole, metavar="N",
                       help="failures that may be injected in one run; 0: nothing fails (default: as the scene says)")
    group = parser.add_argument_group("limits: reaching one makes the verdict 'undetermined'")
    group.add_argument("--max-states", type=whole, metavar="N", help="states per scenario")
    group.add_argument("--max-seconds", type=seconds, metavar="S", help="seconds for everything")
    group.add_argument("--memory", metavar="SIZE", help="memory for everything, as 8G (default: nearly all that there is)")
    group.add_argument("-j", "--jobs", type=whole, metavar="N",
                       help="processes, or threads where there are fewer scenarios (default: one per CPU)")
    group.add_argument("--resume", metavar="FILE", help="keep there what each scenario came to, and go on from what an "
                       "earlier run of the same command has kept (docs/campaign.md)")
    group.add_argument("--cluster", metavar="ADDRESS", help="let the workers of a dask scheduler explore (tcp://host:8786, "
                       "or local:N; docs/campaign.md)")
    group.add_argument("--engine", metavar="NAME", help=f"what explores: {', '.join(ENGINES)}; all say the same (default: "
                       "python for small scenarios, for others the first of these that is here)")
    group.add_argument("--no-reduction", action="store_true", help="every state, those included that change no "
                       "verdict and no length of a trace (docs/explorer.md)")


def add_output(parser: argparse.ArgumentParser) -> None:
    """How to say it."""
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="for programs")
    group.add_argument("-o", "--output", metavar="FILE", help="write there instead of standard output")


def whole(text: str) -> int:
    """An argparse type: a whole number; whether it makes sense is checked where it is used."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if not -_MOST < number < _MOST:
        raise argparse.ArgumentTypeError(f"{text} is beyond {_MOST}")
    return number


def seconds(text: str) -> float:
    """An argparse type: seconds, as a number."""
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if number != number:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return number


@dataclass(frozen=True)
class Scope:
    """What the options of `add_scope` say; names are looked up by the code that explores."""

    hypervisors: tuple[str, ...] | None
    scenes: tuple[str, ...] | None
    parties: tuple[str, ...] | None
    scenario: str | None
    laws: tuple[str, ...] | None
    limits: Limits
    jobs: int | None
    full: bool
    engine: str | None = None
    reduce: bool = True
    resume: str | None = None
    cluster: str | None = None
    size: int | None = None

    def explore(self, pairs: Sequence[tuple[str, str]], progress: Progress, stop: Gently) -> list[Report]:
        """`compare` of (design, hypervisor) *pairs*; raises Stopped where nothing had been seen by then."""
        with progress:
            reports = compare(pairs, scenes=self.scenes, parties=self.parties, scenario=self.scenario, laws=self.laws,
                              limits=self.limits, full=self.full, jobs=self.jobs, progress=progress, engine=self.engine,
                              reduce=self.reduce, seen=progress.found, stop=stop, resume=self.resume,
                              cluster=self.cluster, size=self.size)
        if not reports:
            raise Stopped(stop.number)
        return reports

    def words(self) -> str:
        """Which scenarios are explored: ``vcpu and zeropad``, or what explore/suite/plan.py has, in one clause."""
        where = f" in {listed(self.scenes)}" if self.scenes else ""
        if self.parties is not None:
            return listed(self.parties) + where
        if self.scenario is not None:
            return f"{self.scenario} ({listed(NAMED[self.scenario])}){where}"
        if self.size is not None:
            several = f"every {self.size} parties together" if self.size > 1 else "every party alone"
            return f"{several} in {listed(self.scenes or WHOLE)}, without VMMs that do several things in a row"
        return self._suite() if self.full else self._first_look()

    def _suite(self) -> str:
        where = self._where(self.scenes or tuple(SCENES))
        triples = [name for scene in self.scenes or SCENES for name in TRIPLES.get(scene, ())]
        more = f", and {len(triples)} triples" if triples else ""
        few: dict[tuple[str, ...], list[str]] = {}
        for scene in self.scenes or SCENES:
            if scene in FEW:
                few.setdefault(FEW[scene], []).append(scene)
        but = "".join(f"; in {listed(scenes)}, pairs with {listed(partners)}" for partners, scenes in few.items())
        some = f"of VMMs that do several things in a row, some pairs{but}"
        return f"every party alone and every pair in {where}{more} ({some})"

    def _first_look(self) -> str:
        scenes = self.scenes or tuple(SCENES)
        whole, brief = [scene for scene in scenes if scene in WHOLE], [scene for scene in scenes if scene not in WHOLE]
        looks = [f"every party alone and every pair in {listed(whole)}"] if whole else []
        others = [f"in {scene} also with {listed(names[1:])}"
                  for scene, names in QUICK_PARTNERS.items() if scene in brief and names]
        lone = [scene for scene, names in QUICK_PARTNERS.items() if scene in brief and not names]
        others += [f"in {listed(lone)} alone only"] if lone else []
        also = f" ({', '.join(others)})" if others else ""
        where = self._where(brief, "other ")
        alone = f"alone and with {PARTNER}{also}"
        if len(brief) == 1:
            alone = f"alone and with {listed(names)}" if (names := QUICK_PARTNERS.get(brief[0], (PARTNER,))) else "alone"
        looks += [f"in {where}, every party except {listed(QUICK_WITHOUT)}, {alone}"] if brief else []
        triples = [*dict.fromkeys(name for scene in scenes for name in QUICK.get(scene, ()))]
        looks += [f"the triples {listed(triples)}"] if triples else []
        return f"{'; '.join(looks)}; without VMMs that do several things in a row"

    def _where(self, scenes: Sequence[str], other: str = "") -> str:
        return listed(scenes) if self.scenes else f"{len(scenes)} {other}scenes"


def scope_of(arguments: argparse.Namespace, *, full: bool) -> Scope:
    """Read the options of `add_scope`; *full*: explore the whole suite, where no scenario is asked for.

    Raises BadInput for a limit that cannot be and for a list that names nothing.
    """
    return Scope(
        names_of(arguments.hypervisor, "--hypervisor"),
        names_of(arguments.scene, "--scene"),
        names_of(None if arguments.parties is None else [arguments.parties], "--parties"),
        arguments.scenario,
        names_of(arguments.law, "--law"),
        Limits(states=arguments.max_states, seconds=arguments.max_seconds, failures=arguments.failures,
               memory=None if arguments.memory is None else _size(arguments.memory)),
        arguments.jobs,
        full,
        arguments.engine,
        not arguments.no_reduction,
        _apart(arguments),
        arguments.cluster,
        arguments.parties_per_scenario,
    )


# A file that is replaced at the end cannot be the one that is written to all the time.
def _apart(arguments: argparse.Namespace) -> str | None:
    file: str | None = arguments.resume
    for option in ("output", "html"):
        other = getattr(arguments, option, None)
        if file is not None and other is not None and os.path.realpath(other) == os.path.realpath(file):
            raise BadInput(f"--resume and --{option} are both {file!r}; each needs a file of its own")
    return file


def hypervisors_of(design: str, asked: Sequence[str] | None) -> tuple[str, ...]:
    """The hypervisors to explore *design* under: those *asked* for, else those it was posted for, else all.

    Those that encrypt differ by what they make of large folios: they are left out for designs that take none.
    """
    posted = asked or DESIGNS[design].hypervisors
    return tuple(posted or (name for name in HYPERVISORS if DESIGNS[design].large or not HYPERVISORS[name].encrypts))


def one_hypervisor(given: str) -> str:
    """The name of a hypervisor, where there can be one only; raises BadInput, or UnknownName."""
    if given not in HYPERVISORS:
        if "," in given:
            raise BadInput(f"--hypervisor takes one name here, not {given!r}")
        raise UnknownName("hypervisor", given, HYPERVISORS)
    return given


def names_of(given: Sequence[str] | None, option: str) -> tuple[str, ...] | None:
    """The names of an option that may be repeated, each time with several; BadInput for none, or one twice."""
    if given is None:
        return None
    each = tuple(name.strip() for text in given for name in text.split(","))
    if "" in each:
        raise BadInput(f"{option} names nothing; it wants names with commas between them")
    twice = next((name for name in each if each.count(name) > 1), None)
    if twice is not None:
        raise BadInput(f"{option} names {twice!r} twice")
    return each


# Who asks for no limit need not wait for what reads sizes.
def _size(text: str) -> int:
    from guest_memfd.cli.run import size

    return size("--memory", text)
