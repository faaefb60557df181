"""Memory kept back for when there is none left, so that what was begun can be taken away, and the reason be told."""

from __future__ import annotations

import errno

from guest_memfd.errors import DesignRaised, PluginError

RESERVE = 32 << 20
"""Bytes. They are addresses only: no one touches them, so there is no memory at them."""
_PLENTY = 8 << 20

_kept: list[bytes] = []


def keep() -> None:
    """Keep RESERVE bytes back; raises MemoryError where there are none."""
    # Zeros of calloc(): addresses that count against ulimit -v, and no memory until someone writes there.
    _kept[:] = [bytes(RESERVE)]


def give_back() -> None:
    """Give the reserve to the code that cleans up."""
    _kept.clear()


def lacks(error: BaseException) -> bool:
    """Whether *error* comes of a lack of memory: its own, or that of what it was raised from, or there is none left now.

    The last is for errors in which the interpreter, or a library that does not load, does not say so. A third party's
    ``raise MemoryError`` is none.
    """
    link: BaseException | None = error
    while link is not None and not isinstance(link, DesignRaised | PluginError):
        if isinstance(link, MemoryError) or (isinstance(link, OSError) and link.errno == errno.ENOMEM):
            return True
        link = link.__cause__
    try:
        bytes(_PLENTY)
    except MemoryError:
        return True
    return False
