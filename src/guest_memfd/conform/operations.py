"""What user space can do with guest_memfd, as data: operations and their arguments, with what is usual and what is an edge.

Files, mappings, VMs and pins are numbers of registers. What an operation makes replaces what is in its register; a register
without an open file is a bad descriptor. The first usual value of each argument is the one that makes a plain call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from guest_memfd.compat import override
from guest_memfd.uapi.kvm import CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES, PRIVATE, SHARED, Cap
from guest_memfd.uapi.memory import Advice
from guest_memfd.words.units import PAGE

# Enough for a hole with neighbours on both sides, and so few that all checksums are taken after every step.
PAGES = 4
SIZE = PAGES * PAGE
"""Of most files."""
LAST = (1 << 63) - 1
OVERFLOW = LAST + 1 - PAGE
"""An offset that becomes negative when a page is added."""
OF_ROW = -100
"""In what undoes a row of a table: the first argument of the row."""
BASE = 0x1000_0000
"""Guest address of the first slot; a guest maps the addresses below 1 GiB."""
OWN_SLOT, OWN_SIZE = 0x10000, 0x10000
"""Guest address of slot 0, which has the guest's program: other slots may run into it."""
OTHER_CALLS = ("read", "write", "pread64", "pwrite64", "lseek", "ftruncate", "fchmod", "fsync")


class Param(NamedTuple):
    """An argument: *usual* values and *edges*. *of*: file, mapping, vm or pin, if it is a register."""

    name: str
    usual: tuple[int, ...]
    edges: tuple[int, ...] = ()
    of: str = ""

    @property
    def values(self) -> tuple[int, ...]:
        """The usual ones, and then the edges."""
        return tuple(dict.fromkeys((*self.usual, *self.edges)))


class UserCall(NamedTuple):
    """*op* with *args*, in the order of its parameters: a step of a sequence."""

    op: str
    args: tuple[int, ...]

    @override
    def __str__(self) -> str:
        known = OPERATIONS.get(self.op) or PKVM_OPERATIONS.get(self.op)
        params = () if known is None else known.params
        return f"{self.op}({', '.join(_shown(param, value) for param, value in zip(params, self.args, strict=False))})"


def _shown(param: Param, value: int) -> str:
    return f"{param.of} {value}" if param.of else f"{param.name}={value:#x}" if abs(value) > 9 else f"{param.name}={value}"


@dataclass(frozen=True)
class UserOperation:
    """One thing to do. *weight*: how often at random. *undo*: what makes the beginning of tables again after it.

    A table has every value of each argument with every value of every other one, *undo* after each row; None: it has rows
    of their own, from the beginning.
    """

    name: str
    says: str
    params: tuple[Param, ...]
    weight: int
    undo: tuple[UserCall, ...] | None = ()

    def undoing(self, row: UserCall) -> tuple[UserCall, ...]:
        """What makes the beginning of tables again after *row*."""
        return tuple(UserCall(op, tuple(row.args[0] if value == OF_ROW else value for value in args))
                     for op, args in self.undo or ())


def _register(of: str, *numbers: int) -> Param:
    return Param(of, numbers, (), of)


_FILE, _MAPPING, _VM, _PIN = (_register("file", 0, 1, 2, 3), _register("mapping", 0, 1, 2), _register("vm", 0, 1),
                              _register("pin", 0, 1))
_OFFSETS = (0, PAGE, 2 * PAGE, 3 * PAGE)
_LENGTHS = (PAGE, SIZE, 2 * PAGE)
_ODD_OFFSETS = (1, PAGE + 1, SIZE - PAGE, SIZE, SIZE + PAGE, -1, -PAGE, 1 << 40, 1 << 62, LAST, LAST + 1 - PAGE, -LAST - 1)
_ODD_LENGTHS = (0, 1, PAGE + 1, SIZE + PAGE, -1, -PAGE, 1 << 40, 1 << 62, LAST, LAST + 1 - PAGE, LAST + 1 - 2 * PAGE,
                -LAST - 1)
