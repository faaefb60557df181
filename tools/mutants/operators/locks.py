"""Locks not taken, taken shared for exclusive, waited for where that may be without end; what begins and never ends."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from mutants.change import Change, dropped, expression, replaced, source
from mutants.operators.steps import is_act
from mutants.site import Site, called
from mutants.vocabulary import PAIRS

OTHER_MODE = {"down_write": "down_read", "up_write": "up_read", "down_read": "down_write", "up_read": "up_write",
              "down_read_trylock": "down_write"}


def no_lock(site: Site) -> Iterator[Change]:
    """A lock is neither taken nor given back; nor is anything else that begins and ends."""
    for begin, end in PAIRS:
        both = [stmt for stmt in site.statements() if is_act(stmt) and called(stmt) in (begin, end)]
        if {called(stmt) for stmt in both} == {begin, end}:
            yield dropped(*both)


def other_mode(site: Site) -> Iterator[Change]:
    """Shared for exclusive, and the other way round."""
    both = [node for node in site.nodes() if isinstance(node, ast.Attribute) and node.attr in OTHER_MODE]
    for modes in (("down_write", "up_write"), ("down_read", "up_read")):
        ours = [node for node in both if node.attr in modes]
        if ours:
            names = [OTHER_MODE[node.attr] for node in ours]
            yield Change({node: expression(f"{source(node.value)}.{name}") for node, name in zip(ours, names, strict=True)},
                         " .. ".join(node.attr for node in ours), " .. ".join(names))


def other_lock(site: Site) -> Iterator[Change]:
    """The other semaphore is taken."""
    sems = [node.args[0] for node in site.nodes() if isinstance(node, ast.Call) and node.args
            and (called(node) or "").startswith(("down_", "up_"))]
    if sems:
        yield Change({sem: expression("'bindings'") for sem in sems}, "'invalidate'", "'bindings'")


def wait_for_lock(site: Site) -> Iterator[Change]:
    """A lock is waited for that should be had now or not at all."""
    for node in site.nodes():
        if isinstance(node, ast.YieldFrom) and called(node) == "down_read_trylock":
            yield replaced(node, f"({source(node).replace('down_read_trylock', 'down_read')}, True)[1]")
