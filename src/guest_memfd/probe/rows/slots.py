"""Memory slots on a guest_memfd: what KVM_SET_USER_MEMORY_REGION2 accepts, refuses, keeps and gives back."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

from guest_memfd.linux.mapping import PAGE
from guest_memfd.probe.ask.calls import KEEP_SIZE, attempt, call, load, store
from guest_memfd.probe.ask.here import SIZE, Here, bind
from guest_memfd.probe.ask.row import Row, among
from guest_memfd.uapi import kvm
from guest_memfd.uapi.kvm import SHARED, MemFlag

GMEM = int(MemFlag.GUEST_MEMFD)
GPA = 1 << 28
BEYOND = (1 << 63) - PAGE
"""The offset whose sum with a size is negative, taken as signed."""


def binds(here: Here, *, slot: int = 0, flags: int = GMEM, gpa: int = GPA, size: int = SIZE, uaddr: int = 0, offset: int = 0,
          file: int | None = None) -> None:
    """Bind a new file of four pages; *file*: its flags, those that every default VM takes if there are none."""
    bind(here.vm, slot, flags, gpa, size, uaddr, here.bindable() if file is None else here.gmem(file), offset)


def field(here: Here, name: str, value: int) -> None:
    """Bind with one field out of the ordinary."""
    binds(here, **{name: value})


def of_flags(here: Here, flags: int, where: str) -> None:
    """Bind a file with *flags*, and memory of the VMM's: none, mapped or not."""
    uaddr = 0 if where == "none" else here.memory() if where == "mapped" else here.hole()
    binds(here, file=flags, uaddr=uaddr)


def too_large_slot(here: Here) -> None:
    """The first slot number that there is not."""
    binds(here, slot=call("ioctl", here.vm, kvm.CHECK_EXTENSION, kvm.Cap.NR_MEMSLOTS))


def old_ioctl(here: Here) -> None:
    """KVM_SET_USER_MEMORY_REGION with the flag KVM_MEM_GUEST_MEMFD, for which its structure has no field."""
    call("ioctl", here.vm, kvm.SET_USER_MEMORY_REGION, kvm.UserspaceMemoryRegion(0, GMEM, GPA, SIZE, here.memory()))


def without_flag(here: Here) -> None:
    """KVM_SET_USER_MEMORY_REGION2 of a plain slot, with nonsense for file and offset."""
    bind(here.vm, 0, 0, GPA, SIZE, here.memory(), 0xFFFF, 1)


def pads(here: Here) -> None:
    """KVM_SET_USER_MEMORY_REGION2 with all bits of all padding set."""
    region = kvm.UserspaceMemoryRegion2(0, GMEM, GPA, SIZE, 0, 0, here.bindable(), 0xFFFFFFFF)
    region.pad2[:] = [(1 << 64) - 1] * 14
    call("ioctl", here.vm, kvm.SET_USER_MEMORY_REGION2, region)


def descriptor(here: Here, what: str) -> None:
    """Bind something else than a guest_memfd of this VM."""
    own = here.bindable()

    def closed() -> int:
        os.close(own)
        return own

    def of_closed_vm() -> int:
        other = here.another_vm()
        fd = here.bindable(vm=other)
        os.close(other)
        return fd

    others: dict[str, Callable[[], int]] = {
        "closed": closed, "minus-1": lambda: -1, "dup": lambda: os.dup(own), "null": lambda: here.open("/dev/null"),
        "vm": lambda: here.vm, "vcpu": here.vcpu, "another-vm": lambda: here.bindable(vm=here.another_vm()),
        "another-vm-closed": of_closed_vm, "memfd": lambda: call("memfd_create", b"m", 0), "secret": here.secret,
    }
    bind(here.vm, 0, GMEM, GPA, SIZE, 0, others[what]())


def two(here: Here, gpa: int, offset: int, nr: int, dup: bool = False) -> None:
    """Bind pages 0 and 1 of a file, then *nr* bytes at *offset* of it, at *gpa* in another slot."""
    fd = here.bindable()
    bind(here.vm, 0, GMEM, GPA, 2 * PAGE, 0, fd)
    bind(here.vm, 1, GMEM, gpa, nr, 0, os.dup(fd) if dup else fd, offset)


def changed(here: Here, name: str, value: int) -> None:
    """Bind, then set the same slot again with *name* changed, if it has one; to *value*, of an address by it."""
    fd, uaddr = here.bindable(), here.memory()
    fields = {"flags": GMEM, "gpa": GPA, "size": 2 * PAGE, "uaddr": uaddr, "offset": 0}
    for _ in range(2):
        bind(here.vm, 0, fields["flags"], fields["gpa"], fields["size"], fields["uaddr"], fd, fields["offset"])
        if name:
            fields[name] = uaddr + value if name == "uaddr" else value


