"""`gmem cost`: prices by figures worked out here by hand, rounds on memory of the test's own, and what is refused."""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from errno import EAGAIN, ENOMEM, ENOSYS, EPERM
from typing import Any

import pytest

from guest_memfd.cli.main import main as gmem
from guest_memfd.errors import HostUnavailable, SyscallFailed
from guest_memfd.explore.world.cost import DesignCost
from guest_memfd.linux import unit_costs
from guest_memfd.linux.fd import Descriptor
from guest_memfd.linux.mapping import PAGE
from guest_memfd.linux.touch import Touched, memfd, splits
from guest_memfd.report import price

UNMAPS, LEAVES, FLUSHES_NOT = DesignCost(2, 1, 1, 2), DesignCost(0, 0, 0, 2), DesignCost(2, 0, 1, 2)


def samples(**others: list[float]) -> dict[str, list[float]]:
    """A fault of 1.5 us, of which 0.5 us are zeroing; out of the direct map 4 us, back into it 1 us; a call 0.25 us."""
    figures: dict[str, list[float]] = {"fault": [1.5] * 5, "clear": [0.5] * 5, "call": [0.25] * 5, "zap": [4.0] * 5,
                                       "restore": [1.0] * 5, "split": [], "gmem_fault": [], "ioctl": []}
    return figures | others


def spreads(**others: list[float]) -> dict[str, price.Spread | None]:
    return {name: price.spread(figures) for name, figures in samples(**others).items()}


def spread(figure: float, rounds: int = 5) -> price.Spread:
    return price.Spread(figure, figure, figure, rounds)


def test_what_goes_out_is_a_write_and_a_flush_and_what_comes_back_a_write() -> None:
    assert price.units(spreads()) == price.Units(*map(spread, (1.5, 0.5, 0.25, 1.0, 3.0)), None)


def test_where_there_is_a_guest_memfd_its_fault_counts_and_an_ioctl() -> None:
    unit = price.units(spreads(gmem_fault=[2.5] * 4, ioctl=[0.75] * 4))
    assert (unit.fault, unit.call) == (spread(2.5, 4), spread(0.75, 4))


def test_noise_is_no_negative_cost() -> None:
    unit = price.units(spreads(restore=[-1.0, -1.0, -1.0], zap=[-2.0, -1.0, 3.0]))
    assert unit.write == spread(0.0, 3)
    assert unit.flush == price.Spread(0.0, 0.0, 1.0, 3)


def test_a_split_is_told_by_three_rounds_and_more() -> None:
    assert price.units(spreads(split=[9.0, 9.0])).split is None
    assert price.units(spreads(split=[7.0, 9.0, 11.0])).split == price.Spread(9.0, 8.0, 10.0, 3)


def test_too_few_rounds_are_no_figure() -> None:
    with pytest.raises(ValueError, match="too few"):
        price.units(spreads(zap=[1.0]))


# A GiB is 262,144 pages or 512 blocks; a folio takes two writes (2 us) and a flush (3 us); a split 100 us.
@pytest.mark.parametrize(("cost", "order", "ms"), [
    (UNMAPS, 0, 262_144 * 5e-3 + 513 * 0.1), (UNMAPS, 4, 16_384 * 5e-3 + 513 * 0.1), (UNMAPS, 9, 512 * 5e-3 + 0.1),
    (UNMAPS, 18, 5e-3), (FLUSHES_NOT, 0, 262_144 * 2e-3 + 513 * 0.1), (LEAVES, 0, 0.0)])
def test_a_price_is_so_many_operations(cost: DesignCost, order: int, ms: float) -> None:
    assert price.price(cost, price.units(spreads(split=[100.0] * 3)), order).ms.median == pytest.approx(ms)


# Of each folio: 1 us to enter, two calls; of the whole GiB 262,144 times half a microsecond.
@pytest.mark.parametrize(("order", "ms"), [(0, 262_144 * 2e-3), (9, 512 * 1.5e-3 + 131.072), (18, 1.5e-3 + 131.072)])
def test_lending_is_a_fault_a_call_and_zeroing(order: int, ms: float) -> None:
    assert price.lending(UNMAPS, price.units(spreads()), order) == pytest.approx(ms)
    assert price.price(UNMAPS, price.units(spreads()), order).share == pytest.approx((262_144 >> order) * 5e-3 / ms)


# 5 us of (131,072 us + n x 1.5 us): under 1 % with n < 263.19 folios a GiB, so from 4 MiB on, of which there are 256.
def test_it_is_cheap_from_a_size_on() -> None:
    unit = price.units(spreads())
    assert price.cheap_from(UNMAPS, unit) == 10
    assert price.size(10) == "4M"
    assert price.cheap_from(LEAVES, unit) == 0
    assert price.cheap_from(UNMAPS, price.units(spreads(zap=[1e9] * 5))) is None


