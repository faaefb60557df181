"""A process with a few pages, and a VM that has them as its memory; the guest does what it is told, and one thing at a time.

The guest's registers are nothing to go by, so it asks for its orders by loads from a device, and answers by a store. A guest
that cannot go on, since its page was taken by force, tries the same instruction again at every later order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache

from guest_memfd.asm.arm64.asm import assemble
from guest_memfd.conform.operations import PKVM_PAGES, UserCall
from guest_memfd.conform.subject import StepAnswer
from guest_memfd.errors import Signalled, SyscallFailed, errno_name
from guest_memfd.uapi import kvm_run
from guest_memfd.uapi.kvm_arm64 import MEM_SHARE, MEM_UNSHARE
from guest_memfd.words.units import PAGE, Ipa, Va

PROGRAM, BASE, DEVICE = Ipa(0x2000_0000), Ipa(0x1000_0000), Ipa(0x3000_0000)
"""Guest addresses: of the page with the guest's program, of the others, and of what it asks for its orders."""
SIZE = PKVM_PAGES * PAGE
GONE = "no VM"

_LOAD, _STORE, _DONE = 0, 1, DEVICE + 24
_MOST = 8
"""Exits that one order can take, and two more."""
_SOURCE = """
loop:   ldr     x0, [x20]               // 0 a load, 1 a store, else the number of a hypercall
        ldr     x1, [x20, #8]           // where, or the call's arguments
        ldr     x2, [x20, #16]
        cbz     x0, load
        cmp     x0, #1
        b.eq    store
        mov     x3, #0
        hvc     #0
        b       told
load:   ldr     x0, [x1]
        b       told
store:  str     x2, [x1]
        mov     x0, #0
told:   str     x0, [x20, #24]
        b       loop
"""


@cache
def program() -> bytes:
    """The guest's, for PROGRAM; x20 is DEVICE when it begins."""
    return assemble(_SOURCE, PROGRAM).data


