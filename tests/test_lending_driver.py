"""What Gunyah's driver asks of the host and of the library, call by call, in every case; none of them is there.

What is seen where one of these is left out is in test_on_demand.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from scripted import asked

from guest_memfd.core.gmem import Conversion
from guest_memfd.hypervisors.gunyah import driver
from guest_memfd.words.pagestate import PRIVATE_PAGE, SHARED_PAGE
from guest_memfd.words.primitives import Folio, Host, Lookup, Primitive, Steps

EPERM, EAGAIN, ENOMEM, EBUSY, EFAULT, EINVAL, ENOENT, EIO = -1, -11, -12, -16, -14, -22, -2, -5


class Asked:
    """A library of *size* pages, in folios of *order*, whose procedures are one step each."""

    def __init__(self, size: int = 16, order: int = 0) -> None:
        self.size, self.order = size, order
        self.ops = SimpleNamespace(host=Host("gunyah"), release=lambda: self._step("release"))

    def _step(self, name: str, *args: object) -> Steps[Any]:
        return (yield Primitive(name, args, "library"))

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self._step(name, *args)


def done(steps: Steps[Any], **answers: Any) -> tuple[Any, list[str]]:
    """What *steps* return, and all they ask for, where what is named answers that: one after the other if it is a list."""
    usual: dict[str, Any] = {
        "get_file": True, "vma_covers": False, "tree_load": (SHARED_PAGE,), "make_private": Conversion(0),
        "make_shared": Conversion(0), "unbind": Conversion(0), "guest_fault": 0, "mmap": 0, "allocate": 0,
        "teardown_bindings": (0, False)}

    def answer(primitive: Primitive) -> Any:
        given = answers.get(primitive.name, usual.get(primitive.name))
        return given.pop(0) if isinstance(given, list) else given

    return asked(steps, answer)


TAKEN, LEFT = ["get_file()", "down_read(bindings)"], ["up_read(bindings)", "close()"]
LOOKED = ["tree_load(attributes, 3, 1)", "vma_covers(3, 1)", "make_private(3, 1)"]
FAULTED = ["guest_fault(7, 3)"]


def told(ret: int) -> list[str]:
    return [f"op_returned(lend, 3, 1, {ret}, None, None)"]


@pytest.mark.parametrize(("how", "answers", "ret", "asks"), [
    ({}, {}, 0, [*TAKEN, *LOOKED, *FAULTED, *told(0), *LEFT]),
    ({}, {"tree_load": (PRIVATE_PAGE,)}, 0, [*TAKEN, LOOKED[0], *FAULTED, *told(0), *LEFT]),
    ({}, {"vma_covers": True}, EPERM, [*TAKEN, *LOOKED[:2], *told(EPERM), *LEFT]),
    ({}, {"make_private": Conversion(ENOMEM)}, ENOMEM, [*TAKEN, *LOOKED, *told(ENOMEM), *LEFT]),
    ({}, {"make_private": Conversion(EAGAIN, 3)}, EBUSY, [*TAKEN, *LOOKED, *told(EAGAIN), *LEFT]),
    ({}, {"guest_fault": ENOMEM}, ENOMEM, [*TAKEN, *LOOKED, *FAULTED, *told(ENOMEM), *LEFT]),
    ({}, {"guest_fault": EAGAIN}, EBUSY, [*TAKEN, *LOOKED, *FAULTED, *told(EAGAIN), *LEFT]),
    ({}, {"get_file": False}, EFAULT, ["get_file()"]),
    ({"writable": False}, {}, EINVAL, []),
    ({"lend": False}, {}, 0, [*TAKEN, *FAULTED, *LEFT]),
    ({"lend": False, "writable": False}, {}, 0, [*TAKEN, *FAULTED, *LEFT]),
    ({"lend": False}, {"guest_fault": EAGAIN}, EBUSY, [*TAKEN, *FAULTED, *LEFT]),
])
def test_a_page_that_is_demanded(how: dict[str, bool], answers: dict[str, Any], ret: int, asks: list[str]) -> None:
    assert done(driver.demand_page(Asked(), 7, 3, **how), **answers) == (ret, asks)       # type: ignore[arg-type]


def test_of_a_large_folio_all_pages_are_lent_or_none() -> None:
    # Of the four pages one is shared still.
    mixed = done(driver.lend_range(Asked(order=2), 5, 1), tree_load=(PRIVATE_PAGE,) * 3 + (SHARED_PAGE,))
    assert mixed == (0, ["tree_load(attributes, 4, 4)", "vma_covers(4, 4)", "make_private(4, 4)"])
    assert done(driver.lend_range(Asked(order=2), 5, 1), tree_load=(PRIVATE_PAGE,) * 4) == (
        0, ["tree_load(attributes, 4, 4)"])


@pytest.mark.parametrize(("order", "start", "nr", "whole"), [
    (0, 3, 2, (3, 2)), (2, 3, 2, (0, 8)), (2, 4, 4, (4, 4)), (2, 5, 1, (4, 4)), (9, 1, 1, (0, 512)),
])
def test_whole_folios_around(order: int, start: int, nr: int, whole: tuple[int, int]) -> None:
    assert driver.around(Asked(order=order), start, nr) == whole


WRITE = "down_write(bindings)", "up_write(bindings)"


@pytest.mark.parametrize(("start", "nr", "order", "answers", "ret", "asks"), [
    (3, 2, 0, {}, 0, ["make_shared(3, 2)", "mmap()"]),
    (3, 2, 2, {}, 0, ["make_shared(0, 8)", "mmap()"]),
    (15, 4, 0, {}, 0, ["make_shared(15, 1)", "mmap()"]),               # the rest lies beyond the end
    (16, 4, 0, {}, 0, ["mmap()"]), (20, 4, 0, {}, 0, ["mmap()"]),
    (3, 2, 0, {"make_shared": Conversion(EBUSY, 3)}, EBUSY, ["make_shared(3, 2)"]),
    (3, 2, 0, {"mmap": ENOMEM}, ENOMEM, ["make_shared(3, 2)", "mmap()"]),
])
def test_memory_that_is_mapped_comes_back_first(
    start: int, nr: int, order: int, answers: dict[str, Any], ret: int, asks: list[str],
) -> None:
    steps = driver.mmap(Asked(order=order), start, nr)                                      # type: ignore[arg-type]
    assert done(steps, **answers) == (ret, [WRITE[0], *asks, WRITE[1]])


@pytest.mark.parametrize(("answers", "ret", "asks"), [
    ({}, 0, ["get_file()", WRITE[0], "unbind(3, 2)", "make_shared(3, 2)", WRITE[1], "close()"]),
    ({"make_shared": Conversion(ENOMEM)}, 0,
     ["get_file()", WRITE[0], "unbind(3, 2)", "make_shared(3, 2)", WRITE[1], "close()"]),
    ({"unbind": Conversion(EBUSY, 3)}, EBUSY, ["get_file()", WRITE[0], "unbind(3, 2)", WRITE[1], "close()"]),
    ({"get_file": False}, ENOENT, ["get_file()"]),
])
def test_a_binding_that_ends(answers: dict[str, Any], ret: int, asks: list[str]) -> None:
    assert done(driver.unbind(Asked(), 3, 2), **answers) == (ret, asks)           # type: ignore[arg-type]


ONE, TWO = "teardown_bindings(0, 2)", "teardown_bindings(3, 1)"
BACK = "make_shared(0, 2)", "make_shared(3, 1)"
REST = "tree_load(bindings, 0, 16)"


@pytest.mark.parametrize(("answers", "ret", "asks"), [
    ({"tree_load": (0,) * 16}, 0, [ONE, BACK[0], TWO, BACK[1], REST, "release()"]),
    ({"tree_load": (0,) * 15 + (4,)}, 0, [ONE, BACK[0], TWO, BACK[1], REST]),               # another VM's
    ({"tree_load": (0,) * 16, "teardown_bindings": [(0, False), (0, True)]}, 0,
     [ONE, BACK[0], TWO, BACK[1], "close()", REST, "release()"]),
    ({"tree_load": (1,) * 16, "teardown_bindings": [(EAGAIN, False)] * 3 + [(0, False)]}, EAGAIN,
     [ONE] * 3 + [TWO, BACK[1], REST]),
    ({"tree_load": (1,) * 16, "teardown_bindings": [(0, False)] + [(EAGAIN, False)] * 3}, EAGAIN,
     [ONE, BACK[0]] + [TWO] * 3 + [REST]),
    ({"tree_load": (0,) * 16, "teardown_bindings": [(EAGAIN, False), (EAGAIN, False), (0, False), (0, False)]}, 0,
     [ONE] * 3 + [BACK[0], TWO, BACK[1], REST, "release()"]),
])
def test_the_bindings_of_a_dying_vm(answers: dict[str, Any], ret: int, asks: list[str]) -> None:
    steps = driver.abandon(Asked(), [(0, 2), (3, 1)])                                       # type: ignore[arg-type, list-item]
    assert done(steps, **answers) == (ret, ["get_file()", WRITE[0], *asks, WRITE[1], "close()"])


def test_of_a_file_that_has_gone_only_the_hypervisors_half_is_left() -> None:
    steps = driver.abandon(Asked(), [(0, 2)])                                               # type: ignore[arg-type, list-item]
    assert done(steps, get_file=False) == (0, ["get_file()", "release()"])


READ = "down_read(bindings)", "up_read(bindings)"
FIRST, SECOND = Lookup(Folio(8, 1), 4), Lookup(Folio(2), 6)
PUT = ["filemap_get_folio(4)", "folio_put(pfn8/o1, lookup)", "filemap_get_folio(6)", "folio_put(pfn2, lookup)"]


@pytest.mark.parametrize(("lend", "answers", "ret", "asks"), [
    (True, {}, (Folio(8, 1), Folio(2)), ["allocate(4, 3)", "tree_load(attributes, 4, 3)", "vma_covers(4, 3)",
                                         "make_private(4, 3)", *PUT]),
    (False, {}, (Folio(8, 1), Folio(2)), ["allocate(4, 3)", *PUT]),
    (True, {"allocate": ENOMEM}, ENOMEM, ["allocate(4, 3)"]),
    (True, {"vma_covers": True}, EPERM, ["allocate(4, 3)", "tree_load(attributes, 4, 3)", "vma_covers(4, 3)"]),
    (True, {"make_private": Conversion(EAGAIN, 5)}, EBUSY,
     ["allocate(4, 3)", "tree_load(attributes, 4, 3)", "vma_covers(4, 3)", "make_private(4, 3)"]),
    (False, {"filemap_get_folio": [FIRST, None]}, EBUSY, ["allocate(4, 3)", *PUT[:3]]),     # punched meanwhile
])
def test_folios_for_a_parcel(lend: bool, answers: dict[str, Any], ret: Any, asks: list[str]) -> None:
    given = {"filemap_get_folio": [FIRST, SECOND], "tree_load": (SHARED_PAGE,) * 3, **answers}
    found = done(driver.take_for_parcel(Asked(), 4, 3, lend=lend), **given)                 # type: ignore[arg-type]
    assert found == (ret, [READ[0], *asks, READ[1]])
