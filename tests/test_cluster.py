"""Workers of a cluster: the same report as here, whoever dies, and never an answer of other code."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from guest_memfd.cli.main import main
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.errors import BadInput, ClusterNotice, HostUnavailable
from guest_memfd.explore.engine.finding import INTERRUPTED
from guest_memfd.explore.suite import cluster, remote
from guest_memfd.explore.suite.check import Limits, Report, compare
from guest_memfd.explore.suite.cluster import Cluster
from guest_memfd.explore.suite.crew import Failed
from guest_memfd.explore.suite.identity import code_of
from guest_memfd.explore.suite.remote import NamedWorld, Unusable
from guest_memfd.explore.suite.stop import Stop
from guest_memfd.explore.suite.work import Answer, Task
from guest_memfd.explore.world.scenario import world
from guest_memfd.laws import LAWS
from guest_memfd.scenarios import SCENES

ASKED: dict[str, Any] = {"scenes": ["for-good"], "full": False, "limits": Limits(states=15), "engine": "python"}
SOME = ["--scene", "for-good", "--quick", "--max-states", "15", "--engine", "python"]
THERE = "tcp://there:8786"


def timeless(report: Report) -> Report:
    return replace(report, seconds=0.0)


@cache
def here() -> Report:
    return timeless(compare([("none", "gunyah")], jobs=1, **ASKED)[0])


def there(address: str = THERE, **more: Any) -> Report:
    return timeless(compare([("none", "gunyah")], cluster=address, **ASKED, **more)[0])


# -- a cluster without dask --------------------------------------------------------------------------------------------


Do = Callable[[str, NamedWorld, Task, Any], Any]


class Promise:
    """What a client has of an answer; `raised` in its place."""

    def __init__(self, answer: Any, raised: BaseException | None = None) -> None:
        self.answer, self.raised = answer, raised

    def result(self, timeout: float) -> Any:
        if self.raised is not None:
            raise self.raised
        return self.answer

    def add_done_callback(self, call: Callable[[Promise], None]) -> None:
        call(self)

    def cancel(self) -> None:
        pass

    def release(self) -> None:
        pass


class Silent(Promise):
    """Of a worker that has died."""

    def add_done_callback(self, call: Callable[[Promise], None]) -> None:
        pass


class Client:
    """As distributed.Client. workers: their addresses, and what each does with the tasks it is given."""

    status = "running"
    scheduler = type("Scheduler", (), {"ncores": None})

    def __init__(self, workers: dict[str, Callable[..., Promise]]) -> None:
        self.workers, self.told = workers, list[Any]()

    def sync(self, ncores: Any, callback_timeout: float) -> dict[str, int]:
        return dict.fromkeys(self.workers, 1)

    def submit(self, do: Do, *args: Any, workers: list[str], **_: Any) -> Promise:
        (address,) = workers
        return self.workers[address](do, *args)

    def run(self, what: Callable[[str], None], run: str, **_: Any) -> None:
        self.told.append((what, run))
        what(run)


def honest(do: Do, *args: Any) -> Promise:
    return Promise(do(*args))


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    """Of a cluster with two workers."""
    made = Client({"one": honest, "two": honest})

    def enter(self: Cluster) -> Cluster:
        self._client = made
        return self

    monkeypatch.setattr(Cluster, "__enter__", enter)
    monkeypatch.setattr(Cluster, "_end", lambda self: None)
    monkeypatch.setattr(cluster, "LOOK", 0.001)
    monkeypatch.setattr(remote, "_memory", lambda: 1 << 40)             # nobody says how much a worker may have
    return made


def test_workers_say_what_is_said_here(client: Client) -> None:
    assert there() == here()


def dies(client: Client, address: str, at: int) -> Callable[..., Promise]:
    """A worker that dies, or is found dead, when it is given its task number *at*."""
    count = itertools.count(1)

    def worker(do: Do, *args: Any) -> Promise:
        if next(count) < at:
            return honest(do, *args)
        del client.workers[address]
        return Silent(None)

    return worker


def test_what_a_worker_was_at_when_it_died_is_done_by_others(client: Client) -> None:
    client.workers["one"] = dies(client, "one", 4)
    client.workers["three"] = dies(client, "three", 9)
    with pytest.warns(ClusterNotice) as told:
        assert there() == here()
    said = sorted(str(each.message).partition(", and ")[0] for each in told)
    assert said == ["worker one has died", "worker three has died"]
    assert [*client.workers] == ["two"]


@pytest.mark.parametrize("raised", [TimeoutError(), CancelledError()])
def test_an_answer_that_does_not_come_is_asked_for_again(client: Client, raised: BaseException) -> None:
    count = itertools.count(1)
    client.workers["one"] = lambda do, *args: honest(do, *args) if next(count) != 3 else Promise(None, raised)
    with pytest.warns(ClusterNotice, match="worker one has died, and .* is explored again"):
        assert there() == here()


def test_a_scenario_that_ends_three_workers_is_given_up(client: Client) -> None:
    number = itertools.count()

    def ends(do: Do, run: str, place: NamedWorld, task: Task, left: Any) -> Promise:
        return Promise(None, TimeoutError()) if "stop" in task.parties else honest(do, run, place, task, left)

    client.workers = {f"w{next(number)}": ends for _ in range(3)}
    with pytest.warns(ClusterNotice), pytest.raises(HostUnavailable, match=r"3 workers have died that explored .*stop"):
        there()


def test_a_worker_with_other_code_is_told_and_not_used(client: Client) -> None:
    used = []

    def other(do: Do, run: str, place: NamedWorld, task: Task, left: Any) -> Promise:
        used.append(task)
        return honest(do, run, replace(place, code="of last year"), task, left)

    client.workers["one"] = other
    with pytest.warns(ClusterNotice, match="worker one is not used: its code is another"):
        assert there() == here()
    assert len(used) == 1


@pytest.mark.parametrize("raised", [ModuleNotFoundError("No module named 'guest_memfd'"), AttributeError("no 'do'")])
def test_where_no_worker_can_be_used_that_is_said(client: Client, raised: Exception) -> None:
    client.workers = dict.fromkeys(("one", "two"), lambda *_: Promise(None, raised))
    with pytest.warns(ClusterNotice), pytest.raises(HostUnavailable) as told:
        there()
    assert str(told.value) == f"no worker at {THERE!r} can be used: {raised}"


def test_a_scheduler_that_goes_away_ends_the_run(client: Client) -> None:
    count = itertools.count(1)

    def progress(*_: object) -> None:
        client.status = "connecting" if next(count) > 5 else "running"

    with pytest.raises(HostUnavailable, match=f"the scheduler at '{THERE}' has gone: the connection is connecting"):
        there(progress=progress)


def test_without_workers_nobody_waits_for_ever(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "WORKERS", 0.01)
    client.workers = {}
    with pytest.raises(HostUnavailable, match=f"there is no worker at '{THERE}'"):
        there()


def test_who_interrupts_lets_the_workers_know(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, count = Stop(), itertools.count(1)

    def progress(*_: object) -> None:
        if next(count) == 4:
            stop.ask()

    # Ends only when it is told to.
    def endless(do: Do, run: str, place: NamedWorld, task: Task, left: Any) -> Promise:
        return honest(do, run, place, task, left) if task.apart else Silent(None)

    client.workers["two"] = endless
    monkeypatch.setattr(cluster, "PATIENCE", 0.05)
    report = there(progress=progress, stop=stop)
    assert {what for what, _ in client.told} == {remote.leave}
    assert INTERRUPTED in {each.limit for each in report.unfinished}
    assert "holds" not in {law.verdict for law in report.laws.values()}


# -- on a worker -------------------------------------------------------------------------------------------------------


def place(**changes: Any) -> NamedWorld:
    scene = SCENES["two-pages"]
    code = code_of([world("none", "gunyah", scene=scene)])
    plain = NamedWorld(code, "none", "gunyah", scene, None, tuple(LAWS), "python", True, None, None)
    return replace(plain, memory=1 << 40, **changes)


def test_a_worker_answers_for_its_own_code_alone() -> None:
    task = Task(7, 3, ("vcpu", "zeropad"))
    answer = remote.do("run", place(), task, None)
    assert isinstance(answer, Answer)
    assert answer.limit is None
    assert ("host-survives", 9) in {(law, steps) for law, _, steps, _ in answer.broken}
    told = remote.do("run", place(code="other"), task, None)
    assert isinstance(told, Unusable)
    assert told.why.startswith("its code is another (")
    unknown = remote.do("run", place(design="not-there"), task, None)
    assert isinstance(unknown, Unusable)
    assert unknown.why.startswith("unknown design 'not-there'; ")


def test_a_worker_that_is_to_leave_says_what_it_has_seen() -> None:
    remote.leave("left")
    answer = remote.do("left", place(), Task(7, 3, ("vcpu", "zeropad")), None)
    assert isinstance(answer, Answer)
    assert answer.limit == INTERRUPTED
    again = remote.do("another", place(), Task(7, 3, ("vcpu", "zeropad")), None)
    assert isinstance(again, Answer)
    assert again.limit is None


def test_time_is_a_limit_there_too() -> None:
    answer = remote.do("run", place(), Task(7, 3, ("vcpu", "zeropad")), 0.0)
    assert isinstance(answer, Answer)
    assert answer.limit == "seconds"


def test_what_raises_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(remote.Bench, "do", fail)
    assert remote.do("run", place(), Task(7, 3, ("vcpu", "zeropad")), None) == Failed("MemoryError", for_memory=True)


# -- what cannot be ----------------------------------------------------------------------------------------------------


class Mine(OurLibrary):
    name = "mine"


def test_who_is_not_registered_cannot_be_named() -> None:
    with pytest.raises(BadInput, match="a cluster explores what is registered, and mine on kvm is not"):
        compare([(Mine, "kvm")], cluster=THERE, **ASKED)


@pytest.mark.parametrize(("argv", "code", "says"), [
    (["--cluster", "local:0"], 4, "--cluster local:N wants a number of workers from 1 to 256, not '0'"),
    (["--cluster", "local:two"], 4, "--cluster local:N wants a number of workers from 1 to 256, not 'two'"),
    (["--cluster", THERE, "-j", "2"], 4, "either a number of jobs or a cluster"),
    (["--cluster", THERE], 5, "--cluster needs dask: import of distributed halted; None in sys.modules; pip install"),
])
def test_a_cluster_that_cannot_be_is_one_line(
    argv: list[str], code: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert main(["check", "none", "--hypervisor", "gunyah", *SOME, *argv]) == code
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert says in err


# -- with dask ---------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(("address", "code", "says"), [
    ("nonsense", 4, "--cluster wants the address of a scheduler, as tcp://host:8786, or local:N, not 'nonsense'"),
    ("tcp://127.0.0.1:1", 5, "no scheduler answers at 'tcp://127.0.0.1:1': "),
])
def test_where_nothing_listens(
    address: str, code: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("distributed", reason="pip install 'guest-memfd[cluster]'")
    monkeypatch.setattr(cluster, "CONNECT", 0.5)
    assert main(["check", "none", "--hypervisor", "gunyah", *SOME, "--cluster", address]) == code
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert says in err


@pytest.mark.long
def test_workers_of_this_machine_print_the_same_report(tmp_path: Path) -> None:
    pytest.importorskip("distributed", reason="pip install 'guest-memfd[cluster]'")
    reports = []
    for more in (["-j", "1"], ["--cluster", "local:2"]):
        file = tmp_path / more[-1]
        argv = ["check", "none", "--hypervisor", "gunyah", *SOME, "--max-states", "200", "--json", "-o", str(file)]
        assert main([*argv, *more]) == 2
        report = json.loads(file.read_text())
        report["reports"][0]["seconds"] = 0
        reports.append(json.dumps(report))
    assert reports[0] == reports[1]


@pytest.fixture
def dask() -> Iterator[Any]:
    """A cluster of two processes."""
    pytest.importorskip("distributed", reason="pip install 'guest-memfd[cluster]'")
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", silence_logs=50) as made:
        yield made


@pytest.mark.long
def test_a_worker_is_killed_and_a_scheduler_goes(dask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    count = itertools.count(1)

    def kills(*_: object) -> None:
        if next(count) == 5:
            os.kill(next(iter(dask.workers.values())).pid, signal.SIGKILL)

    def closes(*_: object) -> None:
        if next(count) == 5:
            dask.close()

    with pytest.warns(ClusterNotice, match=r"worker .* has died, and .* is explored again"):
        assert there(dask.scheduler_address, progress=kills) == here()
    count = itertools.count(1)
    monkeypatch.setattr(cluster, "SCHEDULER", 1.0)
    with pytest.raises(HostUnavailable, match=r"the scheduler at .* has gone: "):
        there(dask.scheduler_address, progress=closes)
