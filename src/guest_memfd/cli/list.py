"""`gmem list`: what there is to compare, check and combine; plugins that do not load are named with the reason."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from guest_memfd.cli.load import add_load, load_all
from guest_memfd.cli.options import add_output
from guest_memfd.cli.output import Output
from guest_memfd.designs import DESIGNS
from guest_memfd.errors import PluginLeftOut, UnknownName
from guest_memfd.explore.suite.plan import NAMED
from guest_memfd.guests import GUESTS
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.laws import LAWS
from guest_memfd.plugins.registry import Registry
from guest_memfd.report import json
from guest_memfd.report.style import Style
from guest_memfd.scenarios import PARTIES, SCENES

Entry = dict[str, Any]


def _designs() -> Iterator[Entry]:
    for name in DESIGNS:
        design = DESIGNS[name]
        posted = list(design.hypervisors or HYPERVISORS)
        yield {"name": name, "title": design.title, "source": design.source, "hypervisors": posted,
               "keeps": [*_kept(design.keeps)]}


# Operations that are kept for the same reason, in one sentence.
def _kept(keeps: Mapping[str, str]) -> Iterator[str]:
    for why in dict.fromkeys(keeps.values()):
        yield f"{' '.join(name for name in keeps if keeps[name] == why)} ({why})"


def _hypervisors() -> Iterator[Entry]:
    for name in HYPERVISORS:
        hypervisor = HYPERVISORS[name]
        yield {"name": name, "title": hypervisor.title, "abort": hypervisor.abort or "none: there is no host stage 2"}


def _parties() -> Iterator[Entry]:
    for name in PARTIES:
        yield {"name": name, "title": PARTIES[name].title}


def _laws() -> Iterator[Entry]:
    for law in LAWS.values():
        entry = {"name": law.name, "title": law.sentence, "checked": law.when, "source": law.source}
        if (by := law.broken_by) is not None:
            entry["broken_by"] = str(by)
            if not by.planted:
                where = f"{','.join(by.parties)} --scene {by.scene}" if by.scene else ','.join(by.parties)
                entry["see"] = f"gmem check {by.design} --hypervisor {by.hypervisor} --parties {where} --law {law.name}"
        yield entry


def _scenes() -> Iterator[Entry]:
    for scene in SCENES.values():
        differs = [*scene.differences()] or ["nothing: it is the plainest"]
        yield {"name": scene.name, "title": scene.title, "differs_in": differs}


def _guests() -> Iterator[Entry]:
    for guest in GUESTS.values():
        only = "" if len(guest.architectures) > 1 else f" ({guest.architectures[0]} only)"
        yield {"name": guest.name, "title": guest.title + only, "architectures": list(guest.architectures)}


def _scenarios() -> Iterator[Entry]:
    for name, parties in NAMED.items():
        yield {"name": name, "parties": list(parties)}


KINDS: dict[str, Callable[[], Iterator[Entry]]] = {
    "designs": _designs, "hypervisors": _hypervisors, "parties": _parties, "laws": _laws, "scenes": _scenes,
    "scenarios": _scenarios, "guests": _guests,
}
VERBOSE = ("keeps",)
"""What is said to who asks for more."""

REGISTRIES: dict[str, Registry[Any]] = {
    "designs": DESIGNS, "hypervisors": HYPERVISORS, "parties": PARTIES, "laws": LAWS,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this verb."""
    parser.add_argument("kind", metavar="KIND", nargs="?", help=f"one of {', '.join(KINDS)}")
    parser.add_argument("-v", "--verbose", action="store_true", help="of designs, what of our library they keep, and why")
    add_load(parser)
    add_output(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the names and what they stand for."""
    load_all(arguments)
    if arguments.kind is not None and arguments.kind not in KINDS:
        raise UnknownName("kind of thing", arguments.kind, KINDS)
    kinds = [arguments.kind] if arguments.kind else [*KINDS]
    with Output(arguments.output) as out, warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginLeftOut)      # what does not load is said in the list
        if arguments.json:
            broken = {kind: REGISTRIES[kind].broken() for kind in kinds if kind in REGISTRIES}
            entries = {kind: [*KINDS[kind]()] for kind in kinds}
            out.write(json.dump({"schema": json.LIST, **entries, "broken": broken}))
        else:
            out.write("\n\n".join("\n".join(_lines(kind, out.style, arguments.verbose)) for kind in kinds))
    return 0


def _lines(kind: str, style: Style, verbose: bool) -> Iterator[str]:
    yield style.head(kind)
    entries = [*KINDS[kind]()]
    indent = " " * (max(len(entry["name"]) for entry in entries) + 4)
    for entry in entries:
        first = f"  {entry.pop('name')}".ljust(len(indent))
        for what, words in entry.items():
            said = ", ".join(words) if isinstance(words, list) else words
            if what in VERBOSE and not (verbose and said):
                continue
            label = "" if what in ("title", "parties") else f"{what.replace('_', ' ')}: "
            yield from style.wrap(label + said, first, indent)
            first = indent
    if kind in REGISTRIES:
        for reason in REGISTRIES[kind].broken().values():
            yield from style.wrap(reason, "  does not load: ")
