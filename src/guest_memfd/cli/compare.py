"""`gmem compare`: every design under every hypervisor it was posted for: one table, then a sentence and a cost each."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from guest_memfd.cli.elsewhere import same_elsewhere
from guest_memfd.cli.gently import Gently
from guest_memfd.cli.load import add_load, designs_of, load_all
from guest_memfd.cli.options import Scope, add_output, add_scope, hypervisors_of, scope_of
from guest_memfd.cli.output import opened
from guest_memfd.designs import DESIGNS, SETS
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.errors import BadInput, HostUnavailable, UnknownName
from guest_memfd.explore.suite.verdict import Report
from guest_memfd.explore.world.cost import DesignCost, FolioCost, cost
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.hypervisors import SETS as HOSTS
from guest_memfd.laws import LAWS, judging
from guest_memfd.report import json, terminal
from guest_memfd.report.filling import FillingTable
from guest_memfd.report.progress import Progress
from guest_memfd.report.sentence import sentence
from guest_memfd.report.style import Style
from guest_memfd.report.table import costs, folio_costs, tables

COUNTED = ("kvm", "pkvm", "gunyah")
"""Hypervisors of which a machine has the code, for folios of every size."""

Costs = dict[tuple[str, str], DesignCost | None]
Folios = tuple[dict[tuple[str, str], FolioCost | None] | None, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this verb."""
    parser.add_argument("designs", metavar="DESIGN", nargs="*", help="which designs (names, or FILE.py:NAME; default: all)")
    parser.add_argument("--designs", metavar="SET", dest="sets", action="append",
                        help=f"a set of designs in place of names: {', '.join(SETS)} (what is argued about then)")
    add_load(parser)
    add_scope(parser)
    add_output(parser)
    parser.add_argument("--full", action="store_true",
                        help="the whole suite, as gmem check explores it, and not a first look; takes an hour")
    parser.add_argument("--html", metavar="PAGE", help="write a page for a browser to PAGE as well: the table, and "
                        "the shortest run to each broken law")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    parser.epilog = ("A comparison is a report and not a test: broken laws are what it is for, so it exits 0 when the\n"
                     f"table is complete and 3 when a limit was reached.\n\n{parser.epilog}")


def run(arguments: argparse.Namespace) -> int:
    """Explore all, print the table."""
    began = time.perf_counter()
    load_all(arguments)
    of = _set_of(arguments)
    chosen = SETS[of] if of is not None else designs_of(arguments, arguments.designs)
    scope = scope_of(arguments, full=arguments.full)
    pairs = _pairs(chosen or _usual(), scope, chosen=bool(chosen) and of is None, of=of)
    stop = Gently()
    with ExitStack() as stack:
        out, (page,) = opened(stack, arguments, "html")
        same_elsewhere(pairs, scope, arguments.load)
        judged = {law.name for design, _ in pairs for law in judging(DESIGNS[design], LAWS.values())}
        filling = FillingTable(pairs, [law for law in LAWS if law in judged and (scope.laws is None or law in scope.laws)])
        reports = scope.explore(pairs, Progress(quiet=arguments.quiet, table=filling), stop)
        folios = (None, "") if stop.asked() else _folios(reports)
        counted = {pair: cost(DESIGNS[pair[0]], HYPERVISORS[pair[1]]) for pair in pairs}
        sentences = {
            design: sentence(design, DESIGNS[design].title, [r for r in reports if r.design == design],
                             scope.words())
            for design in dict.fromkeys(design for design, _ in pairs)
        }
        if page is not None:
            page.write(_page(reports, counted, sentences, scope.words(), arguments.load))
        if arguments.json:
            out.write(json.dump(json.compare(reports, counted, sentences, scope.words(), folios[0])))
        else:
            out.write("\n".join(_lines(reports, counted, sentences, scope.words(), out.style, folios)))
            out.write(f"time: {time.perf_counter() - began:.1f} s")
    return stop.code or (3 if any(report.limits for report in reports) else 0)


# Those that are in no set: what was posted first, the library, and what third parties have added.
def _usual() -> list[str]:
    return [name for name in DESIGNS if not any(name in names for names in SETS.values())]


def _set_of(arguments: argparse.Namespace) -> str | None:
    if arguments.sets is None:
        return None
    if len(arguments.sets) > 1:
        raise BadInput(f"one set of designs at a time, not {' and '.join(map(repr, arguments.sets))}")
    (name,) = arguments.sets
    if arguments.designs:
        raise BadInput(f"either designs or a set of them, not both ({', '.join(arguments.designs)} and {name!r})")
    if name not in SETS:
        raise UnknownName("set of designs", name, SETS)
    return str(name)


# Asked for by name, a design that was not posted for the hypervisor is a mistake; otherwise it is left out. *of*: the set
# that these are, if they are one, which has hypervisors of its own.
def _pairs(designs: Sequence[str], scope: Scope, *, chosen: bool, of: str | None) -> list[tuple[str, str]]:
    pairs = []
    for design in dict.fromkeys(designs):
        posted = DESIGNS[design].hypervisors
        if not chosen and scope.hypervisors is not None and posted is not None:
            pairs += [(design, name) for name in scope.hypervisors if name in posted]
        else:
            asked = scope.hypervisors or ()
            pairs += [(design, name) for name in hypervisors_of(design, scope.hypervisors)
                      if name in asked or not any(name in names for year, names in HOSTS.items() if year != of)]
    if not pairs:
        raise BadInput(f"no design was posted for {', '.join(scope.hypervisors or ())}")
    return pairs


def _page(reports: Sequence[Report], counted: Costs, sentences: dict[str, str], words: str, loads: Sequence[str]) -> str:
    from guest_memfd.html.compare import page

    return page(reports, counted, sentences, words, loads)


# Counted where there is a machine, as the explorer's scenes have folios of four pages at most; else None, and why.
def _folios(reports: Sequence[Report]) -> Folios:
    from guest_memfd.vmm.folio_costs import counted_folios

    there = [report.hypervisor for report in reports if report.design == OurLibrary.name and report.hypervisor in COUNTED]
    try:
        return (counted_folios(there) if there else None), ""
    except HostUnavailable as error:
        return None, f"the cost of larger folios is not counted: {error}"


def _folio_lines(folios: Folios, style: Style) -> Iterator[str]:
    counted, why = folios
    if counted:
        yield ""
        yield from folio_costs(counted, style)
    elif why:
        yield from style.wrap(why, "", "  ")


def _lines(
    reports: Sequence[Report], counted: Costs, sentences: dict[str, str], words: str, style: Style, folios: Folios,
) -> Iterator[str]:
    titles = {report.hypervisor: HYPERVISORS[report.hypervisor].title for report in reports}
    yield from tables(reports, titles, words, style)
    yield ""
    for text in sentences.values():
        yield from style.wrap(text, "- ")
    yield ""
    yield from costs(counted, style)
    yield from _folio_lines(folios, style)
    yield ""
    yield from style.wrap("gmem check DESIGN --hypervisor NAME --quick --law LAW", "how a law breaks, step by step: ", "  ")
    yield from terminal.amount(reports, words, style)
