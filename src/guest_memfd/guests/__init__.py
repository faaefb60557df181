"""Guests that come with the package. Here are name, title and needs of each; the programs are the `.s` files.

There is a folder for each architecture. What every guest may rely on:

* Its image lies at the beginning of its private memory, and all of that may be used.
* It is told where a `BootInfo` (bootinfo.py) is, which `enter` in common.s reads at once; the memory it lies in is the
  guest's from then on.
* A byte stored to CONSOLE is printed. Reading it gives 0.

arm64: it enters at EL1 with its MMU off, x0 holds the IPA of the boot info, and SYSTEM_OFF of PSCI by HVC ends it.
Hypercalls follow SMCCC: function in x0, result in x0. The same guest runs under Gunyah, pKVM and KVM.

x86_64: it enters in 64-bit mode at CPL 3, with every GiB up to the end of its memory mapped to itself; rdi holds the address
of the boot info, rsp the end of that page. CONTROL has the devices that stand for hypercalls. In real mode a guest enters
like a boot sector, es:di is the boot info's address, ports stand for CONSOLE and CONTROL, and HLT ends it.
"""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
from typing import NamedTuple

from guest_memfd.errors import BadInput, UnknownName
from guest_memfd.words.units import PAGE, Ipa

PRIVATE_BASE = Ipa(0x8000_0000)
"""IPA of the memory that is the guest's own, unless said otherwise."""
SHARED_BASE = Ipa(0x0008_0000)
"""IPA of the window it shares with the host."""
CONSOLE = 0x0900_0000
"""UARTDR of the PL011 of the usual virtual machine."""
SYSTEM_OFF = 0x8400_0008
"""PSCI, Arm DEN 0022."""
CONTROL = 0x0901_0000
"""x86_64: a store here ends the guest; one to the next doubleword gives the page back whose address is stored, and a load
from there says what came of it: 0, or an errno."""
CONSOLE_PORT, CONTROL_PORT = 0xE9, 0xEA
"""Real mode: a byte to the first is printed; a doubleword to the second gives a page back, as CONTROL + 8 does."""
SECRET = b"guest secret: the host must never read this line"
"""What `hello` writes at the beginning of the last page of its private memory, and `relinquish` to the page it gives up."""
SHARED_LINE = b"guest was here"
"""What `shared` writes at the beginning of the shared window."""


class Needs(NamedTuple):
    """The least a guest can run with, in bytes."""

    private: int
    shared: int = 0


class Guest(NamedTuple):
    """One guest, there for each of *architectures*; its source is assembled each time it is loaded."""

    name: str
    title: str
    needs: Needs
    well_behaved: bool = True
    architectures: tuple[str, ...] = ("arm64", "x86_64")
    real_mode: bool = False


GUESTS = {guest.name: guest for guest in (
    Guest("hello", "prints a line and writes a secret into its last page", Needs(4 * PAGE)),
    Guest("memory", "writes to all of its private pages, reads them back and counts", Needs(4 * PAGE)),
    Guest("shared", "leaves a line in the window it shares with the host", Needs(4 * PAGE, PAGE)),
    Guest("relinquish", "gives a page up and touches it again", Needs(4 * PAGE)),
    Guest("mmu", "maps itself with 2 MiB blocks, turns its MMU on and prints through it", Needs(8 * PAGE),
          architectures=("arm64",)),
    Guest("jump-nowhere", "jumps to where there is no memory", Needs(4 * PAGE), False),
    Guest("loop", "runs forever without an exit", Needs(4 * PAGE), False),
    Guest("fault-forever", "faults, and its vectors fault", Needs(4 * PAGE), False),
    Guest("outside", "reads and writes beyond its private memory", Needs(4 * PAGE), False),
    Guest("bad-hypercall", "calls functions that do not exist, with arguments that make no sense", Needs(4 * PAGE), False,
          ("arm64",)),
    Guest("boot-sector", "says hello from real mode, gives a page up and touches it again", Needs(32 * PAGE),
          architectures=("x86_64",), real_mode=True),
    Guest("real-loop", "runs forever in real mode", Needs(32 * PAGE), False, ("x86_64",), real_mode=True),
)}


def guest(name: str, architecture: str = "arm64") -> Guest:
    """The guest called *name*; raises UnknownName, BadInput where it is not there for *architecture*."""
    there = {each: found for each, found in GUESTS.items() if architecture in found.architectures}
    if name in GUESTS and name not in there:
        raise BadInput(f"guest {name!r} is there for {', '.join(GUESTS[name].architectures)} only; for {architecture} there "
                       f"are {', '.join(there)}")
    if name not in there:
        raise UnknownName("guest", name, there)
    return there[name]


def source(architecture: str, name: str) -> Traversable:
    """The file of assembly called *name*, for *architecture*; it belongs to the package's data."""
    return resources.files(__name__) / architecture / f"{name}.s"
