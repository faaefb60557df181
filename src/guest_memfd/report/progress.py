"""How far the work is and how long it will take: on standard error, for a person who waits, and for no one else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, TextIO

from guest_memfd.compat import override
from guest_memfd.report.filling import FillingTable
from guest_memfd.report.style import columns

PATIENCE = 1.0
"""Seconds before anything is shown: what takes less needs no bar."""


class Progress:
    """A callback `(done, total, what)` that draws a bar; rich's if it is installed, else one line that is rewritten.

    Nothing is drawn when *stream* is no terminal, when *quiet*, or in the first second. A *table* stands above rich's bar.
    """

    def __init__(self, quiet: bool = False, stream: TextIO | None = None, table: FillingTable | None = None) -> None:
        self.table = table
        self.stream = stream if stream is not None else sys.stderr
        self.shown = not quiet and self.stream.isatty()
        self._began = time.monotonic()
        self._bar: _Line | _Rich | None = None

    def __enter__(self) -> Progress:
        return self

    def __call__(self, done: int, total: int, what: str) -> None:
        """Show that *done* of *total* is finished, *what* last."""
        spent = time.monotonic() - self._began
        if not self.shown or spent < PATIENCE:
            return
        if self._bar is None:
            self._bar = _bar(self.stream, self.table)
        self._bar.show(done, total, f"{what}  {left(done, total, spent)}")

    def found(self, design: str, hypervisor: str, broken: Mapping[str, int]) -> None:
        """A scenario of *design* has broken laws: law -> steps. It is shown with the next call."""
        if self.table is not None:
            self.table.take(design, hypervisor, broken)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.clear()


def left(done: int, total: int, spent: float) -> str:
    """``1:05 left``: what *spent* seconds on *done* of *total* lets one expect; empty before the first is done."""
    if not done:
        return ""
    seconds = round(spent * (total - done) / done)
    return f"{seconds // 60}:{seconds % 60:02d} left"


class _Line:
    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def show(self, done: int, total: int, words: str) -> None:
        """Rewrite the line in place: a bar of 20 columns, a percentage and *words*, cut to the width."""
        bar = "#" * (20 * done // max(total, 1))
        # Cut before the code that clears: a line that wraps could not be rewritten, and a cut code would be shown.
        self.stream.write(f"\r[{bar:<20}] {100 * done // max(total, 1)}% {words}"[:columns(self.stream)] + "\033[K")
        self.stream.flush()

    def clear(self) -> None:
        """Erase the line, so that what is printed next begins in column 1."""
        self.stream.write("\r\033[K")
        self.stream.flush()


class _Rich:
    def __init__(self, progress: Any) -> None:
        self.progress = progress
        self.task = progress.add_task("", total=None)
        progress.start()

    def show(self, done: int, total: int, words: str) -> None:
        """Move rich's bar to *done* of *total*, with *words* before it."""
        self.progress.update(self.task, completed=done, total=total, description=words, refresh=True)

    def clear(self) -> None:
        """Stop rich's bar, which erases it."""
        self.progress.stop()


def _bar(stream: TextIO, table: FillingTable | None) -> _Line | _Rich:
    make = _rich_bar()
    return make(stream, table) if make else _Line(stream)


# rich costs some 50 ms to import and is optional, so it is asked for only when a bar is wanted.
def _rich_bar() -> Callable[[TextIO, FillingTable | None], _Rich] | None:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as RichProgress
    except ImportError:
        return None

    def make(stream: TextIO, table: FillingTable | None) -> _Rich:
        console = Console(file=stream)
        shown = table if table is not None and table.fits(*console.size) else None

        class Filled(RichProgress):
            @override
            def get_renderables(self) -> Iterator[Any]:
                if shown is not None:
                    yield shown.text()
                yield from super().get_renderables()

        columns = (BarColumn(bar_width=20), TaskProgressColumn(), TextColumn("{task.description}", markup=False))
        # Refreshed by hand: its own thread and the explorer's forks do not go together.
        return _Rich(Filled(*columns, console=console, transient=True, auto_refresh=False))

    return make