def test_the_quartiles_of_a_price_are_those_of_its_figures() -> None:
    unit = price.units(spreads(zap=[2.0, 3.0, 4.0, 5.0, 6.0]))           # a flush of 2, 3 and 4 us
    ms = price.price(UNMAPS, unit, 9).ms
    assert [round(one, 3) for one in ms[:3]] == [2.56, 2.048, 3.072]


@pytest.mark.parametrize(("order", "name"), [(0, "4K"), (4, "64K"), (9, "2M"), (17, "512M"), (18, "1G")])
def test_sizes_are_said_as_people_do(order: int, name: str) -> None:
    assert price.size(order) == name


@pytest.mark.parametrize(("before", "after", "there"), [
    ({}, {}, 0), ({"DirectMap4k": 0, "DirectMap2M": 8192}, {"DirectMap4k": 4096, "DirectMap2M": 4096}, 2),
    ({"DirectMap2M": 0, "DirectMap1G": 2 << 20}, {"DirectMap2M": (1 << 20) - 2048, "DirectMap1G": 1 << 20}, 2),
    ({"DirectMap2M": 2048}, {"DirectMap2M": 4096}, 0)])
def test_leaves_that_were_split_are_counted(before: dict[str, int], after: dict[str, int], there: int) -> None:
    assert splits(before, after) == there


# -- rounds ----------------------------------------------------------------------------------------------------------------


class Plain:
    """As `Secret`, of memory that any kernel has; `most`: bytes that may be mapped."""

    most = 1 << 40

    def __new__(cls, size: int) -> Any:
        file = memfd(size)
        file.mmap = lambda: cls._mapped(size)           # type: ignore[attr-defined]
        return file

    @classmethod
    def _mapped(cls, size: int) -> Descriptor:
        if size > cls.most:
            raise SyscallFailed(EAGAIN, "mmap", "RLIMIT_MEMLOCK")
        return memfd(size)


def no_kvm() -> Any:
    raise HostUnavailable("/dev/kvm: No such file or directory")


@pytest.fixture
def ordinary(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Plain]]:
    monkeypatch.setattr(unit_costs, "Secret", Plain)
    monkeypatch.setattr(unit_costs, "System", no_kvm)
    yield Plain
    Plain.most = 1 << 40


def test_there_are_some_rounds_however_little_time_there_is(ordinary: type[Plain]) -> None:
    seen = unit_costs.measured(0.0, clock=itertools.count().__next__)
    assert (len(seen.fault), len(seen.clear), len(seen.call), len(seen.restore)) == (unit_costs.ROUNDS,) * 4
    assert len(seen.zap) + len(seen.split) <= unit_costs.ROUNDS
    assert (seen.gmem_fault, seen.ioctl, seen.pages) == ([], [], unit_costs.PAGES)
    assert seen.why == "/dev/kvm: No such file or directory"


def test_rounds_go_on_until_the_time_is_up(ordinary: type[Plain]) -> None:
    # The clock is asked before each round that need not be, and says 1, 2, ... 9.
    assert len(unit_costs.measured(9.0, pages=16, clock=itertools.count().__next__).fault) == unit_costs.ROUNDS + 8


def test_a_round_has_as_many_pages_as_may_be_locked(ordinary: type[Plain]) -> None:
    ordinary.most = 40 * PAGE
    assert unit_costs.measured(0.0, clock=itertools.count().__next__).pages == 32


def test_where_nearly_nothing_may_be_locked_it_is_refused(ordinary: type[Plain]) -> None:
    ordinary.most = 15 * PAGE
    with pytest.raises(HostUnavailable, match=r"RLIMIT_MEMLOCK \(ulimit -l\) leaves no room for 16 pages .* 64 KiB"):
        unit_costs.measured(0.0)


def test_a_store_to_a_page_that_is_there_is_no_fault() -> None:
    assert Touched(first=50e-6, again=10e-6, free=20e-6).fault(10) == pytest.approx(4.0)
    assert Touched(first=50e-6, again=10e-6, free=20e-6).freed(10) == pytest.approx(2.0)


# -- the command -----------------------------------------------------------------------------------------------------------


def raises(errno: int) -> Callable[..., Any]:
    def refused(*_: Any, **__: Any) -> Any:
        if errno == ENOSYS:
            raise HostUnavailable("memfd_secret(2) is not here: secretmem.enable=0")
        raise SyscallFailed(errno, "memfd_secret")
    return refused


def killed(*_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGBUS)


def lost(*_: Any) -> Any:
    raise MemoryError


@pytest.mark.parametrize(("name", "stands_for", "said"), [
    ("Secret", raises(ENOSYS), "secretmem.enable=0"), ("Secret", raises(EPERM), "EPERM"),
    ("Secret", raises(ENOMEM), "ENOMEM"), ("measured", killed, "ended with SIGBUS"), ("measured", lost, "no memory left")])
