"""What of /dev/kvm is x86's: registers, and the state of a program at CPL 3 (arch/x86/include/uapi/asm/kvm.h)."""

from __future__ import annotations

import ctypes
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64
from enum import IntFlag

from guest_memfd.uapi.ioctl import ior, iow
from guest_memfd.uapi.kvm import KVMIO
from guest_memfd.uapi.words import Words

REGISTERS = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
             "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags")
"""struct kvm_regs in order, 8 bytes each."""


class Regs(Words):
    """struct kvm_regs: the general registers, RIP and RFLAGS, 8 bytes each, in the kernel's order."""

    _fields_ = [(name, c_uint64) for name in REGISTERS]


class Segment(Words):
    """struct kvm_segment: a segment register with its hidden part; `limit` is bytes."""

    _fields_ = [("base", c_uint64), ("limit", c_uint32), ("selector", c_uint16), ("type", c_uint8), ("present", c_uint8),
                ("dpl", c_uint8), ("db", c_uint8), ("s", c_uint8), ("l", c_uint8), ("g", c_uint8), ("avl", c_uint8),
                ("unusable", c_uint8), ("padding", c_uint8)]


class Dtable(Words):
    """struct kvm_dtable, of GDTR and IDTR: linear base address, and limit in bytes."""

    _fields_ = [("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3)]


class Sregs(Words):
    """struct kvm_sregs; 256 bits of pending interrupts at its end."""

    _fields_ = [*((name, Segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
                ("gdt", Dtable), ("idt", Dtable),
                *((name, c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
                ("interrupt_bitmap", c_uint64 * 4)]


class CpuidEntry2(Words):
    """struct kvm_cpuid_entry2: what CPUID answers in the guest for one *function*."""

    _fields_ = [*((name, c_uint32) for name in ("function", "index", "flags", "eax", "ebx", "ecx", "edx")),
                ("padding", c_uint32 * 3)]


class Cpuid2(Words):
    """struct kvm_cpuid2 with room for one entry; its number encodes the size of what comes before the entries."""

    _fields_ = [("nent", c_uint32), ("padding", c_uint32), ("entries", CpuidEntry2 * 1)]


GET_REGS, SET_REGS = ior(KVMIO, 0x81, ctypes.sizeof(Regs)), iow(KVMIO, 0x82, ctypes.sizeof(Regs))
GET_SREGS, SET_SREGS = ior(KVMIO, 0x83, ctypes.sizeof(Sregs)), iow(KVMIO, 0x84, ctypes.sizeof(Sregs))
SET_CPUID2 = iow(KVMIO, 0x90, Cpuid2.entries.offset)


# -- bits a program at CPL 3 needs (Intel SDM volume 3, 2.5, 4.5; AMD APM volume 2, 3.1) ---------------------------------

class Cr0(IntFlag):
    """The bits of CR0 that a 64-bit guest here is started with, or that are looked at."""

    PE = 1 << 0
    MP = 1 << 1
    ET = 1 << 4
    NE = 1 << 5
    WP = 1 << 16
    AM = 1 << 18
    PG = 1 << 31


class Cr4(IntFlag):
    """The bits of CR4 that a 64-bit guest here needs: PAE for its page tables, two for SSE."""

    PAE = 1 << 5
    OSFXSR = 1 << 9
    OSXMMEXCPT = 1 << 10


class Efer(IntFlag):
    """The bits of the MSR EFER that make and report 64-bit mode, SYSCALL and no-execute pages."""

    SCE = 1 << 0
    LME = 1 << 8
    LMA = 1 << 10
    NX = 1 << 11


class ExtendedFeature(IntFlag):
    """CPUID function `EXTENDED_FEATURES`, edx."""

    SYSCALL = 1 << 11
    NX = 1 << 20
    LM = 1 << 29


class Pte(IntFlag):
    """Entry of a page table, at any level; `PS` makes it a leaf above the last one."""

    P = 1 << 0
    RW = 1 << 1
    US = 1 << 2
    A = 1 << 5
    D = 1 << 6
    PS = 1 << 7


USER_CR0 = Cr0.PE | Cr0.MP | Cr0.ET | Cr0.NE | Cr0.WP | Cr0.AM | Cr0.PG
USER_CR4 = Cr4.PAE | Cr4.OSFXSR | Cr4.OSXMMEXCPT
USER_EFER = Efer.SCE | Efer.LME | Efer.LMA | Efer.NX
EXTENDED_FEATURES = 0x8000_0001
USER_FEATURES = ExtendedFeature.LM | ExtendedFeature.NX | ExtendedFeature.SYSCALL
"""What CPUID has to offer before EFER may have the bits above: __kvm_valid_efer() in arch/x86/kvm/x86.c."""
USER_CS, USER_DS = 0x33, 0x2B
"""Selectors, with RPL 3."""
RFLAGS_ONE = 1 << 1
"""The bit of RFLAGS that is always 1."""