_OFFSET, _LENGTH = Param("offset", _OFFSETS, _ODD_OFFSETS), Param("nr", _LENGTHS, _ODD_LENGTHS)
_AT = Param("at", (0, PAGE, 2 * PAGE, 3 * PAGE, 8), (PAGE - 8, SIZE - 8, SIZE, 2 * SIZE - 8))
_VALUE = Param("value", (0x1122_3344_5566_7788, 0, 1))
_GPA = Param("gpa", (BASE, BASE + PAGE, BASE + 2 * PAGE, BASE + SIZE), (BASE + 2 * SIZE, BASE - PAGE, BASE + PAGE - 8))
# The upper 16 bits are an address space: 0x50003 is slot 3 of one that no
# KVM has. 40000 is more than KVM_CAP_NR_MEMSLOTS.
_SLOT = Param("slot", (3, 1, 2), (0x50003, 40000, (1 << 32) - 1))
_REGION = (
    # 1 << 16 and 1 << 17 are the kernel's own bits of a slot
    # (KVM_MEMSLOT_INVALID, KVM_MEMSLOT_GMEM_ONLY): EINVAL from outside.
    Param("flags", (4,), (5, 6, 12, 0x10004, 0x20004, 0)),
    Param("gpa", (BASE + 4 * SIZE, BASE, BASE + PAGE, BASE + 2 * SIZE),
          (1, OWN_SLOT, OWN_SLOT - PAGE, 1 << 62, 1 << 63, (1 << 64) - PAGE)),
    Param("size", (PAGE, 2 * PAGE, SIZE, 0), (1, SIZE + PAGE, 1 << 43, 1 << 63, (1 << 64) - PAGE)),
    Param("user", (0,), (1, 1 << 62, 1 << 63)),
)
# Punched, and not made anew: a punch leaves slots, mappings and pins as they are, and costs two calls.
_WIPED = (UserCall("fallocate", (0, 3, 0, SIZE)), UserCall("fallocate", (1, 3, 0, SIZE)))
_UNBOUND = (*(UserCall("region", (OF_ROW, slot, 4, 0, 0, 0, 0, 0)) for slot in (1, 2, 3)),
            UserCall("region", (0, 1, 4, BASE, 2 * PAGE, 0, 0, 0)))

BEGINNING = (
    UserCall("create", (0, 0, SIZE, int(SHARED))), UserCall("create", (1, 0, SIZE, 1)), UserCall("create", (2, 0, SIZE, 0)),
    UserCall("create", (4, 1, SIZE, int(SHARED))), UserCall("map", (0, 0, 0, SIZE, 0)),
    UserCall("map", (1, 0, 0, 2 * SIZE, 0)), UserCall("map", (2, 1, 0, SIZE, 0)),
    UserCall("region", (0, 1, 4, BASE, 2 * PAGE, 0, 0, 0)),
)
"""Of every table: files that are shared, private, without MMAP, and another VM's; mappings, one past the end; a slot."""

