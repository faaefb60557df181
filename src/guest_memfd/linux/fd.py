"""What owns a file descriptor. Rules of this file: closed once, EBADF afterwards, and never inherited by an exec."""

from __future__ import annotations

import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from errno import EBADF
from types import TracebackType
from typing import Self

from guest_memfd.compat import override
from guest_memfd.errors import BadInput, SyscallFailed

dropped: Callable[[str], object] | None = None
"""Told of what was never closed, in place of the warning: for tests that count."""


class OwnedFd(ABC):
    """Owner (uapi/memory.py): given up once, by `close` or a with block's end, however often that is asked for.

    By the garbage collector if by no one else, which is a ResourceWarning, as for Python's own files.
    """

    closed = True                   # until there is something to close: a constructor may raise

    def close(self) -> None:
        """Give it up; a second time changes nothing."""
        if not self.closed:
            self.closed = True
            self._release()

    # What giving it up is.
    @abstractmethod
    def _release(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # At the end of the interpreter the kernel closes everything, and nothing here can be relied on.
    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if self.closed or finalizing():
            return
        try:
            if dropped is None:
                warnings.warn(f"never closed: {self!r}", ResourceWarning, source=self, stacklevel=1)
            else:
                dropped(repr(self))
        finally:
            self.close()


class Descriptor(OwnedFd):
    """Owner of *fd*, which is called *name* in messages. The kernel opens most of these without O_CLOEXEC; it is set here.

    Another thread's fork and exec in between still inherits it: nothing can be done about that from outside the kernel.
    """

    def __init__(self, fd: int, name: str) -> None:
        self._fd, self.name, self.closed = fd, name, False
        try:
            os.set_inheritable(fd, False)
        except OSError as error:
            self.close()
            raise SyscallFailed(error.errno or 0, "FIOCLEX", name) from error

    def fileno(self) -> int:
        """The descriptor; raises SyscallFailed(EBADF) once closed."""
        if self.closed:
            raise SyscallFailed(EBADF, self.name, "it has been closed")
        return self._fd

    # The kernel refuses -1, too: the shortest calls leave it to that instead of asking `fileno`.
    @override
    def _release(self) -> None:
        # Forgotten before it is closed: from then on the number may be a file that another thread has just opened.
        fd, self._fd = self._fd, -1
        os.close(fd)

    @override
    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}, {'closed' if self.closed else f'fd {self._fd}'}>"


def number_of(owner: object) -> int:
    """The descriptor of something the kernel is told about; -1, which it refuses, once closed or for None.

    Raises BadInput for what was never a descriptor of this host.
    """
    if owner is None:
        return -1
    if not isinstance(owner, Descriptor):
        raise BadInput(f"{owner!r} is no file of the Linux host")
    return owner._fd
