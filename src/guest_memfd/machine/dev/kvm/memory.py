"""KVM's guest_memfd. Here is what its ioctls and system calls refuse, in the order of virt/kvm/guest_memfd.c.

KVM_SET_MEMORY_ATTRIBUTES2 is that of "guest_memfd: In-place conversion" v13.
"""

from __future__ import annotations

from errno import EINVAL, ENODEV, ENOTTY, EOPNOTSUPP
from typing import TYPE_CHECKING

from guest_memfd.compat import override
from guest_memfd.errors import SyscallFailed
from guest_memfd.machine.dev.file import GuestMemoryFile
from guest_memfd.plugins.guard import Guard
from guest_memfd.uapi.kvm import PRIVATE, SHARED, CreateGuestMemfd, GuestMemfdFlag, MemoryAttributes2
from guest_memfd.uapi.memory import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from guest_memfd.words.units import PAGE, page_index

if TYPE_CHECKING:
    from guest_memfd.machine.dev.kvm.vm import KvmVmFile

CREATE = "KVM_CREATE_GUEST_MEMFD"
ATTRIBUTES = "KVM_SET_MEMORY_ATTRIBUTES2"
_BIGGEST = (1 << 63) - PAGE


class KvmMemoryFile(GuestMemoryFile):
    """A guest_memfd of *vm* (uapi/kvm.py KvmGuestMemory); raises SyscallFailed from its creation."""

    created_by = CREATE

    def __init__(self, vm: KvmVmFile, size: int, flags: int) -> None:
        asked = CreateGuestMemfd(size, flags)
        size, flags = asked.size, asked.flags
        if flags & ~int(SHARED):
            raise SyscallFailed(EINVAL, CREATE, f"flags {flags:#x}")
        if not size or size % PAGE or size > _BIGGEST:
            raise SyscallFailed(EINVAL, CREATE, f"a size of {size} bytes")
        if not flags & GuestMemfdFlag.INIT_SHARED and not vm.has_private_memory:
            raise SyscallFailed(EINVAL, CREATE, "a VM of this type has no private memory")
        self.owner, self.flags = vm, flags
        pages = size // PAGE
        machine = vm.machine
        with Guard(f"making design {vm.design.name!r} on {machine.hypervisor.name!r}"):
            library = vm.design(machine.hypervisor.ops(), pages)
        super().__init__(machine, library, size, vm.vm)
        # After creation, when there is no page yet whose state could differ from its attribute.
        if flags & GuestMemfdFlag.INIT_SHARED:
            self.init_shared()

    @override
    def check_fallocate(self, mode: int, offset: int, nr: int) -> None:
        """Allocating and punching, both with KEEP_SIZE; nothing else."""
        if mode not in (FALLOC_FL_KEEP_SIZE, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE):
            raise SyscallFailed(EOPNOTSUPP, "fallocate", f"mode {mode:#x}")
        if (offset | nr) % PAGE:
            raise SyscallFailed(EINVAL, "fallocate", "no multiple of a page")
        if not mode & FALLOC_FL_PUNCH_HOLE and offset + nr > self.size:
            raise SyscallFailed(EINVAL, "fallocate", f"past the end of the file, {self.size:#x}")

    @override
    def check_mmap(self, offset: int, nr: int, shared: bool) -> None:
        """Only of a file that was created for it, and only shared; how long is not looked at."""
        if not self.flags & GuestMemfdFlag.MMAP:
            raise SyscallFailed(ENODEV, "mmap", "the file was created without GUEST_MEMFD_FLAG_MMAP")
        if not shared:
            raise SyscallFailed(EINVAL, "mmap", "MAP_PRIVATE")

    def set_memory_attributes2(self, attributes: MemoryAttributes2) -> None:
        """Convert in place; raises SyscallFailed with `attributes.error_offset` set where a page refused."""
        self._in_use(ATTRIBUTES)
        if not self.owner.rules.converts:
            raise SyscallFailed(ENOTTY, ATTRIBUTES, f"not in {self.owner.rules.release}")
        start, size, wanted = attributes.offset, attributes.size, attributes.attributes
        if attributes.flags or wanted & ~PRIVATE or not self.owner.has_private_memory:
            raise SyscallFailed(EINVAL, ATTRIBUTES, f"flags {attributes.flags:#x}, attributes {wanted:#x}")
        if not size or (start | size) % PAGE or start + size > self.size:
            raise SyscallFailed(EINVAL, ATTRIBUTES, f"{size:#x} bytes at {start:#x} of a file of {self.size:#x}")
        convert = self.library.make_private if wanted else self.library.make_shared
        result = self.run(convert(page_index(start), size // PAGE))
        if result.ret:
            # Where no page refused, the kernel names the beginning of the range.
            index = start // PAGE if result.error_index is None else result.error_index
            attributes.error_offset = index * PAGE
            why = f"the page at {index * PAGE:#x}"
            if result.ret == -EOPNOTSUPP:
                why = f"design {self.library.name!r} has no conversion"
            raise SyscallFailed(-result.ret, ATTRIBUTES, why)
