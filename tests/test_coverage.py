"""A verdict says what has happened and what never has; where too little has happened it is none."""

from __future__ import annotations

import inspect
import json
from errno import ENOMEM, EOPNOTSUPP
from pathlib import Path
from typing import Any

import pytest

from guest_memfd.cli.main import main
from guest_memfd.designs import DESIGNS
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.errors import BadInput
from guest_memfd.explore.suite.check import check
from guest_memfd.explore.suite.coverage import EVENTS, Coverage, covered
from guest_memfd.words.facts import Ended, Returned
from guest_memfd.words.primitives import Bound, Cost, Steps

FAULTS = ["vcpu2", "stop"]


class NoMemory(OurLibrary):
    """Every allocation fails."""

    name, title = "no-memory", "has no memory"

    def grab_folio(self, index: int) -> Steps[Any]:
        yield from self.host.filemap_get_folio(index)
        return -ENOMEM


class Order9(OurLibrary):
    name, title, order = "order-9", "folios of 2 MiB", 9


class Order1(OurLibrary):
    name, title, order, splits = "order-1", "folios of two pages, or of one", 1, True


def test_where_no_page_is_ever_had_nothing_is_proved() -> None:
    report = check(NoMemory, "kvm", scenes=["both-private"], parties=FAULTS, laws=["one-owner"])
    assert (report.verdict, report.missing) == ("undetermined", ("the guest used a page",))
    assert {law.verdict for law in report.laws.values()} == {"undetermined"}
    assert "the guest used a private page" in report.never


def test_the_same_scenario_proves_something_with_the_library() -> None:
    report = check("library", "kvm", scenes=["both-private"], parties=FAULTS, laws=["one-owner"])
    assert (report.verdict, report.missing) == ("holds", ())
    assert "the guest used a private page" not in report.never
    assert "a punch removed a page" in report.never


def test_who_never_asks_for_a_page_misses_none() -> None:
    report = check("library", "kvm", scenes=["both-private"], parties=["zeropad"])
    assert (report.verdict, report.missing) == ("holds", ())


def test_a_kernel_that_is_refused_has_no_pages_to_miss() -> None:
    report = check("library", "kvm", scenes=["no-direct-map-changes"], parties=FAULTS)
    assert (report.verdict, report.missing) == ("holds", ())


def test_what_a_suite_saw_does_not_depend_on_who_did_it() -> None:
    one, two = (check("library", "kvm", scenes=["nothing-yet"], full=False, jobs=jobs) for jobs in (1, 2))
    assert one.missing == two.missing == ()
    assert one.never == two.never
    assert set(one.never) < set(EVENTS)


def ended(op: str, ret: int, **more: Any) -> Ended:
    return Ended(op, ret, None, (0,), more.get("toggled", ()), more.get("removed", ()), more.get("left", ()), (), (1,), (),
                 (), more.get("reasons", ()), (), None, Cost(), (), Bound())


def test_what_is_missed_was_asked_for() -> None:
    facts = [("vmm", ended("punch", 0)), ("vmm", ended("to_private", -16))]
    seen = covered(facts)
    assert seen.asked == {"punch", "to_private"}
    assert seen.events == {"a conversion was refused"}
    assert seen.missing(suite=True) == ("a page was converted to private", "a punch removed a page")
    assert seen.missing(suite=False) == ()
    assert covered([("vmm", Returned("to_private", 0, 1, -EOPNOTSUPP, None, 2, None))]).missing(suite=True) == ()
    more = seen | covered([("vmm", ended("punch", 0, removed=(0,))), ("vcpu", Returned("fault", 0, 1, 0, None, 2, None))])
    assert more.missing(suite=True) == ("the guest used a private page", "a page was converted to private")
    assert more.missing(suite=False) == ("the guest used a page",)
    assert Coverage().never() == tuple(EVENTS)


@pytest.mark.parametrize(("design", "order"), [(Order9, 9), (Order1, 1)])
def test_what_the_host_cannot_do_is_refused(design: type[OurLibrary], order: int) -> None:
    with pytest.raises(BadInput, match=f"has folios of order {order}; scene .* has single pages only"):
        check(design, "kvm", parties=FAULTS, scenes=["both-private"])


def test_it_is_said_and_the_exit_code_is_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DESIGNS, "_known", {**DESIGNS._known})              # what is loaded goes again
    file = tmp_path / "no_memory.py"
    file.write_text(f"""from errno import ENOMEM
from typing import Any
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.words.primitives import Steps

{inspect.getsource(NoMemory)}""")
    asked = ["check", f"{file}:NoMemory", "--hypervisor", "kvm", "--parties", ",".join(FAULTS), "--law", "one-owner"]
    assert main(asked) == 3
    out = capsys.readouterr().out
    assert "no-memory on kvm: holds, but nothing happened: it never was that the guest used a page" in out
    assert "never:    the guest used a page;" in out
    assert main([*asked, "--json"]) == 3
    said, = json.loads(capsys.readouterr().out)["reports"]
    assert (said["verdict"], said["missing"]) == ("undetermined", ["the guest used a page"])
    assert said["never"][0] == "the guest used a page"
    assert main([*asked, "--ktap"]) == 3
    assert "# it never was that the guest used a page\nnot ok 1" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("design", [d for d in DESIGNS if d not in ("none", "fixup")])
def test_every_shipped_design_does_what_it_is_for(design: str) -> None:
    hypervisor = (DESIGNS[design].hypervisors or ("kvm",))[0]
    assert check(design, hypervisor, scenes=["two-pages"], full=False).missing == ()
