"""The start of a VM under /dev/gunyah, memory running out, the module."""

from __future__ import annotations

from collections.abc import Callable
from errno import (
    E2BIG,
    EBADMSG,
    EBUSY,
    EINVAL,
    ENODEV,
    ENOENT,
    ENOMEM,
    EPERM,
)
from itertools import count
from typing import Any

import pytest
from gunyah_files import DESIGNS, LENT, MAGIC, SHARED, errno_of, nothing_is_lost
from gunyah_guest import DTB_PAGE, LEND, PAGE, RAM, RW, RWX, SHARE, Scene, peek, poke

from guest_memfd.errors import Signalled, SyscallFailed
from guest_memfd.machine.boot import Config, Machine
from guest_memfd.machine.el2.gunyah.rm.errors import RmError, remap
from guest_memfd.machine.el2.gunyah.rm.lifecycle import VmState
from guest_memfd.machine.el2.gunyah.rm.payloads import Id
from guest_memfd.machine.linux.module import DIRECT_MAP_EXPORTS, Loader, Module, ModuleImage
from guest_memfd.machine.linux.panic import KernelPanic
from guest_memfd.uapi import gunyah as u


@pytest.fixture(params=DESIGNS)
def design(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def scene(design: str) -> Scene:
    return Scene(design)


# -- START -------------------------------------------------------------------------------------------------------------


def test_start_twice(scene: Scene) -> None:
    scene.vm.start()
    scene.vm.start()
    nothing_is_lost(scene)


@pytest.mark.parametrize(("where", "size", "expected"), [
    (RAM, 0, EINVAL), (RAM, PAGE - 1, EINVAL), (RAM - PAGE, PAGE, ENOENT), (RAM + 15 * PAGE, 2 * PAGE, ENOENT)])
def test_start_without_a_device_tree(scene: Scene, where: int, size: int, expected: int) -> None:
    scene.vm.set_dtb_config(where, size)
    assert errno_of(scene.vm.start) == expected
    assert scene.vm.status == VmState.LOAD
    assert errno_of(scene.vm.start) == ENODEV
    assert errno_of(scene.vcpu.run) == ENODEV
    scene.vm.set_dtb_config(RAM, PAGE)
    nothing_is_lost(scene)


STEPS = {
    Id.VM_ALLOC_VMID: VmState.NO_STATE, Id.MEM_LEND: VmState.LOAD, Id.VM_CONFIG_IMAGE: VmState.LOAD,
    Id.VM_SET_DEMAND_PAGING: VmState.LOAD, Id.VM_SET_ADDRESS_LAYOUT: VmState.LOAD, Id.VM_INIT: VmState.INIT_FAILED,
    Id.VM_SET_BOOT_CONTEXT: VmState.READY, Id.VM_GET_HYP_RESOURCES: VmState.READY, Id.VM_START: VmState.READY,
}
"""Message, and the status that its failure leaves."""
CONFIGURED = [*STEPS][3:]


def refuse(scene: Scene, message: Id, error: RmError) -> None:
    """The Resource Manager answers the next request of this kind with *error*, having done nothing."""
    client = scene.vm.rm
    call = client.call

    def refusing(message_id: int, body: bytes) -> tuple[int, bytes]:
        if message_id == message:
            client.call = call                                  # type: ignore[method-assign]
            return remap(error), b""
        return call(message_id, body)

    client.call = refusing                                      # type: ignore[method-assign]


@pytest.mark.parametrize("error", [RmError.NOMEM, RmError.DENIED, RmError.VM_STATE])
@pytest.mark.parametrize("message", STEPS, ids=lambda message: message.name)
def test_vm_start_fails(scene: Scene, message: Id, error: RmError) -> None:
    refuse(scene, message, error)
    expected = {RmError.NOMEM: ENOMEM, RmError.DENIED: EPERM, RmError.VM_STATE: EBADMSG}[error]
    assert errno_of(scene.vm.start) == expected
    assert scene.vm.status == STEPS[message]
    if message == Id.VM_ALLOC_VMID:
        scene.vm.start()
        assert scene.read(RAM + 8 * PAGE) == int.from_bytes(b"\xd0\x0d\xfe\xed", "little")
        nothing_is_lost(scene)
        return
    assert errno_of(scene.vm.start) == ENODEV
    scene.close()
    if scene.design == "gunyah-v17" and message in CONFIGURED:
        # The parcel is the image of a VM, and is refused before the reset that would make it free: kept for ever.
        lost = scene.machine.audit()
        assert any("is never freed" in line for line in lost)
        assert any("is not in the direct map" in line for line in lost)
    else:
        assert scene.machine.audit() == []


@pytest.mark.parametrize("message", CONFIGURED, ids=lambda message: message.name)
def test_memory_of_a_vm_that_did_not_start(message: Id) -> None:
    scene = Scene("library")
    refuse(scene, message, RmError.NOMEM)
    assert errno_of(scene.vm.start) == ENOMEM
    where = DTB_PAGE * PAGE
    assert errno_of(scene.ram.mmap) == errno_of(scene.ram.punch_hole, where, PAGE) == EBUSY
    unmap = LEND | RWX | u.MapFlag.UNMAP
    assert errno_of(scene.vm.map_mem, scene.ram, RAM, 0, 16 * PAGE, unmap) == EBUSY
    scene.vcpu.close()
    scene.vm.close()
    assert peek(scene.ram, where) == int.from_bytes(b"\xd0\x0d\xfe\xed", "little")
    nothing_is_lost(scene)


def test_more_ranges_than_a_message_holds(scene: Scene) -> None:
    file = scene.memory(1000 * PAGE)
    for at in range(1000):
        scene.vm.map_mem(file, LENT + 2 * at * PAGE, at * PAGE, PAGE, LEND | RW)
    assert errno_of(scene.vm.start) == E2BIG


def test_shared_device_tree_above_the_devices() -> None:
    scene = Scene("library", ram_access=SHARE)
    scene.vm.start()
    assert peek(scene.ram, DTB_PAGE * PAGE) == int.from_bytes(b"\xd0\x0d\xfe\xed", "little")
    nothing_is_lost(scene)


def test_a_file_offset_that_is_not_that_of_the_binding(design: str) -> None:
    scene = Scene(design)
    file = scene.memory(16 * PAGE)
    scene.vm.map_mem(file, LENT, 8 * PAGE, 8 * PAGE, LEND | RWX)
    scene.vm.set_dtb_config(LENT + PAGE, PAGE)
    if design == "library":
        scene.vm.start()
        nothing_is_lost(scene)
    else:                                                       # S16
        with pytest.raises(KernelPanic, match="error pointer"):
            scene.vm.start()
        with pytest.raises(KernelPanic, match="error pointer"):     # there is no kernel any more
            poke(file, MAGIC)
        scene.close()
        assert scene.machine.audit() == [f"the kernel has stopped: {scene.machine.dead}"]


# -- memory runs out ---------------------------------------------------------------------------------------------------


def life(scene_of: Callable[[], Scene], fail: Callable[[Machine], None]) -> tuple[Scene, list[int]]:
    """A life up to its end in which one allocation fails, after the machine has booted: the errnos that came."""
    seen: list[int] = []
    scene = scene_of()
    fail(scene.machine)

    def attempt(what: Callable[..., Any], *args: Any) -> Any:
        for _ in range(2):                                      # what failed for want of memory works when there is some
            try:
                return what(*args)
            except SyscallFailed as failed:
                seen.append(failed.errno)
            except Signalled:
                seen.append(ENOMEM)
        return None

    lent = attempt(scene.memory, 2 * PAGE)
    shared = attempt(scene.memory, PAGE)
    attempt(scene.vm.map_mem, lent, LENT, 0, 2 * PAGE, LEND | RW)
    attempt(scene.vm.map_mem, shared, SHARED, 0, PAGE, SHARE | RW)
    attempt(poke, lent, MAGIC)
    attempt(scene.vm.start)
    if scene.vm.status == VmState.RUNNING:
        for where in (LENT, LENT + PAGE, SHARED):
            got = attempt(scene.write, where, MAGIC)
            if isinstance(got, u.PageFaultExit):
                seen.append(-got.attempt)
                got = scene.write(where, MAGIC)
            elif isinstance(got, u.MmioExit):                   # a device is what it looks like without the page
                seen.append(ENOMEM)
                scene.vcpu.page.mmio.resume_action = u.ResumeAction.RETRY
                got = scene.write(where, MAGIC)
            assert got == 0
        assert scene.unlock(LENT, PAGE) in (0, 10)
        attempt(lent.punch_hole, 0, PAGE)
        attempt(shared.punch_hole, 0, PAGE)
    return scene, seen


def sources() -> dict[str, Callable[[Machine, int | None], None]]:
    return {
        "kernel": lambda machine, n: machine.kernel_pages.fail_at(n),
        "el2": lambda machine, n: machine.el2_pool.fail_at(n),
        "slab": lambda machine, n: machine.fail_slab_at(n),
    }


@pytest.mark.parametrize("source", sources())
def test_memory_runs_out(design: str, source: str) -> None:
    """At every allocation of a life, its end included, in turn."""
    fail = sources()[source]
    failed: set[int] = set()
    for n in count():
        scene, seen = life(lambda: Scene(design), lambda machine: fail(machine, n))  # noqa: B023
        scene.close()
        lost = scene.machine.audit()
        if design == "library" or ENODEV not in seen:
            assert lost == [], n
        elif lost:                                              # the parcel of a VM that did not start, as above
            assert sum("is never freed" in line for line in lost) == 1
        failed |= set(seen)
        if pending(scene.machine, source):
            break
    assert n > 5
    # ENODEV: a second START after one that failed. EBUSY: punching one page of two (S4).
    assert {ENOMEM} <= failed <= {ENOMEM, ENODEV} | ({EBUSY} if design == "gunyah-v17" else set())


def pending(machine: Machine, source: str) -> bool:
    """Whether the allocation that was to fail has not come."""
    return {"kernel": machine.kernel_pages.pending, "el2": machine.el2_pool.pending, "slab": machine.slab_pending}[source]


@pytest.mark.parametrize("source", ["kernel", "el2"])
def test_memory_runs_out_while_the_vm_ends(source: str) -> None:
    fail = sources()[source]
    for n in count():
        scene, seen = life(lambda: Scene("library"), lambda machine: None)
        assert seen == []
        fail(scene.machine, n)
        scene.close()
        assert scene.machine.audit() == [], n
        if pending(scene.machine, source):
            break


# -- the module --------------------------------------------------------------------------------------------------------


V17_IMPORTS = tuple(export.name for export in DIRECT_MAP_EXPORTS)


def test_the_posted_module_does_not_load() -> None:
    machine = Machine("gunyah", Config(ram=64 << 20))
    image = ModuleImage("gunyah-v17", imports=V17_IMPORTS)
    assert machine.modules.load(image) == -ENOENT
    assert any("Unknown symbol can_set_direct_map" in line for line in machine.modules.log)
    assert "gunyah_v17" not in machine.modules.modules


def test_the_posted_module_loads_with_patch_19() -> None:
    loader = Loader(direct_map_exports=True)
    assert isinstance(loader.load(ModuleImage("gunyah-v17", imports=V17_IMPORTS)), Module)


def test_the_module_goes_only_when_nobody_uses_it(scene: Scene) -> None:
    machine = scene.machine
    assert machine.modules.delete("gunyah") != 0
    nothing_is_lost(scene)
    assert machine.modules.delete("gunyah") == 0
