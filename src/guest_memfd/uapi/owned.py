"""What every host's objects have in common. It is given up once, however often that is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Owned(ABC):
    """Owner (uapi/memory.py): `close` gives it up, once; so does a with block's end."""

    closed = False

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
