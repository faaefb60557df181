"""A guest_memfd file on the emulated machine, and mappings of it. Bytes become pages here, and results become errnos.

What a page is and who may have it is the library's; which arguments a device's file refuses, and in which order, is the
subclass's. An access of the VMM is a load or store that EL0 executes on every page it touches; the bytes beside that
one doubleword are copied from and to the frame the instruction arrived at.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from errno import EAGAIN, EBADF, EFAULT, EFBIG, EINVAL, ENOMEM, EOPNOTSUPP, EOVERFLOW
from functools import wraps
from stat import S_IFREG
from types import FunctionType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from guest_memfd.compat import override
from guest_memfd.designs import Design
from guest_memfd.errors import BadInput, Signalled, SyscallFailed
from guest_memfd.machine.dev.calls import REFUSED, advise
from guest_memfd.machine.hw.buddy import OutOfMemory
from guest_memfd.machine.linux.mm import FIRST, MAX_VMAS, Vma
from guest_memfd.machine.linux.oops import TASK_SIZE
from guest_memfd.machine.primitives.contents import note_access
from guest_memfd.machine.primitives.host import EmulatedHost
from guest_memfd.machine.primitives.user import put_inode
from guest_memfd.plugins.guard import foreign
from guest_memfd.uapi.memory import (
    FALLOC_FL_COLLAPSE_RANGE,
    FALLOC_FL_INSERT_RANGE,
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_UNSHARE_RANGE,
    FALLOC_FL_WRITE_ZEROES,
    FALLOC_FL_ZERO_RANGE,
    Stat,
)
from guest_memfd.uapi.words import signed, word
from guest_memfd.words.pagestate import ANY, DATA, FAILURE, SECRET, SHARED_PAGE
from guest_memfd.words.primitives import Entries, Folio, Primitive, Steps
from guest_memfd.words.units import FIRST_PAGE, PAGE, Index, Pa, Va, page_index

if TYPE_CHECKING:
    from guest_memfd.machine.board.board import Board
    from guest_memfd.machine.board.lock import Turns
    from guest_memfd.machine.hypcalls.vm import Vm
    from guest_memfd.machine.linux.folio import LinuxFolio

BUS_ADRERR, SEGV_ACCERR = 2, 2
"""si_code of the SIGBUS that a fault handler asks for, and of a store to what may only be loaded (asm-generic/siginfo.h)."""

_FAULTS = 3
"""How often one access may fault before it is a SIGBUS: someone keeps taking the page away."""

_WORD = 8
_LAST_BYTE = (1 << 63) - 1
"""MAX_LFS_FILESIZE."""


class FileHost(EmulatedHost):
    """The primitives for one file, with VMAs over parts of it, and copies by user space."""

    windows: list[tuple[Index, int]]
    """First page and number of pages of every VMA."""

    # What operations cost is judged in a run as well, and what they return: every device hands on what its design states.
    def __init__(self, machine: Board, vm: Vm, size: int, library: Design) -> None:
        super().__init__(machine, vm, size, bounds=library.bounds, errnos=library.errnos,
                         resumes=library.resumes)
        if foreign(type(library), machine.hypervisor.ops):
            self.theirs = f"a procedure of design {library.name!r} on {machine.hypervisor.name!r}"
        self.windows = []
        self.window = FIRST_PAGE, 0                     # what mmap(2) is about
        self.vma: Vma | None = None                     # what it made, what munmap(2) is about, or user space goes through

    @override
    def asked(self, page: LinuxFolio) -> bool:
        """A device gives a guest what it has asked for, and nothing else."""
        return True

    @override
    def vma_covers(self, start: Index, nr: int) -> bool:
        """Whether one of the VMAs does."""
        return any(first < start + nr and start < first + length for first, length in self.windows)

    @override
    def mmap(self) -> int:
        """A VMA over the window, for which there may be no page table, or no address space."""
        if not self.inode.fd:
            return -EBADF
        if self.machine.slab_fails():
            self.against(FAILURE)
            return -ENOMEM
        try:
            self.vma = self.machine.vmm.mmap(self.inode, *self.window)
        except OutOfMemory:
            return -ENOMEM
        self.inode.references += 1
        return 0

    @override
    def munmap(self) -> bool:
        """The VMA, its entries, and the inode reference that it has."""
        self.machine.vmm.munmap(self.inode, self.vma)
        return put_inode(self)

    def user_read(self, index: Index, within: int, nr: int) -> bytes | str:
        """EL0 loads the doubleword at byte *within* of page *index*, and with it *nr* bytes; or what stops it."""
        pa = self._executed(index, within & -_WORD, None)
        if isinstance(pa, str):
            return pa
        self._saw(pa, write=False)
        return self.machine.ram.read(pa + within, nr)

    # For the laws. What these bytes should be no one has recorded; that the page was zeroed before its use, the file has.
    def _saw(self, pa: Pa, *, write: bool) -> None:
        page, tracer = self.machine.page_at(pa), self.machine.tracer
        tracer.expect(page, page.pa, ANY)
        content = SECRET if page.pa in tracer.secret else DATA if page.uptodate else tracer.content(page.pa)
        note_access(self, page, page.pa, "VMM", "user access", "user mapping", write, content)

    def user_write(self, index: Index, within: int, data: bytes) -> str:
        """EL0 stores one doubleword of *data* at byte *within* of page *index*, and the rest with it.

        ``ok``, or what stops it.
        """
        at, end = -(-within // _WORD) * _WORD, within + len(data)
        if at + _WORD <= end:
            word = data[at - within:at - within + _WORD]
        else:
            at = within & -_WORD
            # A store that is no whole doubleword: read it, put the bytes in, store it. EL0 has one instruction for
            # each.
            old = self._executed(index, at, None)
            if isinstance(old, str):
                return old
            word = self._merged(old + at, within - at, data)
        pa = self._executed(index, at, int.from_bytes(word, "little"))
        if isinstance(pa, str):
            return pa
        self._saw(pa, write=True)
        self.machine.ram.write(pa + within, data)
        self.machine.tracer.secret.discard(self.machine.page_at(pa).pa)
        return "ok"

    # The doubleword at *pa* once *data* has been put at its byte *first*.
    def _merged(self, pa: Pa, first: int, data: bytes) -> bytes:
        word = bytearray(self.machine.ram.read(pa, _WORD))
        part = data[:_WORD - first]
        word[first:first + len(part)] = part
        return bytes(word)

    # One instruction: the frame it arrived at, or a signal.
    def _executed(self, index: Index, at: int, value: int | None) -> Pa | str:
        if self.vma is None or not self.vma.covers(index):
            return "SIGSEGV"
        ran = self.machine.cpu.user(self.vma.va(index) + at, value is not None, value or 0)
        return ran.signal or ran.reached[-1] & -PAGE


# One call into the machine at a time; who is in a call holds the descriptor (fget()).
def _call(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(self: Serialised, *args: Any, **more: Any) -> Any:
        with self._lock:
            # A call that a signal has ended half way has left locks and counts as they were: nothing that this
            # machine says from then on could be believed.
            if self._lock.abandoned:
                raise BadInput("a call into this machine was interrupted half way; it is of no use any more, make another")
            self._calls += 1
            try:
                return function(self, *args, **more)
            except BaseException as error:
                # ^C, SystemExit, or no memory: these can come between any two lines. An error that we raise ourselves
                # comes where everything is in order.
                if not isinstance(error, Exception) or isinstance(error, MemoryError):
                    self._lock.abandoned = True
                raise
            finally:
                self._calls -= 1
                self._put()
    return call


class Serialised(ABC):
    """Used after it has been given up, it is EBADF. Every public method and property is a call into the machine.

    Calls from several threads are made one after the other. Given up while another thread is inside of a call, it goes when
    that comes back. After a call that a signal has ended half way only `close` works, and does nothing.
    """

    closed = False
    _lock: Turns
    _calls = 0
    _released = False

    @override
    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        for name, thing in list(vars(cls).items()):
            if isinstance(thing, FunctionType) and not name.startswith("_"):
                setattr(cls, name, _call(thing))
            elif isinstance(thing, property) and thing.fget is not None:
                setattr(cls, name, property(_call(thing.fget), thing.fset and _call(thing.fset), doc=thing.__doc__))

    def close(self) -> None:
        """Give it up; a second time changes nothing."""
        with self._lock:
            self.closed = True
            self._put()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # What giving it up is.
    @abstractmethod
    def _release(self) -> None: ...

    def _put(self) -> None:
        # fget() and fput(): a descriptor that is closed while another thread is inside of a call goes when that comes
        # back.
        if self.closed and not self._calls and not self._released:
            self._released = True
            if not self._lock.abandoned:
                self._release()

    def _in_use(self, call: str) -> None:
        if self.closed:
            raise SyscallFailed(EBADF, call, "it has been closed")


class Mapped(Serialised):
    """*vma* of *file*: *size* bytes from file offset *offset* on (uapi/memory.py Mapping)."""

    def __init__(self, file: GuestMemoryFile, offset: int, size: int, vma: Vma, readonly: bool) -> None:
        self.file, self.offset, self.size, self.vma, self.readonly = file, offset, size, vma, readonly
        self._lock = file.machine.lock

    @property
    def address(self) -> Va:
        """Where the VMM sees it."""
        return self.vma.address

    def read(self, at: int, nr: int) -> bytes:
        """*nr* bytes from byte *at* on; raises Signalled, BadInput beyond the mapping."""
        return b"".join(self._access(index, within, length)
                        for index, within, length, _ in self._pieces("read", at, nr))

    def write(self, at: int, data: bytes) -> None:
        """Store *data* from byte *at* on; raises as `read`. Pages before the one that refused have been written."""
        for index, within, length, done in self._pieces("write", at, len(data)):
            self._access(index, within, length, data[done:done + length])

    def pin(self, at: int = 0) -> Pinned:
        """Pin the page that holds byte *at*, as O_DIRECT, a device or a fixed buffer of io_uring does (pin_user_pages()).

        Until it is closed the page is not converted to private: EAGAIN, with its offset in the file. Raises SyscallFailed:
        EFAULT for a page that the VMM cannot have, or of a design that lets no one pin; BadInput beyond the mapping.
        """
        (index, *_), file = next(self._pieces("pin", at, 1)), self.file
        # The page may be taken away again between the fault and the look: GUP-fast starts over.
        for _attempt in range(_FAULTS):
            folio = file.perform(Primitive("gup_read_pte", (index,), "mm")) if file.library.gup else None
            if folio is not None and file.perform(Primitive("gup_try_get", (folio,), "mm")):
                file.perform(Primitive("gup_recheck", (index, folio, True), "mm"))
                return Pinned(file, folio)
            if not file.library.gup or not file.fault_in(index):
                break
        raise SyscallFailed(EFAULT, "pin_user_pages", f"page {index} of the file")

    # What of [at, at+nr) lies in each page: its index in the file, first byte there, bytes, bytes before it.
    def _pieces(self, call: str, at: int, nr: int) -> Iterator[tuple[Index, int, int, int]]:
        self._in_use(call)
        if at < 0 or nr < 0 or at + nr > self.size:
            raise BadInput(f"{call} of {nr:#x} bytes at {at:#x} of a mapping of {self.size:#x} bytes")
        done = 0
        while done < nr:
            start = self.offset + at + done
            within = start % PAGE
            length = min(PAGE - within, nr - done)
            yield page_index(start), within, length, done
            done += length

    # A load of *length* bytes, or a store of *data*; faults go to the library.
    def _access(self, index: Index, within: int, length: int, data: bytes | None = None) -> bytes:
        file = self.file
        if data is not None and self.readonly:          # access_error() (mm/fault.c), before anything is looked for
            raise Signalled("SIGSEGV", self.vma.va(index) + within, SEGV_ACCERR)
        name, args = ("user_read", (index, within, length)) if data is None else ("user_write", (index, within, data))
        for _attempt in range(_FAULTS):
            file.host.vma = self.vma
            seen = file.perform(Primitive(name, args, "user"))
            if isinstance(seen, bytes):
                return seen
            if seen == "ok":
                return b""
            if seen != "fault":
                raise Signalled(seen, self.vma.va(index) + within)
            if not file.fault_in(index):
                break
        raise Signalled("SIGBUS", self.vma.va(index) + within, BUS_ADRERR)

    def advise(self, advice: int, at: int = 0, nr: int | None = None) -> None:
        """madvise(2) of [at, at+nr) bytes, *nr* None being the rest; raises SyscallFailed, BadInput beyond the mapping."""
        nr = self.size - at if nr is None else nr
        self._in_use("madvise")
        if at < 0 or nr < 0 or at + nr > self.vma.nr * PAGE:
            raise BadInput(f"madvise of {nr:#x} bytes at {at:#x} of a mapping of {self.size:#x} bytes")
        advise(self, advice, at, nr)

    @override
    def _release(self) -> None:
        if self.file.machine.dead is None:
            self.file.unmap(self)


# vfs_fallocate() (fs/open.c): one operation at a time, of which three change what comes after the range.
def _mode_exists(mode: int) -> bool:
    operation = mode & ~FALLOC_FL_KEEP_SIZE
    if operation == FALLOC_FL_PUNCH_HOLE:
        return mode != operation
    keeps = (0, FALLOC_FL_ZERO_RANGE, FALLOC_FL_UNSHARE_RANGE)
    return operation in keeps or mode in (FALLOC_FL_COLLAPSE_RANGE, FALLOC_FL_INSERT_RANGE, FALLOC_FL_WRITE_ZEROES)


class Pinned(Serialised):
    """A pin on *folio* of *file*; it outlives the mapping, and the file."""

    def __init__(self, file: GuestMemoryFile, folio: Folio) -> None:
        self.file, self.folio = file, folio
        self._lock = file.machine.lock

    def read(self, at: int, nr: int) -> bytes:
        """What the holder of the pin finds in [at, at+nr) of the page, whoever has taken it out of the file meanwhile."""
        self._in_use("read")
        return self.file.machine.ram.read(self.file.host.page(self.folio).pa + at, nr)

    @override
    def _release(self) -> None:
        if self.file.machine.dead is None:
            self.file.perform(Primitive("unpin", (self.folio, True), "mm"))


class GuestMemoryFile(Serialised):
    """A guest_memfd of *size* bytes (uapi/memory.py GuestMemory), served by the design *library*.

    *vm*: whose driver answers the hypercalls about its pages. *shared*: page indexes born shared. Raises
    SyscallFailed from its creation, under the name `created_by`. A subclass says what its device refuses.
    """

    created_by = "CREATE_GUEST_MEMFD"

    def __init__(self, machine: Board, library: Design, size: int, vm: Vm, shared: tuple[int, ...] = ()) -> None:
        self.machine, self.library, self.size = machine, library, size
        self._lock = machine.lock
        self.host = self.make_host(vm, max(size // PAGE, 1))            # a file of no pages has one that no one gets to
        self.mappings: list[Mapped] = []
        self._created(self.run(library.create(self.host.inode.size, shared)))

    # -EOPNOTSUPP: this kernel cannot do what the library is for.
    def _created(self, ret: int) -> None:
        rodata = self.machine.config.rodata
        why = f"the direct map cannot be changed (rodata={rodata})" if ret == -EOPNOTSUPP else ""
        self.check(ret, self.created_by, why)

    def make_host(self, vm: Vm, pages: int) -> FileHost:
        """The primitives for this file."""
        return FileHost(self.machine, vm, pages, self.library)

    # -- what a device decides -----------------------------------------------------------------------------------

    @abstractmethod
    def check_fallocate(self, mode: int, offset: int, nr: int) -> None:
        """Raise SyscallFailed for arguments that this file's fallocate() refuses, in its order."""

    def init_shared(self) -> None:
        """All of the new file is shared: there is no page yet whose state could differ from its attribute."""
        ret = self.perform(Primitive("tree_store", ("attributes", 0, Entries(SHARED_PAGE, self.host.inode.size)), "library"))
        if ret:
            self.close()
            raise SyscallFailed(-ret, self.created_by)

    @abstractmethod
    def check_mmap(self, offset: int, nr: int, shared: bool) -> None:
        """Raise SyscallFailed for a mapping this file's mmap() refuses; the generic checks come before."""

    def map_range(self, start: Index, nr: int) -> Steps[int]:
        """The library's part of mmap(2)."""
        return self.library.mmap()

    # -- system calls --------------------------------------------------------------------------------------------

    def fallocate(self, mode: int, offset: int, nr: int) -> None:
        """fallocate(2); the generic checks of vfs_fallocate() first, then the file's own. Raises SyscallFailed."""
        mode, offset, nr = word("mode", mode, 32), signed("offset", offset, 64), signed("len", nr, 64)
        self._in_use("fallocate")
        if offset < 0 or nr <= 0:
            raise SyscallFailed(EINVAL, "fallocate", f"{nr} bytes at {offset}")
        if not _mode_exists(mode):
            raise SyscallFailed(EOPNOTSUPP, "fallocate", f"mode {mode:#x}")
        if offset + nr > _LAST_BYTE:
            raise SyscallFailed(EFBIG, "fallocate", f"{nr:#x} bytes at {offset:#x}")
        self.check_fallocate(mode, offset, nr)
        if mode & FALLOC_FL_PUNCH_HOLE:
            result = self.run(self.library.punch_hole(page_index(offset), nr // PAGE))
            self.check(result.ret, "fallocate", self._where(result.error_index))
        else:
            self._check_room(page_index(offset), nr // PAGE)
            self.check(self.run(self.library.allocate(page_index(offset), nr // PAGE)), "fallocate")

    # What there is no memory for fails at its first page here, and not at its last.
    def _check_room(self, start: Index, nr: int) -> None:
        free = self.machine.folios.free_pages
        if nr > free:
            there = sum(page.nr for index, page in self.host.inode.pages.items() if start <= index < start + nr)
            if nr - there > free:
                raise SyscallFailed(ENOMEM, "fallocate", f"{nr - there} pages, of which {free} are free")

    @staticmethod
    def _where(index: Index | None) -> str:
        return "" if index is None else f"page {index} stays"

    def punch_hole(self, offset: int, nr: int) -> None:
        """fallocate(2) with KEEP_SIZE | PUNCH_HOLE."""
        self.fallocate(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, offset, nr)

    def mmap(self, offset: int = 0, nr: int | None = None, *, shared: bool = True, readonly: bool = False) -> Mapped:
        """mmap(2) of PROT_READ | PROT_WRITE, or PROT_READ; *nr* None: to the end of the file. Raises SyscallFailed."""
        # sys_mmap() of the architecture looks at the offset before anyone looks for the file.
        if offset % PAGE:
            raise SyscallFailed(EINVAL, "mmap", f"offset {offset:#x}")
        self._in_use("mmap")
        nr = max(self.size - offset, 0) if nr is None else nr
        self._may_map(offset, nr)
        self.check_mmap(offset, nr, shared)
        window = self.host.window = page_index(offset), -(-nr // PAGE)
        self.check(self.run(self.map_range(*window)), "mmap")
        assert self.host.vma is not None
        mapped = Mapped(self, offset, nr, self.host.vma, readonly)
        self.host.windows.append(window)
        self.mappings.append(mapped)
        return mapped

    # do_mmap() (mm/mmap.c), before it asks the file.
    def _may_map(self, offset: int, nr: int) -> None:
        nr = word("length", nr, 64)
        if not nr:
            raise SyscallFailed(EINVAL, "mmap", "no bytes")
        length = -(-nr // PAGE) * PAGE
        if length > TASK_SIZE - FIRST or self.machine.vmm.full:
            raise SyscallFailed(ENOMEM, "mmap", f"{nr:#x} bytes, and {MAX_VMAS} VMAs at most")
        if offset % (1 << 64) + length > _LAST_BYTE:
            raise SyscallFailed(EOVERFLOW, "mmap", f"{nr:#x} bytes at {offset:#x}")

    def unmap(self, mapped: Mapped) -> None:
        """munmap(2) of one of this file's mappings."""
        self.mappings.remove(mapped)
        self.host.vma = mapped.vma
        self.host.windows.remove((mapped.vma.start, mapped.vma.nr))
        self.run(self.library.munmap())

    def other_call(self, name: str) -> None:
        """A system call that KVM's file has no method for, by name as in `REFUSED`: fails with what the VFS says then."""
        self._in_use(name)
        raise SyscallFailed(REFUSED[name], name, "a guest_memfd has no such operation")

    def resident(self) -> int:
        """How many pages of it there are, as cachestat(2) counts them."""
        self._in_use("cachestat")
        return sum(page.nr for page in self.host.inode.pages.values())

    def fstat(self) -> Stat:
        """fstat(2): neither driver counts blocks."""
        self._in_use("fstat")
        return Stat(S_IFREG, self.size, 0)

    # No one is left to close anything for once Linux has stopped.
    @override
    def _release(self) -> None:
        if self.machine.dead is None and self.perform(Primitive("fd_close", (), "user")):
            self.run(self.library.close())

    # -- running the library -------------------------------------------------------------------------------------

    def perform(self, primitive: Primitive) -> Any:
        """One primitive for this file's user; raises KernelPanic, again if Linux has stopped before."""
        if self.machine.dead is not None:
            raise self.machine.dead
        return self.host.perform(primitive, 0)

    def run(self, procedure: Steps[Any]) -> Any:
        """A procedure to its end; raises KernelPanic as `perform`."""
        if self.machine.dead is not None:
            raise self.machine.dead
        return self.host.run(procedure)

    def fault_in(self, index: Index) -> bool:
        """A fault of the VMM at page *index*: whether it is to go on; False: SIGBUS. Raises KernelPanic as `perform`."""
        answer = self.run(self.library.user_fault(index))
        told = {"ok": 0, "SIGBUS": -EFAULT}.get(answer, -EAGAIN)
        self.perform(Primitive("op_returned", ("user_fault", index, 1, told, None, None), "user"))
        return bool(answer != "SIGBUS")

    def check(self, ret: int, call: str, why: str = "") -> None:
        """Raise SyscallFailed when *ret* is -errno."""
        if ret < 0:
            raise SyscallFailed(-ret, call, why)
