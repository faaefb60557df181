"""What has to be there for a primitive: the module whose code runs, and the inode it works on. It is asked before
anything is done, and what is not there ends the kernel.

The life of an inode (fs/inode.c). iput() of the last reference hands it to the task that dropped it: that task evicts it,
and no one else may use it meanwhile, as no one else can have held it. destroy_inode() frees its memory; from then on no
one may. A VM's end is seen where it is used (guest.py), a folio's where its struct page is looked up (base.py).
get_file() may be called on a pointer to a file that is gone: the slab of files is never given back
(SLAB_TYPESAFE_BY_RCU, fs/file_table.c).
"""

from __future__ import annotations

from guest_memfd.machine.linux.inode import OF_VM
from guest_memfd.machine.primitives.base import Base
from guest_memfd.words.pagestate import DESTROYED, EVICTED
from guest_memfd.words.primitives import Primitive

ON_INODE = frozenset({
    "filemap_get_folio", "filemap_find_folio", "filemap_add_folio", "filemap_add_pages",
    "filemap_insert_folio", "filemap_remove_folio", "tree_load", "tree_store",
    "tree_store_reserved", "tree_reserve", "tree_release", "unmap_mapping_pages", "vmf_insert_folio", "iput",
    "destroy_inode", "mapping_set_no_direct_map", "mapping_no_direct_map", "split_folio", "merge_folio",
})
"""Primitives that read or write an inode, or what is kept in it."""

LOCKS = frozenset({"down_read", "down_read_trylock", "up_read", "down_write", "up_write"})
"""Primitives that do so when the lock is the inode's, ``invalidate``."""

def works_on_inode(primitive: Primitive) -> bool:
    """Whether *primitive* touches the memory of the inode."""
    if primitive.name in LOCKS:
        return bool(primitive.args[0] == "invalidate")
    if primitive.name.startswith("tree_"):
        # "bindings" v17 keeps in the VM, too, and the library does not.
        of_a_vm = primitive.args[0] in OF_VM or (primitive.args[0] == "bindings" and primitive.caller != "library")
        return not of_a_vm
    return primitive.name in ON_INODE


def must_be_there(host: Base, primitive: Primitive) -> None:
    """End the kernel if the code of *primitive*, or the inode it works on, is gone."""
    # The caller is the module whose text runs; after an unload that text is not there any more.
    if host.machine.unloaded and primitive.caller == host.machine.module.name:
        host.die(f"call into module {primitive.caller}, which has been unloaded ({primitive.name})")
    inode = host.inode
    if (inode.life in (EVICTED, DESTROYED) and works_on_inode(primitive) and inode.evictor != host.who
            and not _keeps_a_folio(host)):
        host.gone(f"the inode, in {primitive.name}")


# truncate_inode_pages_final() waits for the folio lock, so who has a folio of the file locked has the inode, too.
def _keeps_a_folio(host: Base) -> bool:
    return host.inode.life == EVICTED and any(page.lock == host.who for page in host.inode.pages.values())