def plain_to_gmem(here: Here) -> None:
    """Turn a plain slot into one with a guest_memfd."""
    uaddr = here.memory()
    bind(here.vm, 0, 0, GPA, SIZE, uaddr)
    bind(here.vm, 0, GMEM, GPA, SIZE, uaddr, here.bindable())


def many(here: Here, slots: int) -> None:
    """Every second page of a file in a slot of its own."""
    fd = here.bindable(2 * slots * PAGE)
    for slot in range(slots):
        bind(here.vm, slot, GMEM, GPA + 2 * slot * PAGE, PAGE, 0, fd, 2 * slot * PAGE)


def delete(here: Here, times: int, flags: int = 0, fd: int = 0) -> None:
    """Bind, and delete the slot so many times."""
    binds(here)
    for _ in range(times):
        bind(here.vm, 0, flags, 0, 0, 0, fd)


def delete_nothing(here: Here) -> None:
    """Delete a slot that never was."""
    bind(here.vm, 7, 0, 0, 0)


def rebind(here: Here) -> str:
    """Bind, store through a mapping, delete, bind elsewhere: what the mapping shows."""
    fd = here.gmem(SHARED)
    address = here.map(fd)
    bind(here.vm, 0, GMEM, GPA, SIZE, 0, fd)
    store(address, b"kept")
    bind(here.vm, 0, 0, 0, 0)
    bind(here.vm, 3, GMEM, 2 * GPA, SIZE, 0, fd)
    return load(address, 4).decode()


