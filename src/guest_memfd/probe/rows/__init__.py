"""The behaviour table, in the order in which it is tried and shown.

Each file owns one kind of operation, has functions that do it to a `Here`, and `ROWS` (guest_memfd) or `SECRET_ROWS`
(memfd_secret) that say with which input and what comes of it. Confirmed on 6.18.44, x86-64.
"""

from __future__ import annotations

from guest_memfd.probe.ask.row import Row
from guest_memfd.probe.rows import create, fallocate, files, guest, lifetime, mapping, memory, pins, poison, secret, slots

ROWS: tuple[Row, ...] = (
    *create.ROWS, *files.ROWS, *fallocate.ROWS, *mapping.ROWS, *memory.ROWS, *pins.ROWS, *slots.ROWS, *guest.ROWS,
    *lifetime.ROWS, *poison.ROWS,
    *secret.SECRET_ROWS, *files.SECRET_ROWS, *mapping.SECRET_ROWS, *memory.SECRET_ROWS, *pins.SECRET_ROWS,
    *guest.SECRET_ROWS,
)
