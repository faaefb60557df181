"""The guest_memfd library: what a hypervisor's driver, its VMM and the kernel call, and the steps that it takes.

Each is a procedure of the module that it is taken from. A design is a subclass that has something else in one of these
places (docs/write-a-design.md), so this list is the design space.
"""

from __future__ import annotations

from guest_memfd.core import convert, direct_map, fault, file, folio, invalidate, large
from guest_memfd.core import power as pm
from guest_memfd.core.gmem import PowerPolicy
from guest_memfd.core.ops import GuestMemfdOps
from guest_memfd.words.primitives import Host, Splits
from guest_memfd.words.units import Index

LEAF_ORDERS = (9, 18)
"""Of leaves for which a table can stand: 2 MiB and 1 GiB, with pages of 4 KiB."""


class Library:
    """One file of *size* pages whose guest is served by *ops*; it keeps no state of its own."""

    order = 0
    """Of all its folios."""

    splits = False
    """Whether folios may be split, and smaller ones be used where one of `order` cannot be had."""

    no_direct_map = True
    """Whether private pages leave the direct map: then the kernel must be able to do that, and who reads page-cache folios
    through it is turned away (AS_NO_DIRECT_MAP)."""

    power: PowerPolicy = "notifier"

    def __init__(self, ops: GuestMemfdOps, size: int) -> None:
        self.host = Host("library")
        self.ops = ops
        self.size = size

    def has(self, start: Index, nr: int) -> bool:
        """Whether [start, start+nr) is a range of the file."""
        return start >= 0 and nr > 0 and start + nr <= self.size

    def whole(self, *numbers: int) -> bool:
        """Whether all *numbers* (page indexes, lengths, gfns) are multiples of a folio's size."""
        return not any(number % (1 << self.order) for number in numbers)

    def most_split(self) -> Splits:
        """How many leaves of 2 MiB and of 1 GiB this file can have split at most, wherever its folios lie in memory.

        Of the direct map: ever, if each page is allocated once, as its leaves are not made large again. Of stage 2: at a
        time, as what becomes whole again can be split again.
        """
        folios = -(-self.size >> self.order)
        larger = sum(folios for size in LEAF_ORDERS if size > self.order)
        cut = sum(-(-self.size >> size) for size in LEAF_ORDERS if size <= self.order) if self.splits else 0
        return Splits(larger + cut, larger + cut, cut)

    # -- operations --------------------------------------------------------------------------------------------------

    create = file.create
    bind = file.bind
    unbind = file.unbind
    vm_teardown = file.vm_teardown
    mmap = file.mmap
    munmap = file.munmap
    close = file.close
    evict = file.evict
    guest_fault = fault.guest_fault
    user_fault = fault.user_fault
    allocate = fault.allocate
    make_private = convert.make_private
    make_shared = convert.make_shared
    punch_hole = invalidate.punch_hole
    error_folio = invalidate.error_folio
    hibernate_prepare = pm.hibernate_prepare
    hibernate_post = pm.hibernate_post

    # -- their steps -------------------------------------------------------------------------------------------------

    alloc_inode = file.alloc_inode
    init_attributes = file.init_attributes
    split_to_bind = file.split_to_bind
    teardown_bindings = file.teardown_bindings
    unbind_locked = file.unbind_locked
    take_all_back = file.take_all_back
    take_parts_back = file.take_parts_back
    fault_bound = fault.fault_bound
    give_private = fault.give_private
    fault_shared = fault.fault_shared
    make_accessible = fault.make_accessible
    make_private_locked = convert.make_private_locked
    check_and_commit_private = convert.check_and_commit_private
    unexpected_refs = convert.unexpected_refs
    make_shared_locked = convert.make_shared_locked
    give_to_host = convert.give_to_host
    remove_range = invalidate.remove_range
    take_from_users = invalidate.take_from_users
    single_pages = large.single_pages
    split = large.split
    split_locked = large.split_locked
    merge = large.merge

    # -- of one folio ------------------------------------------------------------------------------------------------

    grab_folio = folio.grab_folio
    add_folio = folio.add_folio
    order_at = folio.order_at
    zero = folio.zero
    unlock_and_put = folio.unlock_and_put
    present = folio.present
    put_all = folio.put_all
    invalidate_guest = folio.invalidate_guest
    remove_folio = folio.remove_folio
    return_to_kernel = folio.return_to_kernel
    take_back = folio.take_back
    leak = folio.leak
    zap = direct_map.zap
    zap_noflush = direct_map.zap_noflush
    flush = direct_map.flush
    restore = direct_map.restore
    account = pm.account
