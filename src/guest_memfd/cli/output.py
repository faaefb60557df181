"""Where a result goes: a stream, which is written as it is, or a file, which is either complete or untouched.

Whether the file can be written is found out before any work starts, and nothing is seen under its name until the work is
done.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import TextIO

from guest_memfd.cli import room
from guest_memfd.cli.stop import deafen
from guest_memfd.errors import BadInput
from guest_memfd.report.counterexample import trace_name
from guest_memfd.report.style import Style, style_for

_LINKS = 40
"""As many symbolic links as Linux follows in one path."""
_OF_A_PROCESS = re.compile(r"/proc/[^/]+(/task/\d+)?/fd")


_ours: TextIO | None = None
_numbers = count()


@contextmanager
def reserved() -> Iterator[None]:
    """Within the block standard output is Output's alone: what anybody else prints, a plugin, goes to standard error."""
    global _ours
    _ours, sys.stdout = sys.stdout, sys.stderr
    try:
        yield
    finally:
        sys.stdout, _ours = _ours, None


class Output:
    """A place for the result; `with Output(path) as out: ... out.write(text)`. None and ``-`` mean standard output.

    A device, a pipe, and whatever a descriptor stands for (``/dev/stdout``, ``/dev/fd/3``, the file that standard output
    goes to anyway) is written to as it is; a file keeps its mode and owner, and on an exception stays as it was. What UTF-8
    has no letter for is written as an escape. Raises BadInput on entry when *path* cannot be written.
    """

    def __init__(self, path: str | None) -> None:
        self.named = None if path == "-" else path
        self._stream: TextIO = _ours or sys.stdout
        self._beside: Path | None = None
        self._path = Path()

    @property
    def style(self) -> Style:
        """Colours, and the width, of the terminal that it goes to; as for a mail where it goes to none."""
        return style_for(self._stream)

    def __enter__(self) -> Output:
        if self.named is not None:
            try:
                self._open(self.named)
            except OSError as error:
                raise _unwritable(self.named, error) from error
        return self

    def _open(self, named: str) -> None:
        descriptor = _descriptor(named)
        if descriptor is not None:
            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                raise OSError(errno.EBADF, "it is open for reading only")
            # A duplicate shares the place in the file, so that the next writer goes on after us.
            self._stream = _text(os.dup(descriptor))
            return
        if _OF_A_PROCESS.fullmatch(os.path.dirname(named)):
            self._stream = _text(os.open(named, os.O_WRONLY | os.O_APPEND))
            return
        # What a link leads to is replaced, and not the link.
        self._path = Path(os.path.realpath(named))
        if self._path.exists() and not stat.S_ISREG(self._path.stat().st_mode):
            self._stream = _text(os.open(self._path, os.O_WRONLY))
            return
        if self._path.exists():
            # Opened and not asked about: root may write where the bits say
            # no, and no one may on a mount that is read-only.
            self._path.open("r+b").close()
        # Its own name may be as long as a name can be; the process may write several.
        # In the same folder: os.replace() is one step only within a file system.
        beside = self._path.with_name(f".gmem.{os.getpid()}.{next(_numbers)}.tmp")
        # O_EXCL follows no link: in a folder that others write to, one may wait under this very name.
        self._stream = _text(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        self._beside = beside

    def write(self, text: str) -> None:
        """Append *text*, and a newline if it has none; raises BadInput when there is no room for it."""
        try:
            self._stream.write(text if text.endswith("\n") else f"{text}\n")
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _unwritable(self.named or "standard output", error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A second ^C would leave half a file, under a name that no one looks for.
        if kind is not None:
            deafen()
            room.give_back()
        if self.named is None:
            return
        try:
            with suppress(BrokenPipeError):             # said when it was written to
                self._stream.close()
            if self._beside is not None and kind is None:
                _into_place(self._beside, self._path)
        except OSError as failed:
            if kind is None:
                raise _unwritable(self.named, failed) from failed
        finally:
            if self._beside is not None:
                with suppress(OSError):
                    os.unlink(self._beside)


def _text(descriptor: int) -> TextIO:
    return open(descriptor, "w", encoding="utf-8", errors="backslashreplace")


def _unwritable(named: str, error: OSError) -> BadInput:
    return BadInput(f"cannot write to {named!r}: {error.strerror}")


# The descriptor of this process that *named* stands for, if any: by its name, or because standard output or standard error
# go to that very file, which would be lost with all that is in it if another took its place.
def _descriptor(named: str) -> int | None:
    path, ours = named, os.path.realpath("/proc/self/fd")
    for _ in range(_LINKS):
        folder, name = os.path.split(path)
        if name.isdecimal() and os.path.realpath(folder or ".") == ours:
            return int(name)
        if not os.path.islink(path) or _OF_A_PROCESS.fullmatch(folder):
            break
        path = os.path.join(folder, os.readlink(path))
    for standard in (1, 2):
        with suppress(OSError):
            there = os.fstat(standard)
            if stat.S_ISREG(there.st_mode) and os.path.samestat(there, os.stat(named)):
                return standard
    return None


# A file that has another owner, several names, or may not be replaced (a mount point) gets the new content, all the others
# are replaced, which no one can see half done.
def _into_place(beside: Path, path: Path) -> None:
    try:
        old = path.stat()
    except FileNotFoundError:
        os.replace(beside, path)
        return
    try:
        new = beside.stat()
        if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
            os.chown(beside, old.st_uid, old.st_gid)
        os.chmod(beside, stat.S_IMODE(old.st_mode))
        if old.st_nlink == 1:
            os.replace(beside, path)
            return
    except OSError:
        pass
    with beside.open("rb") as source, path.open("r+b") as target:
        shutil.copyfileobj(source, target)
        target.truncate()


def opened(stack: ExitStack, arguments: argparse.Namespace, *options: str) -> tuple[Output, list[Output | None]]:
    """Where ``--output`` and each of *options* go, all open in *stack*; None where one is not given.

    Raises BadInput where one of them cannot be written, or two are one file.
    """
    places: dict[str, str] = {}
    for option in ("output", *options):
        given = getattr(arguments, option)
        place = None if given in (None, "-") else os.path.realpath(given)
        if place is not None and places.setdefault(place, option) != option:
            raise BadInput(f"--{places[place]} and --{option} are both {given!r}; each needs a file of its own")
    out = stack.enter_context(Output(arguments.output))
    others = (getattr(arguments, option) for option in options)
    return out, [None if each is None else stack.enter_context(Output(each)) for each in others]


class TraceFolder:
    """A folder for saved traces, made on entry if it is not there; raises BadInput when it cannot be written.

    A folder that was made and into which nothing came is taken away again.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._made = False

    def __enter__(self) -> TraceFolder:
        try:
            self._made = not self.path.is_dir()
            self.path.mkdir(exist_ok=True)
        except OSError as error:
            raise BadInput(f"cannot make folder {str(self.path)!r} for traces: {error.strerror}") from error
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise BadInput(f"cannot write to folder {str(self.path)!r}: Permission denied")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            deafen()
            room.give_back()
        if self._made:
            with suppress(OSError):                     # there is something in it
                self.path.rmdir()

    def file(self, design: str, hypervisor: str, law: str) -> Path:
        """Where the trace of *law* goes."""
        return self.path / trace_name(design, hypervisor, law)
