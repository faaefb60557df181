"""Tests of the project as killers: each test is a scenario.

pytest collects once, and the work is done inside of its loop: children are born with all tests at hand. A test that
starts a process of its own does not see the mutant there.
"""

from __future__ import annotations

import ast
import gc
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mutants.killer import Killer, Scenario

if TYPE_CHECKING:
    import pytest

TESTS = Path(__file__).resolve().parent.parent.parent / "tests"
PACKAGE = "guest_memfd"
OFF = ("terminal", "cacheprovider", "xdist", "unraisableexception", "threadexception")
ARGUMENTS = (*(f"-pno:{plugin}" for plugin in OFF), "-s", "-m", "not long")


class Tested(Killer):
    """The quick tests in *files* of tests/ (patterns)."""

    name = "tests"
    depends_on_import = True

    def __init__(self, *files: str) -> None:
        self.files = files
        self.items: list[pytest.Item] = []
        self.package: Any = None
        self.reports = _Reports()

    def within(self, work: Callable[[], None]) -> None:
        """Do *work* where the tests are collected."""
        import pytest

        loop, paths = _Loop(self, work), self._paths()
        if paths:
            pytest.main([*ARGUMENTS, *paths], plugins=[loop, self.reports])
        if loop.error is not None:
            raise loop.error
        if not loop.begun:
            raise RuntimeError(f"there are no tests in {', '.join(self.files)}, or pytest cannot collect them")

    def scenarios(self) -> Iterator[Scenario]:
        """Each of them; by files if the package was imported anew, as the tests at hand know the old one."""
        gc.freeze()                                     # what there is already is looked at by no collection
        if sys.modules[PACKAGE] is self.package:
            for item in self.items:
                yield Scenario(_file(item.nodeid), item.nodeid, partial(self._run, item))
        else:
            for path in self._paths():
                yield Scenario(Path(path).name, f"all of {Path(path).name}", partial(self._run_anew, path))

    def looking_at(self, module: str) -> set[str]:
        """Test files that import it."""
        return {Path(path).name for path in self._paths() if module in _imported(path)}

    def _run_anew(self, path: str) -> str | None:
        import pytest

        for name in [name for name, module in sys.modules.items() if _is_a_test(module)]:
            del sys.modules[name]
        reports = _Reports()
        gc.enable()                                     # here is no place to collect between two tests
        try:
            with _Quiet():
                code = pytest.main([*ARGUMENTS, "-x", path], plugins=[reports])
        finally:
            gc.disable()
            gc.collect()
        if reports.interrupted is not None:
            raise reports.interrupted                   # pytest ends in peace then
        failed = next((report for report in reports.said if report.failed), None)
        if failed is not None:
            return f"{failed.nodeid}: {_words(failed)}"
        return None if code == pytest.ExitCode.OK else f"pytest ends with {code!r}"     # tests that cannot be collected

    def _paths(self) -> list[str]:
        return [str(path) for file in self.files for path in sorted(TESTS.glob(file))]

    # The first failure's first line.
    def _run(self, item: pytest.Item) -> str | None:
        self.reports.said.clear()
        with _Quiet():
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            gc.collect()                                # children do not collect by themselves, and a machine is large
        failed = next((report for report in self.reports.said if report.failed), None)
        return None if failed is None else _words(failed)


# Names that *path* imports, of modules and of what may be one.
@cache
def _imported(path: str) -> frozenset[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(Path(path).read_text())):
        if isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update((node.module, *(f"{node.module}.{name.name}" for name in node.names)))
    return frozenset(found)


# The world of a test.
def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0].rpartition("/")[2]


def _words(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr).partition("\n")[0] or report.when or "failed"


# A folder without an `__init__.py` has no file, and keeps what was imported from it.
def _is_a_test(module: Any) -> bool:
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return any(str(place).startswith(f"{TESTS}{os.sep}") for place in places)


class _Reports:
    # A plugin that keeps what becomes of tests, and what put an end to them.
    def __init__(self) -> None:
        self.said: list[pytest.TestReport] = []
        self.interrupted: BaseException | None = None

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        self.interrupted = excinfo.value

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.said.append(report)


class _Loop:
    # A plugin: takes the place of the loop that runs the tests.
    def __init__(self, tested: Tested, work: Callable[[], None]) -> None:
        self.tested, self.work = tested, work
        self.begun = False
        self.error: BaseException | None = None

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.begun = bool(session.items)
        self.tested.items, self.tested.package = session.items, sys.modules[PACKAGE]
        if self.begun:
            try:
                self.work()
            except BaseException as error:              # pytest would make an internal error of it
                self.error = error
        return True


class _Quiet:
    # What a test prints is no one's concern.
    def __enter__(self) -> None:
        sys.stdout.flush()
        self.kept = os.dup(1), os.dup(2)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for fd in (1, 2):
            os.dup2(nowhere, fd)
        os.close(nowhere)

    def __exit__(self, *_: object) -> None:
        sys.stdout.flush()
        for fd, kept in zip((1, 2), self.kept, strict=True):
            os.dup2(kept, fd)
            os.close(kept)
