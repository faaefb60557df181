"""The emulated pKVM as a subject: a process with anonymous memory on the emulated machine, and KVM's half of its guest.

The emulated /dev/kvm serves guest_memfd only, so what upstream does with anonymous memory is done here, in few lines:
a guest's fault pins the process's page and donates it (pkvm_mem_abort()), or shares it with a guest that is not protected
(user_mem_abort()); the end of a VM reclaims page by page (pkvm_pgtable_stage2_destroy_range()). What is judged is below: the
machine's EL2 and its Linux, which answer every access on their page tables.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from errno import EFAULT

from guest_memfd.compat import override
from guest_memfd.conform.operations import PKVM_PAGES
from guest_memfd.conform.pkvm.subject import BASE, DEVICE, PROGRAM, SIZE, PkvmSubject, program
from guest_memfd.errors import InternalError, Signalled, SyscallFailed
from guest_memfd.machine.boot import Config, Machine
from guest_memfd.machine.el2.kvm import vcpu as exits
from guest_memfd.machine.hw.arm64.guestcore import GuestCore
from guest_memfd.machine.hypcalls.vm import Vm
from guest_memfd.machine.linux.inode import Inode
from guest_memfd.machine.linux.mm import Vma
from guest_memfd.uapi import kvm_run
from guest_memfd.uapi.kvm_arm64 import MEM_UNSHARE
from guest_memfd.words.primitives import Folio
from guest_memfd.words.units import FIRST_PAGE, PAGE, Gfn, Index, Ipa, Pa, Va, gpa_to_gfn, pa_to_pfn, page_index

SECONDS = 5.0
_CODE = Index(PKVM_PAGES)
"""The page of the process that has the guest's program: after those that are compared."""
_SIGNED = 1 << 64


@dataclass
class EmulatedPkvmWorld:
    """A machine under pKVM that lives on from process to process; after something went wrong another takes over."""

    _machine: Machine | None = field(default=None, repr=False)

    def subject(self) -> EmulatedPkvm:
        """A new process on the machine."""
        if self._machine is None:
            self._machine = Machine("pkvm", Config(ram=64 << 20, on_free="nothing"))
        return EmulatedPkvm(self._machine)

    def renew(self) -> None:
        """The next process runs on another machine."""
        self._machine = None


