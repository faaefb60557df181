"""Devices: a console, and nothing else. Rule of this file: what an access outside of memory does."""

from __future__ import annotations

from collections.abc import Callable

from guest_memfd.guests import CONSOLE


class Console:
    """A byte stored to CONSOLE is given to *write* as text; `text` is all of it. Reading gives 0."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._raw = bytearray()

    @property
    def text(self) -> str:
        """What the guest has said."""
        return self._raw.decode("utf-8", "backslashreplace")

    def has(self, address: int) -> bool:
        """Whether *address* is the console's."""
        return address == CONSOLE

    def put(self, data: bytes) -> None:
        """The low byte of a store."""
        self._raw += data[:1]
        self._write(data[:1].decode("latin-1"))
