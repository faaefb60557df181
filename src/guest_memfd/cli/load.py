"""``--load FILE`` and ``FILE:NAME``: designs, hypervisors, parties and laws that lie in a file, for this run.

The file is run as a module of its own name, with its folder last on the path, and leaves nothing beside it. What it only
imports is not its own.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from guest_memfd.core.hypervisor import Hypervisor
from guest_memfd.designs import DESIGNS, Design
from guest_memfd.errors import BadInput, PluginError, shown
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.laws import LAWS, Law
from guest_memfd.plugins.guard import IMPORTING, Guard
from guest_memfd.plugins.registry import Registry
from guest_memfd.scenarios import PARTIES, Party

KINDS: dict[type, Registry[Any]] = {Hypervisor: HYPERVISORS, Party: PARTIES, Law: LAWS}
WHAT = "designs, hypervisors, parties or laws"


def add_load(parser: argparse.ArgumentParser) -> None:
    """The option, for a verb."""
    parser.add_argument("--load", action="append", metavar="FILE[:NAME]", default=[],
                        help=f"have the {WHAT} of a Python file, as if they were installed (repeat)")


def load_all(arguments: argparse.Namespace) -> None:
    """Do what --load says; raises PluginError naming the file that cannot be read, or what is wrong in it."""
    for text in arguments.load:
        load(text)


def designs_of(arguments: argparse.Namespace, given: Sequence[str]) -> list[str]:
    """The names of the designs *given*, each a name or ``FILE:NAME``, which counts as given with --load, too."""
    names = []
    for text in given:
        if not _is_file(text):
            names.append(text)
            continue
        found = [str(thing.name) for thing in load(text) if isinstance(thing, type) and issubclass(thing, Design)]
        if len(found) != 1:
            raise BadInput(f"{text}: {'it has the designs ' + ', '.join(found) if found else 'that is no design'}; "
                           "FILE:NAME names one")
        arguments.load.append(text)
        names += found
    return names


def load(text: str) -> list[Any]:
    """Register what ``FILE`` has, or its ``NAME`` alone; returns that. Raises PluginError."""
    path, name = (text, "") if text.endswith(".py") or ":" not in text else text.rsplit(":", 1)
    module = _module(Path(path))
    things = [_named(module, name, text)] if name else list(_things(module))
    if not things:
        raise PluginError(f"{text} has no {WHAT}")
    for thing in things:
        _register(thing, text)
    return things


def _is_file(text: str) -> bool:
    return text.endswith(".py") or ".py:" in text


def _register(thing: Any, text: str) -> None:
    registry = _registry(thing)
    if registry is None:
        raise PluginError(f"{text} is {shown(thing)}, and none of {WHAT}")
    name = getattr(thing, "name", "")
    if isinstance(name, str) and name in registry:
        if registry[name] is thing:
            return
        raise PluginError(f"{text}: there is a {registry.kind} called {name!r}; choose another name")
    try:
        registry.add(name, thing)
    except PluginError as error:
        raise PluginError(f"{text}: {error}") from error


def _registry(thing: Any) -> Registry[Any] | None:
    if isinstance(thing, type) and issubclass(thing, Design):
        return DESIGNS
    return next((registry for kind, registry in KINDS.items() if isinstance(thing, kind)), None)


# A class without a name of its own is one that others are made of.
def _things(module: ModuleType) -> Iterator[Any]:
    for thing in vars(module).values():
        registry = _registry(thing)
        ours = registry is not None and any(thing is each for each in registry.builtin)
        if registry is None or ours or (isinstance(thing, type) and (
                thing.__module__ != module.__name__ or "name" not in vars(thing))):
            continue
        yield thing


def _named(module: ModuleType, name: str, text: str) -> Any:
    if not hasattr(module, name):
        # By the name that it is listed under, too.
        if called := [thing for thing in _things(module) if thing.name == name]:
            return called[0]
        near = difflib.get_close_matches(name, [each for each in vars(module) if not each.startswith("_")], n=1, cutoff=0.5)
        raise PluginError(f"{text}: the file has no {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return getattr(module, name)


def _module(path: Path) -> ModuleType:
    try:
        with path.open("rb"):
            place = path.resolve()
    except (OSError, ValueError) as error:
        raise PluginError(f"cannot load {str(path)!r}: {getattr(error, 'strerror', None) or error}") from error
    name = path.stem.replace(".", "_")
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(place):
        return known
    if str(place.parent) not in sys.path:
        # Last: a file beside it that is called as a module of Python's must not take that one's place.
        sys.path.append(str(place.parent))
    there = importlib.util.find_spec(name)
    if there is not None and there.origin != str(place):
        raise PluginError(f"cannot load {str(path)!r}: there is a module {name!r} already ({there.origin}); rename it")
    spec = importlib.util.spec_from_file_location(name, place)
    if spec is None or spec.loader is None:
        raise PluginError(f"cannot load {str(path)!r}: that is no Python file (.py)")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        with Guard(str(path), PluginError, timed=True, patience=IMPORTING, did="does not load:"):
            spec.loader.exec_module(module)
    except BaseException:
        # Or the next import of that name would find half a module, and say nothing of why.
        del sys.modules[name]
        raise
    finally:
        sys.dont_write_bytecode = before
    return module