def test_what_cannot_be_measured_is_said_in_a_line_and_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, stands_for: Any, said: str,
) -> None:
    monkeypatch.setattr(unit_costs, name, stands_for)
    assert gmem(["cost", "library", "none", "--seconds", "0.01"]) == 5
    out, err = capsys.readouterr()
    first, rest = out.split("\n\n", 1)
    assert said in " ".join(first.split())
    assert rest.splitlines()[0].startswith("cost per folio of order 0")
    assert [line.split() for line in rest.splitlines()[-2:]] == [
        ["library", "on", "kvm", "2", "1", "1", "2"], ["none", "on", "kvm", "0", "0", "0", "2"]]
    assert err == ""


def test_nothing_may_be_locked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    measured = unit_costs.measured

    def poor(seconds: float) -> unit_costs.Samples:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (PAGE, PAGE))            # in the process that measures
        return measured(seconds)

    monkeypatch.setattr(unit_costs, "measured", poor)
    code = gmem(["cost", "none", "--seconds", "0.01", "--json"])
    # Who may lock what he wants is not held back by it (CAP_IPC_LOCK).
    assert (code, bool(json.loads(capsys.readouterr().out)["why_not_measured"])) in ((0, False), (5, True))


def test_what_is_lost_in_the_noise_is_not_told_as_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    some = {**samples(), "restore": [-0.08, -0.02, -0.01, 0.0, 0.07]}
    monkeypatch.setattr(unit_costs, "measured", lambda _: unit_costs.Samples(**some, pages=256, why=""))
    assert gmem(["cost", "firecracker-2026"]) == 0
    assert "less than what disturbs it here" in " ".join(capsys.readouterr().out.split())
    assert gmem(["cost", "firecracker-2026", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["designs"][0]["under_1_percent_from"] is None
    some["zap"] = [-60.0] * 5
    assert gmem(["cost", "library"]) == 5
    assert "this machine is too busy" in " ".join(capsys.readouterr().out.split())


def test_however_many_rounds_there_were_they_are_told_in_a_few_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    many = {name: figures * 20_000 for name, figures in samples().items()}
    monkeypatch.setattr(unit_costs, "measured", lambda _: unit_costs.Samples(**many, pages=256, why=""))
    assert gmem(["cost", "none", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["microseconds"]["fault"]["rounds"] == 100_000


def test_where_every_round_has_split_something_there_is_no_figure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(unit_costs, "measured", lambda _: unit_costs.Samples(**samples(zap=[1.0]), pages=256, why=""))
    assert gmem(["cost", "none"]) == 5
    assert "repeat it" in capsys.readouterr().out


def test_for_programs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told = unit_costs.Samples(**samples(), pages=256, why="no KVM")
    monkeypatch.setattr(unit_costs, "measured", lambda _: told)
    assert gmem(["cost", "library", "none", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["hypervisor"], found["why_not_measured"]) == ("guest-memfd-cost/1", "kvm", None)
    assert found["microseconds"]["zap"] == {"median": 4.0, "low": 4.0, "high": 4.0, "rounds": 5}
    library, none = found["designs"]
    assert library["per_gib"]["2M"]["ms"]["median"] == pytest.approx(2.56)
    assert (library["under_1_percent_from"], none["under_1_percent_from"]) == ("4M", "4K")
    assert none["per_gib"]["4K"]["ms"]["median"] == 0


def test_for_people(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told = unit_costs.Samples(**samples(zap=[2.0, 3.0, 4.0, 5.0, 6.0]), pages=256, why="no KVM here")
    monkeypatch.setattr(unit_costs, "measured", lambda _: told)
    assert gmem(["cost", "library", "none"]) == 0
    out = capsys.readouterr().out
    assert "5 rounds of 256 pages" in out
    assert "out of the direct map, with the flush           4.00        3.00 to 5.00" in out
    assert "no KVM here" in out
    assert "library on kvm: under 1 % of lending from folios of 4M on (4M to 8M by the quartiles)" in " ".join(out.split())
    assert "none on kvm: nothing" in out
    assert [line.split() for line in out.splitlines() if "folios of 2M" in line] == [
        ["folios", "of", "2M", "2.56", "(2.05", "to", "3.07)", "1.94", "%"]]


@pytest.mark.parametrize(("argv", "said"), [
    (("--seconds", "0"), "--seconds is more than 0"), (("--seconds", "601"), "at most 600"),
    (("--seconds", "x"), "'x' is not"), (("--hypervisor", "kvn"), "did you mean 'kvm'"),
    (("librari",), "did you mean 'library'"), (("kvm-7.4", "--hypervisor", "gunyah"), "kvm-7.4 was not posted for gunyah")])
def test_bad_input(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], said: str) -> None:
    assert gmem(["cost", *argv]) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
