"""The run behind the tour: an emulated pKVM machine, a small guest, and the one KVM_RUN in which a page is lent.

It decides nothing about the tour. A caller that wants to see the run gives `ride` a way to watch it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

from guest_memfd import Config, Machine, assemble
from guest_memfd.guests import CONSOLE, PRIVATE_BASE, SYSTEM_OFF
from guest_memfd.guests.loader import GuestImage
from guest_memfd.vmm.devices import Console
from guest_memfd.vmm.kvm import KvmGuest
from guest_memfd.vmm.layout import Layout
from guest_memfd.words.units import PAGE

PAGES = 16
INDEX = 8
"""Which page of the file is lent."""
IPA = PRIVATE_BASE + INDEX * PAGE
GFN = IPA // PAGE
RAM = 32 << 20

PROGRAM = f"""\
_start: ldr  x1, ={CONSOLE:#x}
        mov  w0, #'.'
        strb w0, [x1]               // a byte to the console
        ldr  x1, ={IPA:#x}
        mov  x0, #42
        str  x0, [x1]               // the store to a new page
        ldr  x0, ={SYSTEM_OFF:#x}
        hvc  #0                     // power off
"""
"""The guest."""

FOR_EVER = 600.0
"""Seconds that a KVM_RUN may take."""


class Ride(NamedTuple):
    """The machine, and the guest in the state in which its next KVM_RUN is the one to watch."""

    machine: Any
    guest: KvmGuest


class _Nobody:
    # No one debugs this guest.

    def pc(self) -> int:
        return 0

    def registers(self) -> Mapping[str, int]:
        return {}


def ride(watching: Callable[[Ride], AbstractContextManager[None]], design: str = "library") -> None:
    """Boot, run the guest up to its byte on the console, and then once more while *watching* looks on."""
    machine = Machine("pkvm", Config(ram=RAM))
    image = GuestImage([(PRIVATE_BASE, assemble(PROGRAM, PRIVATE_BASE, "tour").data)], PRIVATE_BASE, "tour")
    with ExitStack() as stack:
        device = stack.enter_context(machine.open("/dev/kvm", design))
        guest = KvmGuest(device, Layout(PAGES * PAGE, 0), image, Console(_unheard), stack, _unheard, protected=True,
                         debugger=_Nobody())
        if guest.step(FOR_EVER) is not None:
            raise AssertionError("the guest has ended before it was watched")
        with watching(Ride(machine, guest)):
            ended = guest.step(FOR_EVER)
        if ended is None or ended.how != "off":
            raise AssertionError(f"the guest does not turn off: {ended}")


def _unheard(_text: str) -> None:
    pass
