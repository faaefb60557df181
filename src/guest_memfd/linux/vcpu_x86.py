"""A vCPU of x86: its registers, and the two states that small guests start in.

An access that is under way is finished before registers change; KVM would do it afterwards and overwrite them
(complete_emulated_mmio() in arch/x86/kvm/x86.c).
"""

from __future__ import annotations

import struct
from errno import EOPNOTSUPP

from guest_memfd.compat import override
from guest_memfd.errors import SyscallFailed
from guest_memfd.linux import syscall
from guest_memfd.linux.abi import kvm_x86 as x86
from guest_memfd.linux.mapping import PAGE
from guest_memfd.linux.vcpu import LinuxVcpu

_BIG = 2 << 20
# Accessed and dirty from the beginning: no walk has to write to them.
_TABLE = x86.Pte.P | x86.Pte.RW | x86.Pte.US | x86.Pte.A
_LEAF = _TABLE | x86.Pte.D | x86.Pte.PS


class X86Vcpu(LinuxVcpu):
    """`LinuxVcpu` with KVM_GET_REGS, KVM_GET_SREGS, their opposites and KVM_SET_CPUID2. All calls raise SyscallFailed."""

    _has_cpuid = False

    def get_regs(self) -> x86.Regs:
        """The general registers, by KVM_GET_REGS."""
        regs = x86.Regs()
        syscall.ioctl(self.fileno(), x86.GET_REGS, regs, call="KVM_GET_REGS")
        return regs

    def set_regs(self, regs: x86.Regs) -> None:
        """Set the general registers by KVM_SET_REGS, after `complete`: an exit under way would write to them."""
        self.complete()
        syscall.ioctl(self.fileno(), x86.SET_REGS, regs, call="KVM_SET_REGS")

    def get_sregs(self) -> x86.Sregs:
        """Segments, control registers and EFER, by KVM_GET_SREGS."""
        sregs = x86.Sregs()
        syscall.ioctl(self.fileno(), x86.GET_SREGS, sregs, call="KVM_GET_SREGS")
        return sregs

    def set_sregs(self, sregs: x86.Sregs) -> None:
        """Set segments, control registers and EFER by KVM_SET_SREGS, after `complete`."""
        self.complete()
        syscall.ioctl(self.fileno(), x86.SET_SREGS, sregs, call="KVM_SET_SREGS")

    def set_cpuid2(self, function: int, *, eax: int = 0, ebx: int = 0, ecx: int = 0, edx: int = 0) -> None:
        """KVM_SET_CPUID2: CPUID *function* answers this and every other one zeros. Before the first run only."""
        entry = x86.CpuidEntry2(function=function, eax=eax, ebx=ebx, ecx=ecx, edx=edx)
        syscall.ioctl(self.fileno(), x86.SET_CPUID2, x86.Cpuid2(nent=1, entries=(entry,)), call="KVM_SET_CPUID2",
                      why=f"function {function:#x}")
        self._has_cpuid = True

    def enter_real_mode(self, ip: int, segment: int = 0, **registers: int) -> None:
        """The next run starts at *ip* in real mode, with *registers* and the others 0.

        cs and ds are 0, es and ss are *segment*.
        """
        sregs = self.get_sregs()
        for name, selector in (("cs", 0), ("ds", 0), ("es", segment), ("ss", segment)):
            each = getattr(sregs, name)
            each.selector, each.base = selector, selector << 4
        self.set_sregs(sregs)
        self.set_regs(x86.Regs(rip=ip, rflags=x86.RFLAGS_ONE, **registers))

    def enter_user_mode(self, cr3: int, rip: int, **registers: int) -> None:
        """The next run starts at *rip*, in 64-bit mode at CPL 3, on the page tables at *cr3* (see `identity_tables`).

        There are no descriptor tables: an exception is a triple fault. Neither HLT nor IN and OUT can end such a program; a
        store to an address that no slot backs does, as an Mmio exit. A vCPU whose CPUID no one has set gets one that says
        long mode, NX and SYSCALL, and nothing else.
        """
        if not self._has_cpuid:
            self.set_cpuid2(x86.EXTENDED_FEATURES, edx=x86.USER_FEATURES)
        sregs = self.get_sregs()
        # Types with the accessed bit: VMX refuses to enter a guest whose segments lack it.
        code = x86.Segment(limit=0xFFFF_FFFF, selector=x86.USER_CS, type=11, present=1, dpl=3, s=1, l=1, g=1)
        data = x86.Segment(limit=0xFFFF_FFFF, selector=x86.USER_DS, type=3, present=1, dpl=3, db=1, s=1, g=1)
        sregs.cs = code
        sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data
        # After a reset the table is 64 KiB long and at 0, where there may be no memory: KVM cannot go on then.
        sregs.idt.limit = sregs.gdt.limit = 0
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = x86.USER_CR0, cr3, x86.USER_CR4, x86.USER_EFER
        self.set_sregs(sregs)
        self.set_regs(x86.Regs(rip=rip, rflags=x86.RFLAGS_ONE, **registers))

    @override
    def inject_external_abort(self) -> None:
        """x86 has no such exception: EOPNOTSUPP."""
        raise SyscallFailed(EOPNOTSUPP, "KVM_SET_VCPU_EVENTS", "external aborts are arm64's")

    @override
    def _hypercall_result(self, value: int) -> None:
        self.page.hypercall.ret = value


def identity_tables(base: int, gib: int = 1) -> bytes:
    """Page tables for `enter_user_mode`, to be put at guest address *base*: the first *gib* GiB at their own addresses.

    2 + *gib* pages; everything is readable, writable, executable and CPL 3's, in leaves of 2 MiB. *base* is CR3. Not in
    a guest_memfd: a hypervisor that walks them in software reads userspace_addr.
    """
    directory = base + PAGE
    top = [directory | _TABLE] + [0] * 511
    middle = [directory + (1 + i) * PAGE | _TABLE for i in range(gib)] + [0] * (512 - gib)
    leaves = [i * _BIG | _LEAF for i in range(512 * gib)]
    return struct.pack(f"<{len(top) + len(middle) + len(leaves)}Q", *top, *middle, *leaves)
