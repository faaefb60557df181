"""The guest_memfd library: its parts put together."""

from __future__ import annotations

from guest_memfd.core.fault import Faults
from guest_memfd.core.file import Files


class Library(Files, Faults):
    """What a hypervisor's driver and its VMM call. One instance serves one file; it keeps no state of its own."""
