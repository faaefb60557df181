"""A VM of /dev/kvm: its files, slots and vCPUs. Here is who keeps the VM, and what its end gives back.

The descriptor of the VM and those of its vCPUs keep it. When the last is closed, whatever the order, its memory comes back
through the library, file by file, and then the VM goes. Files outlive it, without a VM that they could be bound to.
"""

from __future__ import annotations

from errno import EEXIST, EINVAL, EIO
from typing import TYPE_CHECKING

from guest_memfd.compat import override
from guest_memfd.errors import SyscallFailed
from guest_memfd.machine.dev.file import Serialised
from guest_memfd.machine.dev.kvm.memory import KvmMemoryFile
from guest_memfd.machine.dev.kvm.slots import CALL, Memslot, Memslots
from guest_memfd.machine.dev.kvm.vcpu import KvmVcpuFile
from guest_memfd.machine.hw.arm64.guestcore import GuestCore
from guest_memfd.machine.primitives.host import EmulatedHost
from guest_memfd.uapi.kvm import GuestMemfdFlag, MemFlag, UserspaceMemoryRegion2
from guest_memfd.uapi.memory import GuestMemory
from guest_memfd.words.pagestate import GONE
from guest_memfd.words.primitives import Primitive
from guest_memfd.words.units import NULL, PAGE, Ipa, Va, gpa_to_gfn, page_index

if TYPE_CHECKING:
    from guest_memfd.designs import Design
    from guest_memfd.machine.board.board import Board
    from guest_memfd.machine.dev.kvm.system import KvmDevice
    from guest_memfd.machine.hypcalls.vm import Vm as MachineVm

NR_VCPUS = 512