_ALL = (
    UserOperation("create", "KVM_CREATE_GUEST_MEMFD", (
        Param("file", (5, 0, 1, 2, 3), (), "file"), _VM, Param("size", (SIZE, PAGE, 2 * PAGE), (
            0, 1, PAGE - 1, PAGE + 1, -1, -PAGE, LAST, LAST + 1, LAST + 1 - PAGE, 1 << 40)),
        Param("flags", (int(SHARED), 1, 2, 0), (4, 8, 7, 1 << 63, -1))), 5, (UserCall("close", (5,)),)),
    UserOperation("dup", "dup(2)", (Param("file", (5, 2, 3), (), "file"), Param("from", (0, 1, 2, 3, 4), (), "file")), 2,
              (UserCall("close", (5,)),)),
    UserOperation("close", "close(2) of a file", (_register("file", 0, 1, 2, 3, 4),), 2, None),
    UserOperation("fallocate", "fallocate(2)", (
        _FILE, Param("mode", (1, 3), (0, 2, 4, 8, 9, 0x10, 0x11, 0x13, 0x20, 0x21, 0x40, 0x41, 0x80, 0x81, 0x100)),
        _OFFSET, _LENGTH), 16, _WIPED),
    UserOperation("map", "mmap(2): 0 shared, 1 private, 2 shared and read-only", (
        Param("mapping", (3, 0, 1, 2), (), "mapping"), _FILE, Param("offset", (0, PAGE, 2 * PAGE), _ODD_OFFSETS),
        Param("nr", (SIZE, PAGE, 2 * SIZE), (*(each for each in _ODD_LENGTHS if each != 1 << 40), 16 * PAGE, 1 << 50)),
        Param("how", (0, 2), (1,))), 6, (UserCall("unmap", (3,)),)),
    UserOperation("unmap", "munmap(2)", (_register("mapping", 0, 1, 2, 3),), 2, None),
    UserOperation("load", "a load of 8 bytes by the CPU", (_MAPPING, _AT), 10, _WIPED),
    UserOperation("store", "a store of 8 bytes by the CPU", (_MAPPING, _AT, _VALUE), 10, _WIPED),
    UserOperation("read", "write(2)'s half of a copy: bytes of a mapping to the kernel", (
        _MAPPING, _AT, Param("nr", (8, PAGE, SIZE), (0, 1, 2 * SIZE))), 6, _WIPED),
    UserOperation("write", "read(2)'s half: bytes from the kernel to a mapping", (
        _MAPPING, _AT, Param("nr", (8, PAGE, SIZE), (0, 1, 2 * SIZE)), _VALUE), 6, _WIPED),
    UserOperation("advise", "madvise(2)", (
        _MAPPING, Param("advice", (int(Advice.DONTNEED), int(Advice.REMOVE), int(Advice.POPULATE_READ),
                                   int(Advice.POPULATE_WRITE)),
                        (0, 1, 2, 3, int(Advice.FREE), int(Advice.WIPEONFORK), int(Advice.COLD), int(Advice.PAGEOUT),
                         int(Advice.DONTNEED_LOCKED), 99, -1)),
        Param("at", _OFFSETS, (1, SIZE)), Param("nr", _LENGTHS, (0, 1, PAGE + 1))), 6, _WIPED),
    UserOperation("region", "KVM_SET_USER_MEMORY_REGION2", (
        _VM, _SLOT, *_REGION, Param("file", (0, 1, 2, 3, 4), (), "file"),
        Param("offset", (0, PAGE, 2 * PAGE), (1, 3 * PAGE, SIZE, OVERFLOW, 1 << 63, (1 << 64) - PAGE))), 12, _UNBOUND),
    UserOperation("region1", "KVM_SET_USER_MEMORY_REGION, which knows no guest_memfd", (_VM, _SLOT, *_REGION), 1, _UNBOUND),
    UserOperation("attributes", "KVM_SET_MEMORY_ATTRIBUTES2 of a file", (
        _FILE, Param("offset", _OFFSETS, (1, SIZE, 1 << 63, (1 << 64) - PAGE)),
        Param("size", _LENGTHS, (0, 1, SIZE + PAGE, (1 << 64) - PAGE)),
        Param("attributes", (PRIVATE, 0), (1, 16, 1 << 63)), Param("flags", (0,), (1, 1 << 63))), 6,
        (UserCall("attributes", (0, 0, SIZE, 0, 0)), UserCall("attributes", (1, 0, SIZE, PRIVATE, 0)))),
    UserOperation("vm_attributes", "KVM_SET_MEMORY_ATTRIBUTES of a VM", (
        _VM, Param("gpa", (BASE,)), Param("size", (PAGE,), (0,)), Param("attributes", (PRIVATE, 0))), 1),
    UserOperation("guest_load", "a load of 8 bytes by the guest", (_VM, _GPA), 6, _WIPED),
    UserOperation("guest_store", "a store of 8 bytes by the guest", (_VM, _GPA, _VALUE), 6, _WIPED),
    UserOperation("pin", "a page pinned by way of a mapping: vmsplice(2) of 8 bytes", (_PIN, _MAPPING, _AT), 2,
              (UserCall("unpin", (0,)), UserCall("unpin", (1,)), *_WIPED)),
    UserOperation("unpin", "what the pinned bytes are by now, and the pin gone", (_PIN,), 2),
    UserOperation("other", f"a call that the file has no method for: {', '.join(OTHER_CALLS)}", (
        _register("file", 0, 1, 2, 3, 4), Param("which", tuple(range(len(OTHER_CALLS))))), 2),
    UserOperation("stat", "fstat(2): mode, size, blocks", (_register("file", 0, 1, 2, 3, 4),), 1),
    UserOperation("extension", "KVM_CHECK_EXTENSION of a VM", (_VM, Param("cap", (
        int(Cap.GUEST_MEMFD), int(Cap.GUEST_MEMFD_FLAGS), int(Cap.USER_MEMORY2), int(Cap.MEMORY_FAULT_INFO),
        CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES))), 1),
    UserOperation("child_load", "a forked child's load of 8 bytes, by the kernel", (_MAPPING, _AT), 1, _WIPED),
    UserOperation("child_vm", "KVM_CHECK_EXTENSION in a forked child", (_VM,), 1),
    UserOperation("close_vcpu", "close(2) of a VM's vCPU", (_VM,), 1, None),
    UserOperation("close_vm", "close(2) of a VM", (_VM,), 1, None),
)
OPERATIONS = {each.name: each for each in _ALL}

