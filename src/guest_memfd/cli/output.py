"""Where a result goes: standard output, or a file that is either complete or untouched.

Rule of this file: whether the file can be written is found out before any work starts, and nothing is seen under its
name until the work is done.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from types import TracebackType
from typing import TextIO

from guest_memfd.errors import BadInput
from guest_memfd.report.counterexample import trace_name
from guest_memfd.report.style import Style, style_for


class Output:
    """A place for the result; `with Output(path) as out: ... out.write(text)`. None and ``-`` mean standard output.

    Raises BadInput on entry when *path* cannot be written. On an exception the file stays as it was.
    """

    def __init__(self, path: str | None) -> None:
        self.path = None if path in (None, "-") else Path(os.path.realpath(str(path)))
        self.named = path
        self._stream: TextIO = sys.stdout
        self._beside: Path | None = None

    @property
    def style(self) -> Style:
        """Colours only on a terminal."""
        return Style() if self.path else style_for(sys.stdout)

    def __enter__(self) -> Output:
        if self.path is not None:
            try:
                self._open(self.path)
            except OSError as error:
                raise BadInput(f"cannot write to {self.named!r}: {error.strerror}") from error
        return self

    # A device or a pipe is written to as it is; replacing it by a file would be worse than a half-written result.
    def _open(self, path: Path) -> None:
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            self._stream = path.open("w", encoding="utf-8")
            return
        if path.exists():
            path.open("r+b").close()
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._stream = beside.open("x", encoding="utf-8")
        self._beside = beside

    def write(self, text: str) -> None:
        """Append *text*, and a newline if it has none; raises BadInput when there is no room for it."""
        try:
            self._stream.write(text if text.endswith("\n") else f"{text}\n")
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise BadInput(f"cannot write to {self.named or 'standard output'!r}: {error.strerror}") from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.path is None:
            return
        try:
            self._stream.close()
            if self._beside is not None and kind is None:
                os.replace(self._beside, self.path)
        except OSError as failed:
            self._discard()
            if kind is None:
                raise BadInput(f"cannot write to {self.named!r}: {failed.strerror}") from failed
        if kind is not None:
            self._discard()

    def _discard(self) -> None:
        if self._beside is not None:
            self._beside.unlink(missing_ok=True)


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

    def __exit__(self, *_: object) -> None:
        if self._made and not any(self.path.iterdir()):
            self.path.rmdir()

    def file(self, design: str, hypervisor: str, law: str) -> Path:
        """Where the trace of *law* goes."""
        return self.path / trace_name(design, hypervisor, law)