def rebind_in_part(here: Here) -> None:
    """Bind all, delete, and bind the halves the other way round."""
    fd = here.bindable()
    bind(here.vm, 0, GMEM, GPA, SIZE, 0, fd)
    bind(here.vm, 0, 0, 0, 0)
    bind(here.vm, 0, GMEM, GPA, SIZE // 2, 0, fd, SIZE // 2)
    bind(here.vm, 1, GMEM, GPA + SIZE // 2, SIZE // 2, 0, fd, 0)


def closed_while_bound(here: Here, then: str) -> None:
    """Close a bound file's only descriptor; then see what of its slot is left."""
    fd = here.bindable()
    bind(here.vm, 0, GMEM, GPA, SIZE, 0, fd)
    os.close(fd)
    if then in ("delete", "delete-and-bind"):
        bind(here.vm, 0, 0, 0, 0)
    if then in ("bind", "delete-and-bind"):
        bind(here.vm, 1, GMEM, GPA, SIZE, 0, here.bindable())


def dirty_log(here: Here) -> None:
    """KVM_GET_DIRTY_LOG of the slot."""
    binds(here)
    log = ctypes.create_string_buffer(PAGE)
    call("ioctl", here.vm, kvm.GET_DIRTY_LOG, kvm.DirtyLog(0, 0, ctypes.addressof(log)))


def vm_attributes(here: Here) -> None:
    """KVM_SET_MEMORY_ATTRIBUTES of the VM: make it private."""
    binds(here)
    call("ioctl", here.vm, kvm.SET_MEMORY_ATTRIBUTES, kvm.MemoryAttributes(GPA, SIZE, kvm.PRIVATE, 0))


def vm_attributes2(here: Here) -> None:
    """KVM_SET_MEMORY_ATTRIBUTES2 of the VM, whose ioctl it is not."""
    call("ioctl", here.vm, kvm.SET_MEMORY_ATTRIBUTES2, kvm.MemoryAttributes2(size=PAGE))


def pre_fault(here: Here) -> None:
    """KVM_PRE_FAULT_MEMORY of the slot."""
    binds(here)
    call("ioctl", here.vcpu(), kvm.PRE_FAULT_MEMORY, kvm.PreFaultMemory(GPA, SIZE, 0))


def fallocates_bound(here: Here) -> str:
    """fallocate(2) of a file while it is bound."""
    fd = here.bindable()
    bind(here.vm, 0, GMEM, GPA, SIZE, 0, fd)
    return attempt(lambda: call("fallocate", fd, KEEP_SIZE, 0, SIZE) or None)


# The first two are flags of other slots (check_memory_region_flags()): KVM logs no dirty pages of a guest_memfd, and a
# write to a read-only slot is an MMIO exit, which its fault cannot become.
_FLAG_BITS = {"log-dirty": 1, "readonly": 2, "bit-3": 8, "bit-4": 16, "bit-15": 1 << 15, "bit-16-invalid": 1 << 16,
              "bit-17-gmem-only": 1 << 17, "bit-31": 1 << 31}
_FIELDS = [
    ("offset-unaligned", "an offset that is no multiple of a page", "offset", 1, "EINVAL"),
    ("offset-negative", "a negative offset", "offset", -PAGE, "EINVAL"),
    ("offset-past-eof", "an offset at which the file ends before the slot does", "offset", PAGE, "EINVAL"),
    ("offset-at-eof", "an offset at the end of the file", "offset", SIZE, "EINVAL"),
    ("size-past-eof", "a slot larger than the file", "size", SIZE + PAGE, "EINVAL"),
    ("size-0", "a new slot of size 0", "size", 0, "EINVAL"),
    ("size-unaligned", "a size that is no multiple of a page", "size", PAGE + 1, "EINVAL"),
    ("size-huge", "a slot of 2^31 pages", "size", PAGE << 31, "EINVAL"),
    ("gpa-unaligned", "a guest address that is no multiple of a page", "gpa", GPA + 1, "EINVAL"),
    ("gpa-wraps", "a range of guest addresses that wraps", "gpa", (1 << 64) - PAGE, "EINVAL"),
    ("uaddr-unaligned", "a user address that is no multiple of a page", "uaddr", 1, "EINVAL"),
    ("uaddr-kernel", "a user address in the kernel's half", "uaddr", 0xFFFF8880_00000000, "EINVAL"),
]
_TWICE = (("overlap is EEXIST", "EEXIST"),)
# What is open, but no guest_memfd of this VM, is EINVAL: kvm_gmem_bind() compares file operations, and then the VM.
_DESCRIPTORS = {
    "closed": ("a closed descriptor", "EBADF"),
    "minus-1": ("descriptor -1", "EBADF"),
    "dup": ("a duplicate of the file's own", "ok"),
    "null": ("/dev/null", "EINVAL"),
    "vm": ("the VM itself", "EINVAL"),
    "vcpu": ("a vCPU", "EINVAL"),
    "memfd": ("a memfd", "EINVAL"),
    "secret": ("a memfd_secret", "EINVAL"),
    "another-vm": ("another VM's guest_memfd", "EINVAL"),
    "another-vm-closed": ("another VM's guest_memfd, that VM's descriptor being closed", "EINVAL"),
}
_CHANGES = [
    ("same", "nothing changed", ("", 0)), ("moved", "another guest address", ("gpa", 2 * GPA)),
    ("smaller", "smaller", ("size", PAGE)), ("larger", "larger", ("size", SIZE)),
    ("uaddr", "another user address", ("uaddr", PAGE)), ("offset", "another offset", ("offset", PAGE)),
    ("log-dirty", "with KVM_MEM_LOG_DIRTY_PAGES", ("flags", GMEM | 1)),
    ("readonly", "with KVM_MEM_READONLY", ("flags", GMEM | 2)), ("plain", "without KVM_MEM_GUEST_MEMFD", ("flags", 0)),
]

ROWS = among(("slots",), [
    *(Row(f"slot.flags-{flags}.{where}", f"a file with flags {flags} can be bound, userspace_addr {where}", of_flags,
          (flags, where), "ok", tuple(f"flag {bit}" for bit in (1, 2) if flags & bit),
          () if flags & 1 else (("unmappable slots", "ok"), ("arm64", "EINVAL")))
      for flags in range(4) for where in ("none", "mapped", "unmapped")),
    *(Row(f"slot.with-{name}", f"KVM_MEM_GUEST_MEMFD with {name} is refused", field, ("flags", GMEM | bit), "EINVAL")
      for name, bit in _FLAG_BITS.items()),
    *(Row(f"slot.{name}", f"{words} is refused", field, (which, value), expect)
      for name, words, which, value, expect in _FIELDS),
    Row("slot.gpa-2-to-52", "a guest address of 2^52 is refused", field, ("gpa", 1 << 52), "EINVAL", ("x86-64",)),
    Row("slot.address-space-1", "address space 1 is SMM's; a kernel without SMM has none", field, ("slot", 1 << 16),
        "EINVAL", ("one address space",)),
    Row("slot.offset-overflow", "an offset of 2^63 less a page: its end is negative as signed, and below the size", field,
        ("offset", BEYOND), "ok", rules=(("binding offsets unsigned", "EINVAL"),)),
    Row("slot.number", "the first slot number past KVM_CAP_NR_MEMSLOTS is refused", too_large_slot, (), "EINVAL"),
    # Its structure ends before the descriptor: KVM allows it the flags of the first version only.
    Row("slot.old-ioctl", "KVM_SET_USER_MEMORY_REGION does not know KVM_MEM_GUEST_MEMFD", old_ioctl, (), "EINVAL"),
    Row("slot.without-flag", "without KVM_MEM_GUEST_MEMFD file and offset are not looked at", without_flag),
    Row("slot.pads", "the padding of the argument is not looked at", pads),
    *(Row(f"slot.fd-{name}", f"{words} {'can be bound' if expect == 'ok' else 'is refused'}", descriptor, (name,), expect,
          {"vcpu": ("vcpu",), "secret": ("secretmem",)}.get(name, ())) for name, (words, expect) in _DESCRIPTORS.items()),
    Row("slot.gpa-overlaps", "guest addresses in use by another slot are refused", two, (GPA + PAGE, 2 * PAGE, PAGE),
        "EEXIST"),
    Row("slot.file-twice", "pages bound already are refused", two, (2 * GPA, 0, 2 * PAGE), "EINVAL", rules=_TWICE),
    Row("slot.file-partly", "pages of which some are bound already are refused", two, (2 * GPA, PAGE, 2 * PAGE), "EINVAL",
        rules=_TWICE),
    Row("slot.file-twice-dup", "a duplicate descriptor is the same file", two, (2 * GPA, 0, 2 * PAGE, True), "EINVAL",
        rules=_TWICE),
    Row("slot.file-rest", "the rest of the file can go into another slot", two, (2 * GPA, 2 * PAGE, 2 * PAGE)),
    Row("slot.many", "100 slots of one page each of one file", many, (100,)),
    # To set a plain slot again as it is succeeds, and changes nothing. kvm_set_memory_region() compares no slot of a
    # guest_memfd with the old one: it can be deleted, and that is all.
    *(Row(f"slot.again-{name}", f"a slot with a guest_memfd is never changed: {words}", changed, given, "EINVAL")
      for name, words, given in _CHANGES),
    Row("slot.plain-to-gmem", "a plain slot does not become one with a guest_memfd", plain_to_gmem, (), "EINVAL"),
    Row("slot.delete", "a slot is deleted by size 0", delete, (1,)),
    Row("slot.delete-with-flag", "KVM_MEM_GUEST_MEMFD and a bad descriptor do not matter to a delete", delete,
        (1, GMEM, 0xFFFF)),
    Row("slot.delete-twice", "a slot is deleted once", delete, (2,), "EINVAL"),
    Row("slot.delete-none", "a slot that never was cannot be deleted", delete_nothing, (), "EINVAL"),
    Row("slot.rebind", "what was bound keeps its bytes, and can be bound elsewhere", rebind, (), "kept",
        ("flag 1", "flag 2")),
    Row("slot.rebind-in-part", "what was bound can be bound again in other pieces", rebind_in_part),
    # kvm_gmem_release() takes the file out of its slots and leaves them: guest addresses are the VMM's to give up.
    Row("slot.closed-then-bind", "the slot of a closed file still has its guest addresses", closed_while_bound, ("bind",),
        "EEXIST"),
    Row("slot.closed-then-delete", "the slot of a closed file can be deleted", closed_while_bound, ("delete",)),
    Row("slot.closed-delete-bind", "and then its guest addresses are free", closed_while_bound, ("delete-and-bind",)),
    # ENOENT, as of a slot that does not exist: kvm_get_dirty_log() wants a
    # bitmap, and only KVM_MEM_LOG_DIRTY_PAGES makes one.
    Row("slot.dirty-log", "a slot with a guest_memfd has no dirty log", dirty_log, (), "ENOENT"),
    Row("slot.allocate-bound", "a file can be allocated while it is bound", fallocates_bound),
    Row("slot.attributes", "KVM_SET_MEMORY_ATTRIBUTES is there iff KVM_CAP_MEMORY_ATTRIBUTES is", vm_attributes, (),
        "ENOTTY", rules=(("attributes", "ok"), ("arm64", "EINVAL"))),
    Row("slot.attributes2", "KVM_SET_MEMORY_ATTRIBUTES2 is no ioctl of a VM", vm_attributes2, (), "ENOTTY",
        rules=(("arm64", "EINVAL"),)),
    Row("slot.pre-fault", "KVM_PRE_FAULT_MEMORY needs two-dimensional paging; then private pages are none that it maps",
        pre_fault, (), "EOPNOTSUPP", ("vcpu",), rules=(("pre-fault", "EFAULT"), ("arm64", "EINVAL"))),
])