# -- of a protected guest: its pages are the process's anonymous memory ------------------------------------------------

PKVM_PAGES = 4
_PAGE = Param("page", tuple(range(PKVM_PAGES)))
_WORD = Param("at", (0,), (8, PAGE - 8))
_IPA = Param("at", (0,), (1, 8, PAGE - 1))
CALLS = (0x8400_0000, 0xC600_0002, 0xC600_0005)
"""PSCI_VERSION, the memory that MEM_SHARE counts in (HYP_MEMINFO), and a call that there is not."""

_OF_PKVM = (
    UserOperation("start", "KVM_CREATE_VM, protected or not, with the pages as its memory; the VM before is closed", (
        Param("protected", (1,), (0,)),), 2),
    UserOperation("guest_reads", "a load of 8 bytes by the guest", (_PAGE, _WORD), 8),
    UserOperation("guest_writes", "a store of 8 bytes by the guest", (_PAGE, _WORD, _VALUE), 14),
    UserOperation("share", "the guest's MEM_SHARE of a page", (_PAGE, _IPA, Param("reserved", (0,), (1,))), 10),
    UserOperation("unshare", "the guest's MEM_UNSHARE of a page", (_PAGE, _IPA, Param("reserved", (0,), (1,))), 7),
    UserOperation("calls", "another hypercall of the guest", (
        Param("number", CALLS), Param("first", (0,), (1,)), Param("second", (0,), (1,))), 1),
    UserOperation("host_reads", "a load of 8 bytes by the process", (_PAGE, _WORD), 6),
    UserOperation("host_writes", "a store of 8 bytes by the process", (_PAGE, _WORD, _VALUE), 8),
    UserOperation("copies_from", "write(2): the kernel copies 8 bytes from the process", (_PAGE,), 4),
    UserOperation("copies_to", "read(2): the kernel copies 8 bytes to the process", (_PAGE, _VALUE), 4),
    UserOperation("kernel_reads", "8 bytes by the kernel's own mapping: /proc/self/mem", (_PAGE,), 2),
    UserOperation("kernel_writes", "the same, written", (_PAGE, _VALUE), 2),
    UserOperation("discard", "madvise(2) with MADV_DONTNEED", (_PAGE,), 3),
    UserOperation("forks", "a child, and what a load of its own finds", (_PAGE,), 1),
    UserOperation("teardown", "close(2) of vCPU and VM", (), 3),
)
PKVM_OPERATIONS = {each.name: each for each in _OF_PKVM}
