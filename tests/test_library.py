"""The library's operations one by one: results, errno, what they leave - and each with every failure in turn."""

from __future__ import annotations

from collections.abc import Callable
from errno import EAGAIN, EBUSY, EEXIST, EFAULT, EINVAL, ENODEV, ENOENT, ENOMEM
from typing import Any

import pytest
from driver import Bench

from guest_memfd.core.gmem import Conversion
from guest_memfd.core.ops import GuestMemfdOps
from guest_memfd.designs import Design
from guest_memfd.errors import EHWPOISON
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.scenarios import TEARDOWN
from guest_memfd.words.facts import StrayGuest
from guest_memfd.words.pagestate import CONTENTS, SHARED_PAGE
from guest_memfd.words.primitives import Host, Steps

ALL = pytest.mark.parametrize("hypervisor", ["kvm", "pkvm", "gunyah"])
GUEST, USER, MM = Host("guest"), Host("user"), Host("mm")


def touch(gfn: int) -> Callable[[Design], Steps[Any]]:
    def steps(lib: Design) -> Steps[Any]:
        if (yield from GUEST.guest_access(gfn, True)) == "fault":
            ret = yield from lib.guest_fault(gfn, gfn)
            return ret or (yield from GUEST.guest_access(gfn, True))
        return 0
    return steps


def user_write(index: int) -> Callable[[Design], Steps[Any]]:
    def steps(lib: Design) -> Steps[Any]:
        seen = yield from USER.user_access(index, True)
        if seen == "fault":
            seen = yield from lib.user_fault(index)
            if seen == "ok":
                seen = yield from USER.user_access(index, True)
        return seen
    return steps


def mapped_write(lib: Design) -> Steps[Any]:
    if not (yield from lib.mmap()):
        yield from user_write(1)(lib)
        yield from lib.munmap()


def end(bench: Bench) -> None:
    bench.do(lambda lib: TEARDOWN.procedure(lib, bench.hypervisor))
    assert bench.evidence() == []
    assert bench.at_end() == []


@ALL
def test_private_page_leaves_the_host(hypervisor: str) -> None:
    bench = Bench(hypervisor)
    assert bench.do(touch(0)) == "ok"
    frame = bench.state.frame(0)
    assert (frame.s1, frame.stale, frame.no_direct_map, frame.gmap) == (0, 0, 1, 1)
    assert frame.s2 == (hypervisor == "kvm")
    assert CONTENTS[frame.content] == "secret"
    assert bench.do(lambda lib: lib.mmap()) == 0
    assert bench.do(user_write(0)) == "SIGBUS"
    bench.do(lambda lib: lib.munmap())
    end(bench)


@ALL
def test_shared_page_serves_both(hypervisor: str) -> None:
    bench = Bench(hypervisor)
    assert bench.do(lambda lib: lib.mmap()) == 0
    assert bench.do(user_write(1)) == "ok"
    assert bench.do(touch(1)) == "ok"
    frame = bench.state.frame(0)
    assert (frame.s1, frame.s2, frame.user, frame.gmap, frame.no_direct_map) == (1, 1, 2, 2, 0)
    bench.do(lambda lib: lib.munmap())
    end(bench)


def test_a_stale_tlb_entry_is_hit_before_the_table_is_walked() -> None:
    bench = Bench("gunyah")
    state = bench.state
    state.frame(0).gmap = state.frame(1).gstale = 1
    bench.shared = state.save()
    bench.do(lambda lib: GUEST.guest_access(0, True))
    assert [note.pfn for note in bench.notes if isinstance(note, StrayGuest)] == [1]


@ALL
def test_conversion_keeps_contents(hypervisor: str) -> None:
    bench = Bench(hypervisor)
    bench.do(lambda lib: lib.mmap())
    bench.do(user_write(1))
    assert bench.do(lambda lib: lib.make_private(1, 1)) == Conversion(0)
    assert bench.do(user_write(1)) == "SIGBUS"
    assert bench.do(touch(1)) == "ok"
    bench.do(lambda lib: GUEST.guest_consents(1))
    assert bench.do(lambda lib: lib.make_shared(1, 1)) == Conversion(0)
    assert bench.do(user_write(1)) == "ok"
    bench.do(lambda lib: lib.munmap())
    end(bench)


@pytest.mark.parametrize("hypervisor", ["pkvm", "gunyah"])
def test_guest_that_holds_on_refuses(hypervisor: str) -> None:
    bench = Bench(hypervisor)
    bench.do(touch(0))
    for attempt in (lambda lib: lib.make_shared(0, 2), lambda lib: lib.punch_hole(0, 2), lambda lib: lib.unbind(0, 2)):
        assert bench.do(attempt) == Conversion(-EBUSY, 0)
    assert CONTENTS[bench.state.frame(0).content] == "secret"
    end(bench)


@ALL
def test_reference_refuses_with_its_page(hypervisor: str) -> None:
    bench = Bench(hypervisor)
    bench.do(lambda lib: lib.mmap())
    bench.do(user_write(1))

    def pin(lib: Design) -> Steps[Any]:
        folio = yield from MM.gup_read_pte(1)
        assert folio is not None
        yield from MM.gup_try_get(folio)
        yield from MM.gup_recheck(1, folio, False)
        return folio

    folio = bench.do(pin)
    assert bench.do(lambda lib: lib.make_private(0, 2)) == Conversion(-EAGAIN, 1)
    assert bench.state.page(1).attr == SHARED_PAGE
    bench.do(lambda lib: MM.unpin(folio, False))
    assert bench.do(lambda lib: lib.make_private(0, 2)) == Conversion(0)
    bench.do(lambda lib: lib.munmap())
    end(bench)