class KvmVmFile(Serialised):
    """uapi/kvm.py KvmVm. *protected*: EL2 keeps the host out of its private memory. Raises OutOfMemory."""

    def __init__(self, system: KvmDevice, protected: bool) -> None:
        self.system = system
        self.machine: Board = system.machine
        self._lock = self.machine.lock
        self.design: type[Design] = system.design
        self.protected = protected
        self.rules = system.rules
        self.slots = Memslots(self.rules, lambda file: isinstance(file, KvmMemoryFile) and file.owner is self)
        self.vm: MachineVm = self.machine.create_vm(0)
        handle = self.vm.handle
        handle.bound = self.slots.covers
        if self.machine.hypervisor.name == "pkvm":
            handle.protected = protected
        # Primitives about the VM itself, for which no file is needed.
        self.host = EmulatedHost(self.machine, self.vm, 1)
        self.vcpus: dict[int, KvmVcpuFile] = {}
        self._users = 1

    @property
    def has_private_memory(self) -> bool:
        """kvm_arch_has_private_mem(): under protected KVM by the VM's type, elsewhere as far as the library goes."""
        return self.protected or self.machine.hypervisor.name != "pkvm"

    # kvm_vm_ioctl() looks at the caller's mm before anything else.
    @override
    def _in_use(self, call: str) -> None:
        super()._in_use(call)
        if self.machine.forked:
            raise SyscallFailed(EIO, call, "the VM is another process's")

    # -- ioctls --------------------------------------------------------------------------------------------------

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION of this VM, which answers as the system does; 0 for what is not there."""
        self._in_use("KVM_CHECK_EXTENSION")
        return self.system.check_extension(cap)

    def create_guest_memfd(self, size: int, flags: int = 0) -> KvmMemoryFile:
        """KVM_CREATE_GUEST_MEMFD of *size* bytes; raises SyscallFailed: EINVAL size or flags, ENOMEM."""
        self._in_use("KVM_CREATE_GUEST_MEMFD")
        return KvmMemoryFile(self, size, flags)

    def set_user_memory_region2(
        self, slot: int, flags: int, guest_phys_addr: Ipa, memory_size: int, *, userspace_addr: Va = NULL,
        guest_memfd: GuestMemory | None = None, guest_memfd_offset: int = 0,
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION2; refuses as `Slots.check` says, EBUSY when the guest holds on to a deleted page."""
        self._in_use(CALL)
        region = UserspaceMemoryRegion2(slot, flags, guest_phys_addr, memory_size, userspace_addr, guest_memfd_offset)
        self.slots.check(region, guest_memfd)
        if not memory_size:
            self._delete(slot)
            return
        assert isinstance(guest_memfd, KvmMemoryFile)
        new = Memslot(gpa_to_gfn(guest_phys_addr), memory_size // PAGE, guest_memfd, page_index(guest_memfd_offset),
                      self.rules.converts or bool(guest_memfd.flags & GuestMemfdFlag.MMAP))
        if self.rules.late:
            self.slots.check_reach(new)
        ret = guest_memfd.run(guest_memfd.library.bind(new.gfn, new.start, new.nr))
        guest_memfd.check(-self.rules.twice if ret == -EEXIST else ret, CALL,
                          f"pages from {new.start:#x} on at {guest_phys_addr:#x}")
        try:
            self.slots.check_reach(new)
        except SyscallFailed:
            guest_memfd.run(guest_memfd.library.unbind(new.start, new.nr))
            raise
        self.slots.by_id[slot] = new

    def set_user_memory_region(self, slot: int, flags: int, guest_phys_addr: Ipa, memory_size: int,
                               userspace_addr: Va = NULL) -> None:
        """KVM_SET_USER_MEMORY_REGION, which knows no guest_memfd: it deletes slots here, and refuses the rest."""
        if flags & MemFlag.GUEST_MEMFD:
            self._in_use("KVM_SET_USER_MEMORY_REGION")
            raise SyscallFailed(EINVAL, "KVM_SET_USER_MEMORY_REGION", f"flags {flags:#x}")
        self.set_user_memory_region2(slot, flags, guest_phys_addr, memory_size, userspace_addr=userspace_addr)

    def _delete(self, number: int) -> None:
        slot = self.slots.by_id[number]
        result = slot.file.run(slot.file.library.unbind(slot.start, slot.nr))
        slot.file.check(result.ret, CALL, f"page {result.error_index} of the file stays with the guest")
        del self.slots.by_id[number]

    def set_memory_attributes(self, address: Ipa, size: int, attributes: int, flags: int = 0) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES: there is no such ioctl of a VM, because attributes belong to the file."""
        self._in_use("KVM_SET_MEMORY_ATTRIBUTES")
        raise SyscallFailed(self.rules.no_ioctl, "KVM_SET_MEMORY_ATTRIBUTES", "attributes belong to the guest_memfd")

    def create_vcpu(self, vcpu_id: int = 0) -> KvmVcpuFile:
        """KVM_CREATE_VCPU, and KVM_ARM_VCPU_INIT for the preferred target; EINVAL, EEXIST."""
        call = "KVM_CREATE_VCPU"
        self._in_use(call)
        if not 0 <= vcpu_id < NR_VCPUS:
            raise SyscallFailed(EINVAL, call, f"id {vcpu_id}")
        if vcpu_id in self.vcpus:
            raise SyscallFailed(EEXIST, call, f"id {vcpu_id}")
        machine, vm, handle = self.machine, self.vm, self.vm.handle
        core = GuestCore(machine.ram, machine.tlbs, vcpu_id % len(machine.tlbs), lambda: machine.driver.guest_stage2(vm))
        if handle.vcpus and handle.vcpus[0].cpu is None:        # pKVM's driver has made the first one
            handle.vcpus[0].cpu, handle.vcpus[0].bound = core, handle.bound
        else:
            handle.add_vcpu(core)
        self.vcpus[vcpu_id] = KvmVcpuFile(self, handle.vcpus[-1], len(handle.vcpus) - 1, core)
        self._users += 1
        return self.vcpus[vcpu_id]

    # -- the end ---------------------------------------------------------------------------------------------------

    def put(self) -> None:
        """A descriptor is closed; the last one ends the VM."""
        self._users -= 1
        if self._users or self.machine.dead is not None:
            return
        self._perform("vm_kill")
        for file in dict.fromkeys(slot.file for slot in self.slots.by_id.values()):
            # Before the VM object goes: the bindings are what its tables are made from.
            if file.run(file.library.vm_teardown()):
                return                                  # what is bound stays, and with it the VM
        self.slots.by_id.clear()
        if self.vm.state != GONE:
            self._perform("vm_destroyed")

    def _perform(self, name: str) -> None:
        self.host.perform(Primitive(name, (), "user"), 0)

    @override
    def _release(self) -> None:
        self.put()
