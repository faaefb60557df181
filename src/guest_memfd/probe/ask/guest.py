"""A guest that does one load or one store at a time, and says what it saw (x86-64).

It runs at CPL 3 with tables and code in a plain slot, so that every KVM runs it as hardware would; only `at_cpl_0` does
not, to find out whether this KVM emulates what a guest's kernel does.
"""

from __future__ import annotations

from guest_memfd.errors import GuestMemfdError
from guest_memfd.linux.guest_x86 import RESULT, SmallGuest
from guest_memfd.linux.system import System
from guest_memfd.probe.ask.calls import name_of
from guest_memfd.probe.ask.child import Unfit
from guest_memfd.probe.ask.here import Here
from guest_memfd.uapi.kvm_run import Exit, MemoryFault, Mmio, Unknown

# mov (%rbx),%rax | mov %rdx,(%rbx); then mov %rax,(%rcx); and jmp . in case no one stops it.
_LOAD, _STORE = b"\x48\x8b\x03\x48\x89\x01\xeb\xfe", b"\x48\x89\x13\x48\x89\x01\xeb\xfe"
SECONDS = 1.0
"""Longest time of one access; a first touch takes microseconds."""


class ProbeGuest:
    """A VM with one vCPU that becomes *here*'s VM; slots from number 1 on are free, guest addresses from 256 MiB on."""

    def __init__(self, here: Here) -> None:
        try:
            self._small = SmallGuest(System(here.path))
        except (GuestMemfdError, OSError) as error:
            raise Unfit(f"no small guest: {error}") from error
        here.adopt(self._small.vm.fileno())

    def load(self, gpa: int) -> str:
        """Eight bytes at *gpa*, as text; or what the exit says, ``mmio`` where no slot is."""
        return self._run(_LOAD, gpa, 0)

    def store(self, gpa: int, text: bytes) -> str:
        """Eight bytes to *gpa*: ``ok``, or as `load`."""
        # The program ends with rax, which is 0 when it begins: "zero" is all that a store can say.
        said = self._run(_STORE, gpa, int.from_bytes(text.ljust(8, b"\0"), "little"))
        return "ok" if said == "zero" else said

    def at_cpl_0(self, gpa: int) -> str:
        """`load` by a guest's kernel."""
        self._small.start(_LOAD, rbx=gpa, rcx=RESULT)
        sregs = self._small.vcpu.get_sregs()
        for name in ("cs", "ds", "es", "fs", "gs", "ss"):
            segment = getattr(sregs, name)
            # Both: VMX may refuse to enter a guest whose SS has one level in its selector and another in its descriptor.
            segment.dpl, segment.selector = 0, segment.selector & ~3
        self._small.vcpu.set_sregs(sregs)
        return _said(self._small.vcpu.run(SECONDS))

    def _run(self, code: bytes, gpa: int, value: int) -> str:
        self._small.start(code, rbx=gpa, rcx=RESULT, rdx=value)
        return _said(self._small.vcpu.run(SECONDS))


def _said(told: Exit) -> str:
    match told:
        case Mmio(phys_addr=where, data=data) if where == RESULT:
            text = data.rstrip(b"\0")
            return text.decode("ascii", "replace") if text else "zero"
        case Mmio():
            return "mmio"
        case MemoryFault(flags=flags, gpa=gpa, size=size, errno=errno):
            return f"{name_of(OSError(errno, ''))}, memory fault flags {flags} gpa {gpa:#x} size {size:#x}"
        case Unknown(reason=reason, errno=errno):
            return f"{name_of(OSError(errno, ''))}, exit {reason}"
        case _:
            return str(told)
