"""The guest_memfd library: its parts put together."""

from __future__ import annotations

from guest_memfd.core.fault import Faults
from guest_memfd.core.file import Files
from guest_memfd.core.power import Power


class Library(Files, Faults, Power):
    """What a hypervisor's driver and its VMM call. One instance serves one file; it keeps no state of its own."""
