"""Lines of a function, as they stand in its file today.

Lines are found by the function and by what they say, never by their number.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from tour.stops import Point

ROOT = Path(__file__).resolve().parents[2]
LINES = 15
"""As many lines of a function, at most, can be taken in at one look."""


class Quote(NamedTuple):
    """*text*: the lines; *file*: below the root of the project; *first*, *last*: their numbers in it, for checks."""

    text: str
    file: str
    first: int
    last: int


def quote(point: Point) -> Quote:
    """The lines of *point*: its body without the docstring, from `begin` on; LookupError if no line holds that."""
    function: Any = point.function
    lines, number = inspect.getsourcelines(function)
    tree = ast.parse(textwrap.dedent("".join(lines))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    body = tree.body[1:] if ast.get_docstring(tree) and len(tree.body) > 1 else tree.body
    head, start = lines[tree.lineno - 1:tree.body[0].lineno - 1], body[0].lineno - 1
    if point.begin:
        start = next((at for at in range(start, len(lines)) if point.begin in lines[at]), -1)
        if start < 0:
            raise LookupError(f"no line of {point.name} holds {point.begin!r}")
    shown = lines[start:start + LINES - len(head)]
    gap = [] if start == body[0].lineno - 1 else [_indent(shown[0]) + "...\n"]
    more = [] if start + len(shown) >= len(lines) else [_indent(shown[0]) + "...\n"]
    text = textwrap.dedent("".join([*head, *gap, *shown, *more]))
    path = Path(inspect.getfile(function)).resolve().relative_to(ROOT)
    return Quote(text, path.as_posix(), number + start, number + start + len(shown) - 1)


def _indent(line: str) -> str:
    return line[:len(line) - len(line.lstrip())]
