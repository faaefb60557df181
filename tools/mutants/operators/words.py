"""One word for another: a constant, an owner, a reason, a tree, a hypercall, a procedure, an attribute; yes for no."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from mutants.change import Change, replaced, source
from mutants.site import Site, called
from mutants.vocabulary import CONSTANTS, FLAGS, HYPERCALLS, LOCKED, METHODS, STRINGS, TREES

NEXT = 3
"""A word of a large family is taken for so many others only."""


def other_constant(site: Site) -> Iterator[Change]:
    """PRIVATE_PAGE for SHARED_PAGE, one kind of abort for another."""
    for node in site.nodes():
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield from (replaced(node, other) for other in _others(node.id, CONSTANTS))


def other_word(site: Site) -> Iterator[Change]:
    """Another owner, reason, policy, answer or kind of reference; the other tree; another hypercall."""
    for node in site.nodes():
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            word, name = node.args[0], called(node) or ""
            families = HYPERCALLS if name == "hyp_call" else (TREES,) if name.startswith("tree_") else ()
            yield from (replaced(word, repr(other)) for other in _others(word.value, families))
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from (replaced(node, repr(other)) for other in _others(node.value, STRINGS))


def other_call(site: Site) -> Iterator[Change]:
    """A procedure with the same arguments is called."""
    for node in site.nodes():
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            for other in _others(node.func.attr, METHODS):
                yield replaced(node.func, f"{source(node.func.value)}.{other}")


def other_attribute(site: Site) -> Iterator[Change]:
    """Another attribute of the same thing is looked at."""
    for node in site.nodes():
        if isinstance(node, ast.Attribute) and source(node.value) == "locked":
            yield from (replaced(node, f"locked.{other}") for other in _others(node.attr, (LOCKED,)))


def flip_bool(site: Site) -> Iterator[Change]:
    """True for False, and the other way round; a flag is handed on negated."""
    for node in site.nodes():
        if isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield replaced(node, str(not node.value))
        elif isinstance(node, ast.Call):
            for arg in [*node.args, *(keyword.value for keyword in node.keywords)]:
                name = arg.id if isinstance(arg, ast.Name) else arg.attr if isinstance(arg, ast.Attribute) else None
                if name in FLAGS or isinstance(arg, ast.Compare):
                    yield replaced(arg, f"not {source(arg)}")


def _others(word: object, families: tuple[tuple[str, ...], ...]) -> list[str]:
    for family in families:
        if word in family:
            at = family.index(str(word))
            return [*family[at + 1:], *family[:at]][:NEXT]
    return []
