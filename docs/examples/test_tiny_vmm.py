"""A VMM in thirty lines, and what it may rely on: the same tests on an emulated machine and on the kernel's own KVM."""

import pytest

from guest_memfd.errors import Signalled, SyscallFailed
from guest_memfd.uapi.kvm import PRIVATE, SHARED, MemFlag, MemoryAttributes2
from guest_memfd.uapi.kvm_run import Mmio

RAM, SIZE, PAGE = 0x8000_0000, 1 << 20, 4096
DONE = 0x0900_0000          # no memory is here: a store ends KVM_RUN

# Arguments: a word, where to store it, and DONE. Stores it once, then reports again and again what is there.
STORE_AND_WATCH = {
    "arm64": """
            str     x0, [x1]
    again:  ldr     x3, [x1]
            str     x3, [x2]
            b       again
    """,
    "x86_64": """
            mov     [rsi], rdi
    again:  mov     rax, [rsi]
            mov     [rdx], rax
            jmp     again
    """,
}


class TinyVmm:
    """One VM, one vCPU, RAM in one guest_memfd."""

    def __init__(self, host):
        self.host, self.kvm = host, host.open()
        self.vm = self.kvm.create_vm()
        self.ram = self.vm.create_guest_memfd(SIZE, SHARED)
        self.mapping = self.ram.mmap()
        self.vm.set_user_memory_region2(0, MemFlag.GUEST_MEMFD, RAM, SIZE, guest_memfd=self.ram,
                                        userspace_addr=self.mapping.address)
        self.vcpu = self.vm.create_vcpu()

    def start(self, program, *arguments):
        self.mapping.write(0, self.host.assemble(program, RAM))
        self.host.enter(self.vm, self.vcpu, RAM, *arguments)

    def run(self):
        """The next word that the guest reports."""
        told = self.vcpu.run(5.0)
        assert isinstance(told, Mmio), told
        assert (told.phys_addr, told.is_write) == (DONE, True)
        return int.from_bytes(told.data, "little")

    def close(self):
        for each in (self.vcpu, self.mapping, self.ram, self.vm, self.kvm):
            each.close()


@pytest.fixture
def vmm(gmem_host):
    vmm = TinyVmm(gmem_host)
    yield vmm
    vmm.close()


@pytest.mark.gmem("vcpu", "mmap")
def test_the_host_sees_what_the_guest_stores(vmm):
    vmm.start(STORE_AND_WATCH, 0x5EC12E7, RAM + 3 * PAGE, DONE)
    assert vmm.run() == 0x5EC12E7
    assert vmm.mapping.read(3 * PAGE, 8) == (0x5EC12E7).to_bytes(8, "little")


@pytest.mark.gmem("vcpu", "mmap")
def test_a_punched_page_reads_zero_on_both_sides(vmm):
    vmm.start(STORE_AND_WATCH, 0x5EC12E7, RAM + 3 * PAGE, DONE)
    assert vmm.run() == 0x5EC12E7
    vmm.ram.punch_hole(3 * PAGE, PAGE)
    assert vmm.run() == 0
    assert vmm.mapping.read(3 * PAGE, PAGE) == bytes(PAGE)
    vmm.mapping.write(3 * PAGE, b"from the host")
    assert vmm.run() == int.from_bytes(b"from the host"[:8], "little")


@pytest.mark.gmem("mmap")
def test_memory_behind_the_file_is_not_there(vmm):
    with vmm.ram.mmap(0, SIZE + PAGE) as more, pytest.raises(Signalled, match="SIGBUS"):
        more.read(SIZE, 1)
    with pytest.raises(SyscallFailed, match="EINVAL"):
        vmm.ram.fallocate(1, SIZE, PAGE)


@pytest.mark.gmem("mmap", "convert")
def test_a_private_page_is_not_for_the_host(vmm):
    vmm.ram.set_memory_attributes2(MemoryAttributes2(5 * PAGE, PAGE, PRIVATE))
    with pytest.raises(Signalled, match="SIGBUS"):
        vmm.mapping.write(5 * PAGE - 4, b"over the edge")
    assert vmm.mapping.read(5 * PAGE - 4, 4) == b"over"
