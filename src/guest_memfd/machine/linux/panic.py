"""How Linux stops. It is no error of this program."""

from __future__ import annotations

HARDWARE = "Hardware name: emulated machine of guest-memfd, not the machine that it runs on"
"""A line of every panic, where Linux has the name of the board."""


class KernelPanic(Exception):  # noqa: N818
    """Linux has stopped; `text` is what it says on the console."""

    def __init__(self, text: str) -> None:
        super().__init__(text.splitlines()[0] if text else "panic")
        self.text = text
