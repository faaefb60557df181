"""Devices: a console, and on x86 a balloon. Here is what an access outside of memory does."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Callable
from typing import Protocol

from guest_memfd.guests import CONSOLE
from guest_memfd.words.units import Ipa


class MmioDevice(Protocol):
    """What lies at an address or a port."""

    def put(self, data: bytes) -> None:
        """A store of 1, 2, 4 or 8 bytes."""

    def get(self) -> bytes:
        """What a load sees, 8 bytes; a shorter one sees the first of them."""


class Console:
    """A byte stored to CONSOLE is given to *write* as text, in UTF-8; `text` is all of it. Reading gives 0."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        # A character comes byte by byte, and a guest may send what is no text at all.
        self._decoder = getincrementaldecoder("utf-8")("backslashreplace")
        self.text = ""

    def end(self) -> None:
        """There is no more: what the guest has left incomplete is said as it is."""
        self._say(self._decoder.decode(b"", final=True))

    def _say(self, text: str) -> None:
        if text:
            self.text += text
            self._write(text)

    def has(self, address: int) -> bool:
        """Whether *address* is the console's."""
        return address == CONSOLE

    def put(self, data: bytes) -> None:
        """The low byte of a store."""
        self._say(self._decoder.decode(data[:1]))

    def get(self) -> bytes:
        """Eight bytes of 0: the console has no input."""
        return bytes(8)


class Balloon:
    """The guest stores the address of a page that it can do without, and loads 0 or an errno: what *take* made of it."""

    def __init__(self, take: Callable[[Ipa], int]) -> None:
        self._take, self._errno = take, 0

    def put(self, data: bytes) -> None:
        """The page's guest physical address."""
        self._errno = self._take(Ipa(int.from_bytes(data, "little")))

    def get(self) -> bytes:
        """What came of it."""
        return self._errno.to_bytes(8, "little")


class Nobody:
    """Where no device is: a load sees ones, a store goes nowhere."""

    def put(self, data: bytes) -> None:
        """The store is lost; a guest is not told."""

    def get(self) -> bytes:
        """Eight bytes of 0xFF, as a bus without a device reads."""
        return b"\xff" * 8
