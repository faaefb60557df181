"""Use after free on the emulated machine: an inode, a VM. Who keeps what he uses beside who does not.

Source: fs/inode.c iput_final(), evict(), destroy_inode(); virt/kvm/guest_memfd.c kvm_gmem_get_file().
"""

from __future__ import annotations

from typing import Any

import pytest
from gunyah_guest import LEND, PAGE, RW, Scene, poke
from leave_out import without

from guest_memfd.core.gmem import Conversion
from guest_memfd.designs import DESIGNS, Design
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.machine.boot import Config, Machine
from guest_memfd.machine.hypcalls.vm import Vm
from guest_memfd.machine.linux.panic import KernelPanic
from guest_memfd.machine.primitives.host import EmulatedHost
from guest_memfd.machine.primitives.lifetime import LOCKS, ON_INODE
from guest_memfd.words import facts
from guest_memfd.words.outcome import Blocked
from guest_memfd.words.pagestate import ALIVE, DESTROYED, EVICTED, NO_INODE
from guest_memfd.words.primitives import PRIMITIVES, Entries, Folio, Host, Primitive, Steps

VMM, VCPU = 0, 1
"""Numbers of two tasks."""
LENT = 0xA000_0000


class Life:
    """A file of two pages, page 1 shared, bound at gfn 0 of a VM; *design* serves it."""

    def __init__(self, design: type[Design] = OurLibrary, hypervisor: str = "kvm", *, create: bool = True) -> None:
        self.machine = Machine(hypervisor, Config(ram=16 << 20))
        self.library = design(HYPERVISORS[hypervisor].ops(), 2)
        self.host = EmulatedHost(self.machine, self.machine.create_vm(2), 2)
        if create:
            assert self.host.run(self.library.create(2, (1,))) == 0
            assert self.host.run(self.library.bind(0, 0, 2)) == 0

    @property
    def life(self) -> int:
        return self.host.inode.life

    def stop(self) -> None:
        """The VM ends in order."""
        self.host.perform_by_name("vm_kill")
        assert self.host.run(self.library.vm_teardown()) == 0
        self.host.perform_by_name("vm_destroyed")

    def close(self) -> None:
        """The VMM's descriptor goes."""
        assert self.host.perform_by_name("fd_close")
        self.host.run(self.library.close())

    def gone(self, run: Any, *args: Any) -> str:
        """*run* ends the kernel by a use after free: of what."""
        with pytest.raises(KernelPanic, match="KASAN: slab-use-after-free") as panic:
            run(*args)
        (note,) = [note for note in self.host.notes if isinstance(note, facts.UseAfterFree)]
        assert self.machine.dead is panic.value
        assert f"slab-use-after-free of {note.what}" in self.machine.console[0]
        assert not any(isinstance(other, facts.Broken) for other in self.host.notes)
        assert self.machine.audit() == [f"the kernel has stopped: {panic.value}"]
        return note.what


# -- in order --------------------------------------------------------------------------------------------------------


def test_a_life_in_order() -> None:
    life = Life(create=False)
    assert life.life == NO_INODE
    assert life.host.run(life.library.create(2, (1,))) == 0
    assert (life.life, life.host.inode.evictor) == (ALIVE, None)
    assert life.host.run(life.library.bind(0, 0, 2)) == 0
    assert life.host.run(life.library.guest_fault(0, 0)) == 0
    life.close()
    assert life.life == ALIVE                                       # the binding holds the file
    life.stop()
    assert (life.life, life.host.inode.evictor) == (DESTROYED, None)
    assert life.host.inode not in life.machine.inodes
    assert life.machine.audit() == []


def test_the_last_vma_evicts_as_the_last_iput_does() -> None:
    life = Life()
    assert life.host.run(life.library.mmap()) == 0
    life.stop()
    life.close()
    assert life.life == ALIVE
    life.host.run(life.library.munmap())
    assert life.life == DESTROYED
    assert life.machine.audit() == []


class NeverDestroys(OurLibrary):
    def evict(self) -> Steps[None]:
        yield from without(super().evict(), "destroy_inode")