@ALL
def test_punch_frees_and_the_next_touch_is_zero(hypervisor: str) -> None:
    bench = Bench(hypervisor)
    assert bench.do(touch(1)) == "ok"
    assert bench.do(lambda lib: lib.punch_hole(0, 2)) == Conversion(0)
    assert bench.state.page(1).cached == 0
    assert bench.do(touch(1)) == "ok"
    end(bench)


@ALL
def test_bad_arguments(hypervisor: str) -> None:
    bench = Bench(hypervisor)
    assert bench.do(lambda lib: lib.create(0)) == -EINVAL
    assert bench.do(lambda lib: lib.create(2, (2,))) == -EINVAL
    assert bench.do(lambda lib: lib.bind(0, 0, 3)) == -EINVAL
    assert bench.do(lambda lib: lib.bind(0, -1, 1)) == -EINVAL
    assert bench.do(lambda lib: lib.bind(5, 1, 1)) == -EEXIST
    assert bench.do(lambda lib: lib.guest_fault(1, 0)) == -EFAULT
    assert bench.do(lambda lib: lib.user_fault(2)) == "SIGBUS"
    assert bench.do(lambda lib: lib.unbind(0, 2)) == Conversion(0)
    assert bench.do(lambda lib: lib.unbind(0, 2)) == Conversion(-ENOENT)
    end(bench)


@ALL
def test_poisoned_page_is_not_given_out(hypervisor: str) -> None:
    bench = Bench(hypervisor)
    bench.do(touch(1))
    folio = bench.do(lambda lib: MM.hwpoison(1), takes=1)
    locked = bench.do(lambda lib: MM.lock_folio(folio))
    assert bench.do(lambda lib: lib.error_folio(folio, locked)) == "delayed"
    bench.do(lambda lib: MM.unlock_folio(folio))
    bench.do(lambda lib: MM.folio_put(folio))
    assert bench.do(lambda lib: lib.guest_fault(1, 1)) == -EHWPOISON
    end(bench)


@ALL
def test_hibernation_by_notifier(hypervisor: str) -> None:
    bench = Bench(hypervisor)
    assert bench.do(lambda lib: lib.hibernate_prepare()) == 0
    assert bench.do(lambda lib: lib.guest_fault(0, 0)) == -EAGAIN
    assert bench.do(lambda lib: lib.make_private(1, 1)) == Conversion(0)     # nothing is there to leave
    bench.do(lambda lib: lib.hibernate_post())
    assert bench.do(touch(0)) == "ok"
    assert bench.do(lambda lib: lib.hibernate_prepare()) == -EBUSY
    end(bench)


def test_module_that_is_gone() -> None:
    bench = Bench("gunyah", opened=False)
    state = bench.state
    state.module, state.unloaded = 0, 1
    bench.shared = state.save()
    assert bench.do(lambda lib: lib.create(2)) == -ENODEV


OPERATIONS: dict[str, tuple[Callable[[Design], Steps[Any]], ...]] = {
    "allocate": (lambda lib: lib.allocate(0, 2),),
    "private fault": (touch(0),),
    "shared fault": (touch(1),),
    "user fault": (mapped_write,),
    "to private": (touch(1), lambda lib: lib.make_private(0, 2), touch(1)),
    "to shared": (touch(0), lambda lib: GUEST.guest_consents(0), lambda lib: lib.make_shared(0, 2), touch(0)),
    "punch": (touch(0), touch(1), lambda lib: GUEST.guest_consents(0), lambda lib: lib.punch_hole(0, 2)),
    "unbind": (touch(0), touch(1), lambda lib: GUEST.guest_consents(0), lambda lib: lib.unbind(0, 2)),
    "to and fro": (touch(1), lambda lib: lib.make_private(1, 1), lambda lib: lib.make_shared(1, 1), touch(1)),
}


@ALL
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_failure_in_turn(hypervisor: str, name: str) -> None:
    """Fail the first thing that can fail, then the second, until an attempt meets no failure; nothing may be lost."""
    for nth in range(100):
        bench = Bench(hypervisor)
        bench.fail_at = nth
        for operation in OPERATIONS[name]:
            bench.do(operation)
        failed = bench.failed
        bench.fail_at = -1
        end(bench)
        if not failed:
            assert nth
            return
    raise AssertionError("more than 100 failures")


@ALL
@pytest.mark.parametrize("what", ["create", "bind"])
def test_every_failure_of_creation(hypervisor: str, what: str) -> None:
    for nth in range(10):
        bench = Bench(hypervisor, opened=False)
        if what == "bind":
            bench.do(lambda lib: lib.create(2, (1,)))
        bench.fail_at = nth
        ret = bench.do((lambda lib: lib.create(2, (1,))) if what == "create" else (lambda lib: lib.bind(0, 0, 2)))
        bench.fail_at = -1
        assert (ret == -ENOMEM) == bool(bench.failed)
        if what == "create" and ret:
            state = bench.state
            assert (state.file().inodes, state.module) == (0, 1)
        end(bench)
        if not bench.failed:
            assert nth == {"create": 3, "bind": 1}[what]    # inode, attributes, those of the shared page; bindings
            return


@ALL
def test_table_is_complete(hypervisor: str) -> None:
    """Every operation of the table is implemented, and abstract in core/; only the end of it all has an answer there."""
    ops = HYPERVISORS[hypervisor].ops()
    assert isinstance(ops, GuestMemfdOps)
    assert GuestMemfdOps.__abstractmethods__ == {
        "prepare_private", "prepare_shared", "invalidate", "make_shared", "make_private", "reclaim"}
