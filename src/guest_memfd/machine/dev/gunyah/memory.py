"""What every memory file of /dev/gunyah refuses, under any design. Arguments are checked in the driver's order.

Source: gunyah_gmem_fallocate(), gunyah_gmem_mmap() (drivers/virt/gunyah/guest_memfd.c, series v17, patches 23 and 24).
"""

from __future__ import annotations

from abc import abstractmethod
from errno import EBUSY, EINVAL, ENODEV, EOPNOTSUPP
from errno import EINVAL as NOT_THERE
from typing import TYPE_CHECKING, NamedTuple

from guest_memfd.compat import override
from guest_memfd.designs import Design
from guest_memfd.designs.none import NoDesign
from guest_memfd.errors import SyscallFailed
from guest_memfd.machine.dev.file import FileHost, GuestMemoryFile
from guest_memfd.machine.dev.gunyah.binding import Binding
from guest_memfd.machine.hypcalls.gunyah import DeviceVm
from guest_memfd.uapi.gunyah import GunyahMemFlag
from guest_memfd.uapi.memory import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE
from guest_memfd.words.pagestate import GONE, HELD
from guest_memfd.words.primitives import Folio
from guest_memfd.words.units import PAGE, Gfn, Index, Pa, pfn_to_pa

if TYPE_CHECKING:
    from guest_memfd.machine.board.board import Board

PMD_ORDER = 9
_MODES = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE


class Parcelled(NamedTuple):
    """The folios of a memory parcel, and the gfn of the first."""

    folios: tuple[Folio, ...]
    gfn: Gfn

    @property
    def nr(self) -> int:
        """Length of the parcel in pages."""
        return sum(folio.nr for folio in self.folios)


class MemoryHost(FileHost):
    """The primitives for one file of /dev/gunyah: a hypercall is about the VM that the page is bound to."""

    file: GunyahMemoryFile

    @override
    def hyp_call(self, name: str, *args: object) -> int:
        """As any, for the VM of the page. What a memory parcel has is busy; a VM that does not exist has nothing."""
        page = self.page(next(arg for arg in args if isinstance(arg, Folio)))
        # The pages of a parcel come back together, by the Resource Manager. Until then no operation of the file may
        # take one.
        if page.pa in self.file.parcelled:
            self.against(HELD, page)
            return -EBUSY
        vm = self._bound_to(page.index, page.nr) if page.inode is self.inode else self.file.vm
        # Taking back from a VM that is gone finds nothing mapped, which callers take for success. Giving to it is an
        # error.
        if vm.handle is None or vm.state == GONE:
            return -NOT_THERE if name.startswith(("unmap", "donate_from")) else -ENODEV
        # One file can be bound to several VMs, and the driver below asks for the VM of the call. Put back even if the
        # kernel stops.
        kept, self.vm = self.vm, vm
        try:
            return super().hyp_call(name, *args)
        finally:
            self.vm = kept

    def _bound_to(self, start: Index, nr: int) -> DeviceVm:
        return next((b.vm for b in self.file.bindings if b.covers(start, nr)), self.file.vm)

    @override
    def vm_at(self, index: Index) -> DeviceVm:
        """The VM that page *index* is bound to; the file's own where no binding covers it."""
        return self._bound_to(index, 1)


class GunyahMemoryFile(GuestMemoryFile):
    """A file from CREATE_GUEST_MEM; `bindings` are those of all VMs.

    Every procedure below returns 0 or -errno, and raises KernelPanic when Linux stops.
    """

    created_by = "CREATE_GUEST_MEM"

    def __init__(self, machine: Board, library: Design, size: int, flags: GunyahMemFlag) -> None:
        self.flags = flags
        self.bindings: list[Binding] = []
        self.parcelled: set[Pa] = set()         # physical addresses of what a memory parcel has at the moment
        self.vm = DeviceVm(None, -1)            # for pages that no VM has
        super().__init__(machine, library, size, self.vm)

    @override
    def make_host(self, vm: DeviceVm, pages: int) -> FileHost:  # type: ignore[override]
        """One that knows the VM of every page."""
        host = MemoryHost(self.machine, vm, pages, self.library)
        host.file = self
        return host

    @property
    def pages(self) -> int:
        """Length of the file in pages; its size is a multiple of a page."""
        return self.size // PAGE

    @property
    def needs_direct_map(self) -> bool:
        """Whether lending is refused on a machine whose direct map cannot be changed."""
        return not isinstance(self.library, NoDesign)

    # -- arguments -----------------------------------------------------------------------------------------------

    @override
    def check_fallocate(self, mode: int, offset: int, nr: int) -> None:
        """EOPNOTSUPP without KEEP_SIZE or for other bits; EINVAL unaligned, or allocating beyond the end."""
        if not mode & FALLOC_FL_KEEP_SIZE or mode & ~_MODES:
            raise SyscallFailed(EOPNOTSUPP, "fallocate", f"mode {mode:#x}")
        if offset % PAGE or nr % PAGE:
            raise SyscallFailed(EINVAL, "fallocate", f"{nr:#x} bytes at {offset:#x} are no whole pages")
        if not mode & FALLOC_FL_PUNCH_HOLE and offset + nr > self.size:
            raise SyscallFailed(EINVAL, "fallocate", f"{offset + nr:#x} is beyond the end of {self.size:#x} bytes")

    @override
    def check_mmap(self, offset: int, nr: int, shared: bool) -> None:
        """EINVAL for a private mapping."""
        if not shared:
            raise SyscallFailed(EINVAL, "mmap", "MAP_PRIVATE")

    # -- what MAP_MEM, START, VCPU_RUN and the end of a VM ask for ---------------------------------------------------

    @abstractmethod
    def bind(self, binding: Binding) -> int:
        """Let a VM have a part of it."""

    def announce(self, binding: Binding) -> int:
        """Have the hypervisor report faults on guest addresses of *binding*."""
        return 0

    @abstractmethod
    def unbind(self, binding: Binding, gfn: Gfn, nr: int) -> int:
        """Take [gfn, gfn+nr) of *binding* back: all of it, or an edge. A failure leaves the binding."""

    @abstractmethod
    def demand(self, binding: Binding, gfn: Gfn) -> int:
        """Give the guest the page at *gfn*."""

    @abstractmethod
    def make_parcel(self, binding: Binding, gfn: Gfn, nr: int) -> int | Parcelled:
        """Make [gfn, gfn+nr) ready for a memory parcel, whole folios."""

    @abstractmethod
    def parcel_is_paged(self, binding: Binding, parcel: Parcelled) -> int:
        """The VM is about to start: the parcel's folios become ordinary pages of the guest."""

    def parcel_is_not_paged(self, parcel: Parcelled) -> None:
        """The VM did not start after all."""
        return

    def parcel_has_started(self, parcel: Parcelled) -> None:
        """The VM runs: the folios are ordinary pages of the guest now."""
        self.parcelled -= {pfn_to_pa(folio.pfn) for folio in parcel.folios}

    @abstractmethod
    def parcel_is_back(self, parcel: Parcelled, lend: bool, ret: int) -> None:
        """The Resource Manager has given the folios back, or refused with *ret*: then they are kept permanently."""

    @abstractmethod
    def abandon(self, binding: Binding) -> int:
        """The VM has stopped: take everything of *binding* back, and drop the binding's reference on the file."""