class EmulatedPkvm(PkvmSubject):
    """A process of *machine*'s, and its guest."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine
        self._free = machine.kernel_pages.free_pages
        self._inode = Inode(PKVM_PAGES + 1, "anonymous memory")
        self._vma: Vma = machine.vmm.mmap(self._inode)
        self.address = Va(self._vma.va(FIRST_PAGE))
        self._vm: Vm | None = None
        self._protected = False
        self._pinned: dict[Gfn, Pa] = {}                # what the guest has, and for a protected one nothing else gives back

    # -- the process's memory ----------------------------------------------------------------------------------------

    # do_anonymous_page(): its frame, with zeros when it is new.
    def _frame(self, index: Index) -> Pa:
        mapping = self._inode.mapping
        assert mapping is not None
        found = mapping.lookup(index)
        if found is None:
            found = self.machine.kernel_pages.alloc()
            self.machine.cpu.call("clear_page", self._kernel(found))
            mapping.insert(index, found)
        return found

    def _zap(self, index: Index) -> None:
        mapping = self._inode.mapping
        assert mapping is not None
        frame = mapping.lookup(index)
        if frame is None:
            return
        mapping.zap(index, 1)
        if not self._protected and self._vm is not None:
            self._unmapped_by(frame)                    # the MMU notifier; who has pinned a page is not told
        # A protected guest's pin outlives the mapping: the frame stays the
        # guest's, and the process finds a new one (docs/conform.md).
        if frame not in self._pinned.values():
            self.machine.kernel_pages.free(frame)

    def _kernel(self, frame: Pa) -> Va:
        return self.machine.linear_map.va(frame)

    def _user(self, at: int, write: bool, value: int = 0) -> int:
        self._frame(page_index(at))
        ran = self.machine.cpu.user(Va(self.address + at), write, value)
        if ran.siginfo is not None:
            raise Signalled(str(ran.signal), ran.siginfo.address, ran.siginfo.code)
        return ran.x0

    @override
    def load(self, at: int) -> int:
        """By the VMM's text, at EL0."""
        return self._user(at, write=False)

    @override
    def store(self, at: int, value: int) -> None:
        """By the VMM's text, at EL0."""
        self._user(at, write=True, value=value)

    @override
    def copy_from(self, at: int) -> int:
        """The kernel's unprivileged load."""
        self._uaccess("__get_user", at)
        return int(self.machine.cpu.core.x(1))

    @override
    def copy_to(self, at: int, value: int) -> None:
        """The kernel's unprivileged store."""
        self._uaccess("__put_user", at, value)

    def _uaccess(self, routine: str, at: int, *value: int) -> None:
        self._frame(page_index(at))
        ret = self.machine.cpu.call(routine, self.address + at, *value).x0
        if ret:
            raise SyscallFailed(_SIGNED - ret, routine)

    @override
    def kernel_load(self, at: int) -> int:
        """By the kernel's direct map."""
        return self.machine.cpu.call("plain_read", self._kernel(self._frame(page_index(at))) + at % PAGE).x0

    @override
    def kernel_store(self, at: int, value: int) -> None:
        """By the kernel's direct map."""
        self.machine.cpu.call("plain_write", self._kernel(self._frame(page_index(at))) + at % PAGE, value)

    @override
    def discard(self, page: int) -> None:
        """The process loses the page, and a guest that is not protected."""
        self._zap(Index(page))

    @override
    def fork_load(self, at: int) -> str:
        """copy_present_page(): what is pinned is copied at once, by the kernel; the rest is the child's as it is ours."""
        copied = {}
        for index in range(_CODE + 1):
            mapping = self._inode.mapping
            frame = mapping.lookup(Index(index)) if mapping is not None else None
            # The kernel's own load takes the page by force, so the child finds
            # zeros. The guest of an unprotected VM has pinned nothing.
            if self._protected and frame is not None and frame in self._pinned.values():
                copied[index] = self.machine.cpu.call("plain_read", self._kernel(frame) + at % PAGE).x0
        try:
            return f"{copied[at // PAGE] if at // PAGE in copied else self.load(at):#x}"
        except Signalled as error:
            return self._refused(error)

    # -- KVM's half --------------------------------------------------------------------------------------------------

    @override
    def open_vm(self, protected: bool) -> None:
        """A VM, and its vCPU; the program in a page that is new."""
        # A new page each time: the old one was the guest's, and came back as zeros.
        self._zap(_CODE)
        self.machine.ram.write(self._frame(_CODE), program())
        self._protected = protected
        self._vm = vm = self.machine.create_vm(0)
        vm.handle.protected, vm.handle.bound = self._protected, _covered
        core = GuestCore(self.machine.ram, self.machine.tlbs, 0, lambda: self.machine.driver.guest_stage2(vm))
        self._vcpu = vm.handle.vcpus[0]
        self._vcpu.cpu, self._vcpu.bound = core, _covered
        core.pc = PROGRAM
        core.set_x(20, DEVICE)

    @override
    def close_vm(self) -> None:
        """Every page comes back by itself, and then the VM goes."""
        assert self._vm is not None
        vm, driver, mapping = self._vm, self.machine.driver, self._inode.mapping
        # EL2 gives the pages of a dying VM back one by one. What has not come back when the VM's own memory goes is lost.
        driver.vm_kill(vm)
        for gfn, frame in self._pinned.items():
            self._asked(driver.call(vm, self._back, (gfn, Folio(pa_to_pfn(frame)))), f"{self._back} of gfn {gfn:#x}")
        driver.vm_destroyed(vm)
        self.machine.forget_vm(vm)
        self.machine.module.put()
        assert mapping is not None
        # What the process has discarded meanwhile was held by the guest's pin alone. Nothing else frees it.
        for frame in {*self._pinned.values()} - {*mapping.present.values()}:
            self.machine.kernel_pages.free(frame)
        self._pinned.clear()
        self._vm = None

    @property
    def _back(self) -> str:
        return "reclaim_dying_guest_page" if self._protected else "unshare_guest"

    def _asked(self, ret: int, what: str) -> None:
        if ret:
            raise InternalError(f"EL2 refuses {what} with {ret}")

    def _unmapped_by(self, frame: Pa) -> None:
        assert self._vm is not None
        for gfn in [gfn for gfn, pinned in self._pinned.items() if pinned == frame]:
            self._asked(self.machine.driver.call(self._vm, "unshare_guest", (gfn, Folio(pa_to_pfn(frame)))), "unshare_guest")
            del self._pinned[gfn]

    @override
    def running(self) -> bool:
        """Whether there is a VM."""
        return self._vm is not None

    @override
    def reply(self, value: int) -> None:
        """Into the vCPU's register."""
        self._vcpu.complete_mmio(value)

    @override
    def run(self) -> kvm_run.Exit:
        """Up to an exit for user space; what the guest asks of KVM, KVM does."""
        while True:
            told = self._vcpu.run(SECONDS)
            match told:
                case exits.MmioAccess(ipa, size, write, data, _):
                    return kvm_run.Mmio(ipa, size, write, data.to_bytes(8, "little")[:size] if write else b"")
                case exits.MemoryFaultExit(ipa, _, _):
                    ret = self._fault(ipa)
                    if ret:
                        return kvm_run.Unknown(0, -ret)
                case exits.Hypercall(number, ipa):
                    # In conversion in place the host has a word in it; with anonymous memory it has none.
                    if number == MEM_UNSHARE:
                        assert self._vm is not None
                        frame = self._pinned[gpa_to_gfn(Ipa(ipa))]
                        self.machine.driver.call(self._vm, "unshare", (gpa_to_gfn(Ipa(ipa)), Folio(pa_to_pfn(frame))))
                case _:
                    return kvm_run.KvmInternalError(f"{told}")

    def _fault(self, ipa: Ipa) -> int:
        vm, driver, gfn = self._vm, self.machine.driver, gpa_to_gfn(ipa)
        assert vm is not None
        # Asked first. To EL2 the entry is not empty, and donating there would
        # be refused with another errno than upstream's.
        if driver.poisoned(vm, gfn):
            return -EFAULT
        frame = self._frame(_CODE if ipa >= PROGRAM else page_index(ipa - BASE))
        ret = driver.call(vm, "donate_guest" if self._protected else "share_guest", (gfn, Folio(pa_to_pfn(frame))))
        if not ret:
            self._pinned[gfn] = frame
        return ret

    # -- the end -----------------------------------------------------------------------------------------------------

    @override
    def end(self) -> list[str]:
        """VM and memory go; then all frames are the kernel's again, and the machine is audited."""
        self.teardown()
        for index in range(_CODE + 1):
            self._zap(Index(index))
        self.machine.vmm.munmap(self._inode)
        missing = self._free - self.machine.kernel_pages.free_pages
        return [*self.machine.audit(), *([f"{missing} pages of the kernel are not free again"] if missing else [])]


def _covered(ipa: Ipa) -> bool:
    return PROGRAM <= ipa < PROGRAM + PAGE or BASE <= ipa < BASE + SIZE
