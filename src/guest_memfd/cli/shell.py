"""`gmem shell WHAT`: completion for a shell, with the names that there are, and a man page; both from gmem's parsers."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any

from guest_memfd.cli.main import VERBS, parsers
from guest_memfd.cli.options import add_output
from guest_memfd.cli.output import Output
from guest_memfd.cli.run import EMULATED
from guest_memfd.errors import BadInput, HostUnavailable, UnknownName

SHELLS = ("bash", "zsh", "fish")
WANTED = (*SHELLS, "man")
EXIT_CODES = """\
exit codes: 0 written, 4 bad input, 5 what writes it is not here: pip install 'guest-memfd[shell]'.

bash: gmem shell bash > ~/.local/share/bash-completion/completions/gmem;  zsh: gmem shell zsh > "${fpath[1]}/_gmem";
fish: gmem shell fish > ~/.config/fish/completions/gmem.fish;  man: gmem shell man | man -l -"""

_FILES, _FOLDERS = ("file", "output", "html", "perfetto", "load", "against", "saved"), ("save_traces", "modules")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this verb."""
    parser.epilog = EXIT_CODES
    parser.add_argument("what", metavar="WHAT", help=f"completion for {', '.join(SHELLS)}; or man")
    add_output(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write what was asked for; returns 0."""
    if arguments.what not in WANTED:
        raise UnknownName("shell", arguments.what, WANTED)
    if arguments.json:
        raise BadInput("--json: a script for a shell and a man page have no such form")
    with Output(arguments.output) as out:
        out.write(_man() if arguments.what == "man" else _completion(arguments.what))
    return 0


def _all() -> argparse.ArgumentParser:
    return parsers({verb: import_module(f"guest_memfd.cli.{verb}") for verb in VERBS})[0]


def _completion(shell: str) -> str:
    shtab = _library("shtab")
    parser = _all()
    names = _names()
    for action in _actions(parser):
        if action.dest in names:
            action.choices = names[action.dest]
        if action.dest in _FILES:
            action.complete = shtab.FILE                    # type: ignore[attr-defined]
        elif action.dest in _FOLDERS:
            action.complete = shtab.DIRECTORY               # type: ignore[attr-defined]
    text: str = shtab.complete(parser, shell=shell)
    return text


# What an option or argument may be, by its name. Lists with commas are completed up to the first.
def _names() -> dict[str, list[str]]:
    from guest_memfd.cli.list import KINDS
    from guest_memfd.cli.replay import HOSTS
    from guest_memfd.designs import DESIGNS
    from guest_memfd.explore.suite.plan import NAMED
    from guest_memfd.explore.world.choice import ENGINES
    from guest_memfd.guests import GUESTS
    from guest_memfd.hypervisors import HYPERVISORS
    from guest_memfd.kernels.qemu import MACHINES
    from guest_memfd.laws import LAWS
    from guest_memfd.probe.survey import PARTS
    from guest_memfd.scenarios import PARTIES, SCENES
    from guest_memfd.vmm.readers import READERS

    there: dict[str, Iterable[str]] = {
        "design": DESIGNS, "designs": DESIGNS, "hypervisor": HYPERVISORS, "law": LAWS, "scene": SCENES, "parties": PARTIES,
        "scenario": NAMED, "engine": ENGINES, "kind": KINDS, "guest": GUESTS, "part": PARTS, "reader": ("none", *READERS),
        "on": (*HOSTS, *EMULATED, "kvm"), "arch": MACHINES, "folio": ("4K", "2M", "1G"), "what": WANTED,
    }
    return {name: [*names] for name, names in there.items()}


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    # argparse has no other way to them; `shtab` goes by it as well.
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from _actions(each)


def _man() -> str:
    manpage = _library("argparse_manpage.manpage")
    page = manpage.Manpage(_all(), format="pretty")
    page.manual, page.source = "guest-memfd", "guest-memfd"
    page.description = "guest_memfd as procedures: run, broken, compared and proved"
    return str(page)


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise HostUnavailable(f"{name.partition('.')[0].replace('_', '-')} is not here: pip install "
                              "'guest-memfd[shell]'") from None
