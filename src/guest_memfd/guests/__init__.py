"""Guests that come with the package. Rule of this file: name, title and needs of each; the programs are the `.s` files.

Every guest runs unchanged under Gunyah and under pKVM. What it may rely on:

* It enters at EL1 with the MMU off, and x0 holds the IPA of a `BootInfo` (bootinfo.py), which `enter` in common.s reads at
  once; the memory it lies in is the guest's from then on.
* A byte stored to CONSOLE is printed. Reading it gives 0.
* SYSTEM_OFF of PSCI by HVC ends it. Hypercalls follow SMCCC: function in x0, result in x0.
* Its image lies at the beginning of its private memory, and all of that may be used.
"""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
from typing import NamedTuple

from guest_memfd.errors import UnknownName

PRIVATE_BASE = 0x8000_0000
"""IPA of the memory that is the guest's own, unless said otherwise."""
SHARED_BASE = 0x0008_0000
"""IPA of the window it shares with the host."""
CONSOLE = 0x0900_0000
"""UARTDR of the PL011 of the usual virtual machine."""
SYSTEM_OFF = 0x8400_0008
"""PSCI, Arm DEN 0022."""
SECRET = b"guest secret: the host must never read this line"
"""What `hello` writes at the beginning of the last page of its private memory, and `relinquish` to the page it gives up."""
SHARED_LINE = b"guest was here"
"""What `shared` writes at the beginning of the shared window."""


class Needs(NamedTuple):
    """The least a guest can run with, in bytes."""

    private: int
    shared: int = 0


class Guest(NamedTuple):
    """One guest: *source* is the assembly it is built from, each time it is loaded."""

    name: str
    title: str
    needs: Needs
    well_behaved: bool = True

    @property
    def source(self) -> Traversable:
        """The file; it belongs to the package's data."""
        return resources.files(__name__) / f"{self.name}.s"


_PAGE = 4096

GUESTS = {guest.name: guest for guest in (
    Guest("hello", "prints a line and writes a secret into its last page", Needs(4 * _PAGE)),
    Guest("memory", "writes to all of its private pages, reads them back and counts", Needs(4 * _PAGE)),
    Guest("shared", "leaves a line in the window it shares with the host", Needs(4 * _PAGE, _PAGE)),
    Guest("relinquish", "gives a page up and touches it again", Needs(4 * _PAGE)),
    Guest("mmu", "maps itself with 2 MiB blocks, turns its MMU on and prints through it", Needs(8 * _PAGE)),
    Guest("jump-nowhere", "jumps to where there is no memory", Needs(4 * _PAGE), False),
    Guest("loop", "runs forever without an exit", Needs(4 * _PAGE), False),
    Guest("fault-forever", "faults, and its vectors fault", Needs(4 * _PAGE), False),
    Guest("outside", "reads and writes behind its private memory", Needs(4 * _PAGE), False),
    Guest("bad-hypercall", "calls functions that do not exist, with arguments that make no sense", Needs(4 * _PAGE), False),
)}


def guest(name: str) -> Guest:
    """The guest called *name*; raises UnknownName."""
    if name not in GUESTS:
        raise UnknownName("guest", name, GUESTS)
    return GUESTS[name]