@pytest.mark.parametrize(("design", "lost"), [
    (OurLibrary, []), (NeverDestroys, ["the inode of a file of 0x2000 bytes has no reference, and is never destroyed"])])
def test_an_inode_that_is_never_destroyed_is_lost(design: type[Design], lost: list[str]) -> None:
    life = Life(design)
    life.stop()
    life.close()
    assert life.machine.audit() == lost


@pytest.mark.parametrize("counted", [True, False])
def test_what_is_leaked_is_lost_and_counted(counted: bool) -> None:
    life = Life()
    assert life.host.run(life.library.allocate(0, 1)) == 0
    page = life.host.inode.find(0)
    assert page is not None
    if counted:
        life.host.perform_by_name("leak_folio", Folio(page.pa // PAGE), caller="library")
    else:
        page.take("kept")
    life.stop()
    life.close()
    wrong = [] if counted else ["0 pages are counted as leaked, and there are 1"]
    assert life.machine.audit() == [f"the folio at {page.pa:#x} is never freed (kept 1)", *wrong]


@pytest.mark.parametrize("broken", [True, False])
def test_memory_that_is_broken_is_out_of_use_and_not_lost(broken: bool) -> None:
    life = Life()
    assert life.host.run(life.library.guest_fault(0, 0)) == 0
    page = life.host.inode.find(0)
    assert page is not None
    if broken:
        folio = life.host.perform_by_name("hwpoison", 0, caller="mm")
        life.host.perform_by_name("folio_put", folio, caller="mm")
    else:
        page.broken.add(page.pa)
        page.no_direct_map = True                     # nobody has reported it, and nobody puts it back
        page.take("get")
    life.stop()
    life.close()
    hole = f"{page.pa:#x} is not in the direct map"
    assert not life.machine.linear_map.kernel_page_present(page.pa)
    assert life.machine.audit() == ([] if broken else [f"the folio at {page.pa:#x} is never freed (get 1)", hole])


# -- after the end ---------------------------------------------------------------------------------------------------

USES = {
    "down_read": ("invalidate",), "down_read_trylock": ("invalidate",), "up_read": ("invalidate",),
    "down_write": ("invalidate",), "up_write": ("invalidate",), "filemap_get_folio": (0,), "filemap_find_folio": (0, 2),
    "filemap_add_folio": (0, 0), "filemap_add_pages": (0, 1), "filemap_insert_folio": (0, Folio(0)),
    "filemap_remove_folio": (Folio(0),),
    "split_folio": (Folio(0, 1),), "merge_folio": (0, 1), "tree_load": ("attributes", 0, 1),
    "tree_store": ("bindings", 0, Entries(1, 1)), "tree_store_reserved": ("bindings", 0, Entries(0, 1)),
    "tree_reserve": ("attributes", 0, 1), "tree_release": ("attributes",), "unmap_mapping_pages": (0, 2),
    "vmf_insert_folio": (0, Folio(0)), "iput": (), "destroy_inode": (), "mapping_set_no_direct_map": (),
    "mapping_no_direct_map": (),
}
"""Everything that works on an inode, with arguments that would do."""


def test_everything_that_works_on_an_inode_is_tried() -> None:
    assert set(USES) == ON_INODE | LOCKS
    assert set(USES) <= PRIMITIVES


@pytest.mark.parametrize("name", USES)
def test_nobody_may_use_an_inode_that_is_destroyed(name: str) -> None:
    life = Life()
    life.stop()
    life.close()
    assert life.life == DESTROYED
    assert life.gone(lambda: life.host.perform_by_name(name, *USES[name], caller="library")) == f"the inode, in {name}"


@pytest.mark.parametrize("name", USES)
def test_only_the_evictor_may_use_an_inode_that_is_evicted(name: str) -> None:
    life = Life()
    life.stop()
    assert life.host.perform_by_name("fd_close")
    assert life.host.perform(Primitive("fput", (), "library"), VMM)
    assert life.host.perform(Primitive("iput", (), "library"), VMM)
    assert (life.life, life.host.inode.evictor) == (EVICTED, VMM)
    other = Primitive(name, USES[name], "library")
    assert life.gone(lambda: life.host.perform(other, VCPU)) == f"the inode, in {name}"


def test_the_evictor_goes_on_to_the_end() -> None:
    life = Life()
    life.stop()
    assert life.host.perform_by_name("fd_close")
    life.host.run(life.library.close(), VCPU)                       # whoever drops the last one
    assert life.life == DESTROYED
    assert life.machine.audit() == []


def test_what_is_no_part_of_the_inode_may_be_used() -> None:
    life = Life(DESIGNS["gunyah-v17"], "gunyah")
    life.close()
    life.stop()
    assert life.life == DESTROYED
    perform = life.host.perform_by_name
    assert perform("get_file", caller="library") is False           # a file is found gone, and not touched
    assert list(perform("tree_load", "provided", 0, 2)) == [0, 0]     # v17's tree and its lock are in the VM
    perform("down_read", "bindings")
    with pytest.raises(Blocked):
        perform("freeze_processes", caller="mm")
    perform("up_read", "bindings")
    perform("freeze_processes", caller="mm")


def test_a_file_reference_that_is_not_there_is_a_bug() -> None:
    life = Life()
    life.stop()
    life.close()
    with pytest.raises(KernelPanic, match="fput of a file without references"):
        life.host.perform_by_name("fput", caller="library")


@pytest.mark.parametrize(("left", "why"), [
    ("a reference", "destroy_inode of an inode that is in use"),
    ("a page", "destroy_inode of an inode whose page cache is not empty"),
    ("a lock", "destroy_inode of an inode whose invalidate_lock is held")])
def test_an_inode_is_destroyed_when_nothing_is_left_in_it(left: str, why: str) -> None:
    life = Life()
    assert life.host.run(life.library.allocate(0, 1)) == 0
    life.stop()
    if left == "a lock":
        assert life.host.run(life.library.punch_hole(0, 1)).ret == 0
        life.host.perform_by_name("down_read", "invalidate", caller="library")
    if left != "a reference":
        life.host.perform_by_name("fd_close")
        life.host.perform_by_name("fput", caller="library")
        assert life.host.perform_by_name("iput", caller="library")
    with pytest.raises(KernelPanic, match=why):
        life.host.perform_by_name("destroy_inode", caller="library")


# -- two tasks -------------------------------------------------------------------------------------------------------


def bare_fault(host: Host) -> Steps[str]:
    """A vCPU that comes by a memslot's pointer, and takes it for a reference."""
    yield from host.guest_access(0, True)
    yield from host.down_read("invalidate")
    hit = yield from host.filemap_get_folio(0)
    yield from host.up_read("invalidate")
    return "hit" if hit else "none"


def held_fault(host: Host) -> Steps[str]:
    """As kvm_gmem_get_pfn(): get_file_active() first."""
    yield from host.guest_access(0, True)
    if not (yield from host.get_file()):
        return "no file"
    yield from host.down_read("invalidate")
    yield from host.up_read("invalidate")
    return "file"


@pytest.mark.parametrize("last", ["unbind", "close"])
def test_a_vcpu_that_does_not_hold_the_file_finds_it_gone(last: str) -> None:
    for fault in (held_fault, bare_fault):
        life = Life()
        vcpu = fault(Host("library"))
        life.host.perform(next(vcpu), VCPU)                         # it has faulted
        if last == "close":
            assert life.host.run(life.library.unbind(0, 2)) == (0, None)
            life.close()
        else:
            life.close()
            assert life.host.run(life.library.unbind(0, 2)) == (0, None)
        assert life.life == DESTROYED
        primitive = vcpu.send("fault")
        if fault is bare_fault:
            assert life.gone(lambda: life.host.perform(primitive, VCPU)) == "the inode, in down_read"  # noqa: B023
        else:
            assert life.host.perform(primitive, VCPU) is False
            with pytest.raises(StopIteration, match="no file"):
                vcpu.send(False)


class UnlocksLate(OurLibrary):
    """Drops the last reference before the lock that is in what it kept."""

    def unbind(self, start: int, nr: int) -> Steps[Conversion]:
        yield from self.host.down_write("invalidate")
        result, last = yield from self.unbind_locked(start, nr, "unbind")
        if last:
            yield from self.close()
        yield from self.host.up_write("invalidate")
        return result


def test_a_lock_goes_with_what_it_is_in() -> None:
    kept = Life()
    kept.close()
    assert kept.host.run(kept.library.unbind(0, 2)) == (0, None)
    held = Life(UnlocksLate)
    assert held.host.run(held.library.unbind(0, 2)) == (0, None)    # the descriptor keeps it there
    late = Life(UnlocksLate)
    late.close()
    with pytest.raises(Blocked):                                    # it evicts under a lock that it still has
        late.host.run(late.library.unbind(0, 2))


# -- VMs -------------------------------------------------------------------------------------------------------------


def test_a_vm_that_is_gone_answers_no_hypercall() -> None:
    life = Life()
    assert life.host.run(life.library.guest_fault(0, 0)) == 0
    page = life.host.inode.find(0)
    assert page is not None
    unmap = Primitive("hyp_call", ("mmu_unmap", 0, Folio(page.pa // PAGE)), "kvm")
    life.host.perform_by_name("vm_kill")
    assert life.host.perform(unmap, VMM) == 0                       # dying is not gone
    life.host.perform_by_name("vm_destroyed")
    assert life.gone(lambda: life.host.perform(unmap, VMM)) == "the VM, in hypercall"


def test_a_binding_that_outlives_its_vm_leads_to_freed_memory() -> None:
    for orderly in (True, False):
        life = Life()
        life.host.perform_by_name("vm_kill")
        if orderly:
            assert life.host.run(life.library.vm_teardown()) == 0
        life.host.perform_by_name("vm_destroyed")
        if orderly:
            assert life.host.run(life.library.punch_hole(0, 2)) == (0, None)    # nothing is bound: nobody to tell
            assert not life.host.vm.begun.total()
        else:
            what = life.gone(lambda: life.host.run(life.library.punch_hole(0, 2)))  # noqa: B023
            assert what == "the VM, in gmem_invalidate_begin"


def test_an_invalidation_ends_before_its_vm_does() -> None:
    life = Life()
    life.host.perform_by_name("gmem_invalidate_begin", 0, 2, caller="library")
    life.host.perform_by_name("vm_kill")
    life.host.perform_by_name("vm_destroyed")
    what = life.gone(lambda: life.host.perform_by_name("gmem_invalidate_end", caller="library"))
    assert what == "the VM, in gmem_invalidate_end"


def test_an_invalidation_that_nobody_ended_stays_one() -> None:
    life = Life()
    life.host.perform(Primitive("gmem_invalidate_begin", (0, 2), "library"), VCPU)
    life.stop()
    life.close()                                                    # has an end, too, and no VM to say it to
    assert life.host.vm.begun == {VCPU: 1, VMM: 0}


# -- a device --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("design", ["library", "gunyah-v17"])
def test_a_file_that_only_its_binding_keeps_comes_back_with_the_vm(design: str, running: bool) -> None:
    scene = Scene(design)
    file = scene.device.create_guest_mem(2 * PAGE)
    scene.vm.map_mem(file, LENT, 0, 2 * PAGE, LEND | RW)
    poke(file, 1)
    if running:
        scene.vm.start()
        assert scene.read(LENT) == 1
    file.close()
    assert file.host.inode.life == ALIVE
    scene.close()
    assert file.host.inode.life == DESTROYED
    assert scene.machine.audit() == []


@pytest.mark.parametrize("break_it", [
    lambda machine: EmulatedHost(machine, Vm(None, 0), 1).die("for a test"),
    lambda machine: EmulatedHost(machine, Vm(None, 0), 1).gone("for a test"),
    lambda machine: machine.cpu.call("plain_read", 0xFFFF_8000_DEAD_0000),
], ids=["BUG", "KASAN", "oops"])
def test_a_panic_says_that_it_is_emulated(break_it: Any) -> None:
    with pytest.raises(KernelPanic) as died:
        break_it(Machine("kvm", Config(ram=32 << 20)))
    assert "Hardware name: emulated machine of guest-memfd" in died.value.text
