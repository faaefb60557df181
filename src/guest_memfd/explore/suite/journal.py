"""A file of scenarios that are done, for a run that goes on where another one ended (`--resume`).

Lines of JSON: the first says which code was asked what, each of the others is what one scenario came to, with a checksum.
A line is appended when its scenario ends, in one write; so whenever a run is killed, all lines but the last are whole, and a
last one that has no end is taken away. Whatever else is wrong with the file, nothing in it is believed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import warnings
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from guest_memfd.errors import BadInput, JournalNotice
from guest_memfd.explore.suite.coverage import Coverage
from guest_memfd.explore.suite.work import Answer, Task

SCHEMA = "guest-memfd-campaign/1"

FINAL = None, "states"
"""Limits that would be met again: of a scenario that met another one nothing is kept."""


class Journal:
    """`with Journal(path, head, tasks) as journal:` - *known*: what the file has of *tasks*; `add` appends to it.

    head: which code is asked what, JSON's names and values. Raises BadInput on entry for a file that cannot be written, that
    another run is writing to, or that is not of the same head; `add`, where there is no room for more.
    """

    def __init__(self, path: str, head: Mapping[str, Any], tasks: Sequence[Task]) -> None:
        self.path, self.tasks = path, {task.order: task for task in tasks}
        self.known: dict[Task, Answer] = {}
        self._head = {"schema": SCHEMA, **json.loads(json.dumps(head))}
        self._first = f"{json.dumps(self._head)}\n".encode()
        self._file = -1

    def __enter__(self) -> Self:
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            self._open()
        except OSError as error:
            self._close()
            raise self._unwritable(error) from error
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def add(self, task: Task, answer: Answer) -> None:
        """Append what *task* came to, unless it met a limit that need not be met again."""
        if answer.limit in FINAL:
            self._write(_line(_entry(task, answer), self._first))

    def _open(self) -> None:
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise BadInput(f"{self.path!r} is no file that can be gone on with")
        try:
            # A record lock is this process's alone: children do not inherit it.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise BadInput(f"another run is writing to {self.path!r}; each needs a file of its own") from error
        # Not through another descriptor: to close it would give up the lock.
        text = os.pread(self._file, os.fstat(self._file).st_size, 0)
        # A run may have been killed before it had written the first line.
        if self._first.startswith(text):
            os.ftruncate(self._file, 0)
            self._write(self._first)
            return
        whole, _, rest = text.rpartition(b"\n")
        first, *lines = whole.split(b"\n")
        self._compare(first)
        for number, line in enumerate(lines, 2):
            self._take(number, line)
        if rest:
            os.ftruncate(self._file, len(text) - len(rest))
            warnings.warn(f"the last line of {self.path!r} was cut off; its scenario is explored again", JournalNotice,
                          stacklevel=3)

    def _compare(self, first: bytes) -> None:
        theirs = _parsed(first)
        if theirs is None or theirs.get("schema") != SCHEMA:
            raise BadInput(f"{self.path!r} is not what --resume writes; give such a file, or one that is not there yet")
        if theirs.get("code") != self._head["code"]:
            raise BadInput(f"{self.path!r} was begun with another version of the code, and its answers cannot be taken "
                           "over; give another file")
        for name, ours in self._head.items():
            if name in theirs and theirs[name] != ours:
                raise BadInput(f"{self.path!r} was begun with other options: {name} {_short(theirs.get(name))}, and now "
                               f"{_short(ours)}; give the same, or another file")
        if first + b"\n" != self._first:
            raise BadInput(f"the first line of {self.path!r} is damaged; give another file")

    def _take(self, number: int, line: bytes) -> None:
        entry = _parsed(line)
        try:
            if entry is None or _line(entry, self._first) != line + b"\n":
                raise ValueError
            task = self.tasks[entry["scenario"]]
            if list(task.parties) != entry["parties"]:
                raise ValueError
            self.known[task] = _answer(entry)
        except (LookupError, TypeError, ValueError) as error:
            raise BadInput(f"line {number} of {self.path!r} is damaged; give another file, or take the line out") from error

    def _write(self, line: bytes) -> None:
        size = os.fstat(self._file).st_size
        try:
            done = os.write(self._file, line)
            while done < len(line):
                done += os.write(self._file, line[done:])
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, size)
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> BadInput:
        return BadInput(f"cannot write to {self.path!r}: {error.strerror}")

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _entry(task: Task, answer: Answer) -> dict[str, Any]:
    return {"scenario": task.order, "parties": task.parties, "states": answer.states, "transitions": answer.transitions,
            "seconds": round(answer.seconds, 3), "limit": answer.limit, "broken": answer.broken,
            "happened": sorted(answer.coverage.events), "asked": sorted(answer.coverage.asked)}


def _answer(entry: Mapping[str, Any]) -> Answer:
    return Answer(entry["states"], entry["transitions"], entry["seconds"], entry["limit"],
                  tuple((law, evidence, steps, injected) for law, evidence, steps, injected in entry["broken"]), None,
                  Coverage(frozenset(entry["happened"]), frozenset(entry["asked"])))


# With a checksum that a line of another file does not have.
def _line(entry: Mapping[str, Any], first: bytes) -> bytes:
    body = {name: value for name, value in entry.items() if name != "check"}
    return json.dumps({**body, "check": zlib.crc32(first + json.dumps(body).encode())}).encode() + b"\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