class PkvmSubject(ABC):
    """One life of a process. `address`: of its pages."""

    address: Va

    def __init__(self) -> None:
        self._touched: set[int] = set()
        self._lent: set[int] = set()                    # what the guest shares with the process

    def perform(self, step: UserCall) -> StepAnswer:
        """The answer to *step*, and what the process finds in all pages that anyone has touched."""
        try:
            said = getattr(self, step.op)(*step.args)
        except (SyscallFailed, Signalled) as error:
            said = self._refused(error)
        seen = " ".join(f"{page}:{self._shown(page)}" for page in sorted(self._touched))
        return StepAnswer("ok" if said is None else str(said), seen)

    def _refused(self, error: SyscallFailed | Signalled) -> str:
        if isinstance(error, SyscallFailed):
            return errno_name(error.errno)
        return f"{error.signal} code {error.code} at +{error.address - self.address:#x}"

    def _shown(self, page: int) -> str:
        try:
            return f"{self.load(page * PAGE):x}"
        except Signalled as error:
            return f"{error.signal}/{error.code}"

    # -- what a host has of its own ----------------------------------------------------------------------------------

    @abstractmethod
    def open_vm(self, protected: bool) -> None:
        """A VM of that kind with the pages as its memory, and its vCPU."""

    @abstractmethod
    def close_vm(self) -> None:
        """The VM is closed, and its vCPU."""

    @abstractmethod
    def running(self) -> bool:
        """Whether there is a VM."""

    @abstractmethod
    def run(self) -> kvm_run.Exit:
        """KVM_RUN up to an exit; raises SyscallFailed."""

    @abstractmethod
    def reply(self, value: int) -> None:
        """What the load from the device finds that `run` came back with."""

    @abstractmethod
    def load(self, at: int) -> int:
        """A load of the process, of 8 bytes; raises Signalled."""

    @abstractmethod
    def store(self, at: int, value: int) -> None:
        """A store of the process, of 8 bytes; raises Signalled."""

    @abstractmethod
    def copy_from(self, at: int) -> int:
        """What write(2) takes from the process; raises SyscallFailed."""

    @abstractmethod
    def copy_to(self, at: int, value: int) -> None:
        """What read(2) gives to the process; raises SyscallFailed."""

    @abstractmethod
    def kernel_load(self, at: int) -> int:
        """A load of the kernel's by its own mapping of the page that get_user_pages() finds; raises SyscallFailed."""

    @abstractmethod
    def kernel_store(self, at: int, value: int) -> None:
        """A store of that kind; raises SyscallFailed."""

    @abstractmethod
    def discard(self, page: int) -> None:
        """MADV_DONTNEED of one page."""

    @abstractmethod
    def fork_load(self, at: int) -> str:
        """fork(2), and a load of the child."""

    @abstractmethod
    def end(self) -> list[str]:
        """The end of the process; what is left then, in words."""

    # -- operations --------------------------------------------------------------------------------------------------

    def start(self, protected: int) -> str:
        """A VM, after the end of the one before."""
        ended = self.teardown() if self.running() else "ok"
        self.open_vm(bool(protected))
        return ended

    def teardown(self) -> str:
        """The end of the VM, and which pages it had lent."""
        if not self.running():
            return GONE
        self.close_vm()
        # The pages are named in the answer for known.py: lent pages may differ afterwards, all others may not.
        said = "".join(("ok", *(f", {page} was lent" for page in sorted(self._lent))))
        self._lent.clear()
        return said

    def guest_reads(self, page: int, at: int) -> str:
        """A load by the guest."""
        return self._order(_LOAD, BASE + self._of(page) + at, 0)

    def guest_writes(self, page: int, at: int, value: int) -> str:
        """A store by the guest."""
        return self._order(_STORE, BASE + self._of(page) + at, value)

    def share(self, page: int, at: int, reserved: int) -> str:
        """MEM_SHARE by the guest."""
        said = self._order(MEM_SHARE, BASE + self._of(page) + at, reserved)
        if said == "0x0":
            self._lent.add(page)
        return said

    def unshare(self, page: int, at: int, reserved: int) -> str:
        """MEM_UNSHARE by the guest."""
        said = self._order(MEM_UNSHARE, BASE + self._of(page) + at, reserved)
        if said == "0x0":
            self._lent.discard(page)
        return said

    def calls(self, number: int, first: int, second: int) -> str:
        """A hypercall with two arguments."""
        return self._order(number, first, second)

    def host_reads(self, page: int, at: int) -> str:
        """A load by the process."""
        return f"{self.load(self._of(page) + at):#x}"

    def host_writes(self, page: int, at: int, value: int) -> None:
        """A store by the process."""
        self.store(self._of(page) + at, value)

    def copies_from(self, page: int) -> str:
        """copy_from_user() of a word."""
        return f"{self.copy_from(self._of(page)):#x}"

    def copies_to(self, page: int, value: int) -> None:
        """copy_to_user() of a word."""
        self.copy_to(self._of(page), value)

    def kernel_reads(self, page: int) -> str:
        """get_user_pages() and a load."""
        return f"{self.kernel_load(self._of(page)):#x}"

    def kernel_writes(self, page: int, value: int) -> None:
        """get_user_pages() and a store."""
        self.kernel_store(self._of(page), value)

    def forks(self, page: int) -> str:
        """A load of a forked child."""
        return self.fork_load(self._of(page))

    # From now on the page is looked at after every step.
    def _of(self, page: int) -> int:
        self._touched.add(page)
        return page * PAGE

    def _order(self, *order: int) -> str:
        if not self.running():
            return GONE
        for _ in range(_MOST):
            told = self.run()
            match told:
                case kvm_run.Mmio(at, _, False) if DEVICE <= at < _DONE:
                    self.reply(order[(at - DEVICE) // 8])
                case kvm_run.Mmio(at, _, True, data) if at == _DONE:
                    return f"{int.from_bytes(data, 'little'):#x}"
                case kvm_run.Unknown(_, errno) if errno:
                    return f"KVM_RUN {errno_name(errno)}"
                case _:
                    return f"{told}"
        return "the guest asks and asks"
