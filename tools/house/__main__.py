"""``python -m house``: the table, one line for each figure, with its goal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

from house import classes, graph, prose, way


class Figure(NamedTuple):
    """One line of the table."""

    what: str
    goal: str
    measure: Callable[[], str]


FIGURES = (
    Figure("packages in one dependency cycle", "0", lambda: f"{graph.packages_in_a_cycle()} of {graph.packages()}"),
    Figure("modules in the largest cycles", "at most 5", lambda: ", ".join(map(str, graph.cycles_of_modules())) or "0"),
    Figure("depth of inheritance among our classes", "4", lambda: ", ".join(map(str, classes.deepest()))),
    Figure("classes whose name another file has, too", "under 8 %", lambda: f"{classes.shared_names():.0%}"),
    Figure("files that one lend of one page passes", "45", lambda: f"{way.lend().files}"),
    Figure("changes of file on the way", "400", lambda: f"{way.lend().changes}"),
    Figure("words per docstring, in the ten hardest files", "20", lambda: f"{prose.words_per_docstring():.0f}"),
    Figure("comment lines", "5 %", lambda: f"{prose.comment_lines():.1%}"),
    Figure("public docstrings of three words or fewer", "0", lambda: f"{prose.short_docstrings()}"),
)


def main() -> int:
    """Print the table; returns 0."""
    width = max(len(figure.what) for figure in FIGURES)
    for figure in FIGURES:
        print(f"{figure.what:<{width}}  {figure.measure():<12}  goal: {figure.goal}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
