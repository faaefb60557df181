"""The command line as a user meets it: verdicts as exit codes, output for people and programs, and every bad input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import ALL, LOAD, run
from refusal import one_line
from terminal import on_a_terminal

from guest_memfd.cli.check import READERS
from guest_memfd.cli.main import main
from guest_memfd.cli.options import Scope
from guest_memfd.designs import SETS
from guest_memfd.explore.suite.plan import QUICK, TRIPLES
from guest_memfd.explore.suite.verdict import Limits
from guest_memfd.explore.trace import SCHEMA
from guest_memfd.report import json as report_json
from guest_memfd.report.sentence import listed
from guest_memfd.scenarios import PARTIES, SCENES

FIRST_LOOK = ("every party alone and every pair in two-pages; in 20 other scenes, every party except vmm, alone and with "
              "vcpu2 (in both-shared also with repeater, in three-pages, two-large-folios and larger-leaves alone only); "
              "the triples unload-while-stopping, scan-and-a-call, scan-while-stopping, read-while-created and "
              "pin-and-a-call; without VMMs that do several things in a row")


def gmem(*argv: str) -> int:
    return main(list(argv))


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that *argv* is refused with; nothing may be on standard output."""
    assert gmem(*argv) == 4
    return one_line(capsys)


# -- verdicts ----------------------------------------------------------------------------------------------------------


def test_what_holds_exits_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert gmem("check", "library", "--hypervisor", "gunyah", *LOAD) == 0
    assert "library on gunyah: holds" in capsys.readouterr().out


def test_what_is_refuted_exits_2_and_ends_in_the_load(capsys: pytest.CaptureFixture[str]) -> None:
    assert gmem("check", "none", "--hypervisor", "gunyah", *LOAD) == 2
    out = capsys.readouterr().out
    assert "host-survives    broken in 9 steps of vcpu, zeropad" in out
    assert re.search(r"^  9\. zeropad: .*load_unaligned_zeropad", out, re.MULTILINE)


def test_what_is_undetermined_exits_3_and_is_no_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert gmem("check", "library", "--hypervisor", "gunyah", *LOAD, "--max-states", "3") == 3
    out = capsys.readouterr().out
    assert "undetermined, nothing is proved: more than 3 states" in out
    assert "kept" not in out


def test_why_a_load_is_survived_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert gmem("check", "none", "--hypervisor", "pkvm", *LOAD) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "zeropad's load_unaligned_zeropad" in out
    assert "goes through the exception table" in out


def test_one_refuted_among_several_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert gmem("check", "none", "--hypervisor", "pkvm,gunyah", *LOAD, "-q") == 2
    assert capsys.readouterr().out.splitlines() == [
        f"none on pkvm: holds, {ALL} laws kept", f"none on gunyah: refuted, 1 of {ALL} laws broken"]


def test_hypervisors_default_to_those_a_design_was_posted_for(capsys: pytest.CaptureFixture[str]) -> None:
    gmem("check", "gunyah-v17", *LOAD, "-q")
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == ["gunyah-v17 on gunyah"]


def test_one_law_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert gmem("check", "none", "--hypervisor", "gunyah", *LOAD, "--law", "progress,library-alone", "-q") == 0
    assert capsys.readouterr().out == "none on gunyah: holds, 2 laws kept\n"


def test_no_failures_at_all_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert gmem("check", "library", "--hypervisor", "kvm", *LOAD, "--failures", "0") == 0
    assert "no injected failure" in capsys.readouterr().out


def test_a_scene_can_be_asked_for_and_a_trace_carries_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["check", "none", "--hypervisor", "gunyah", "--parties", "vcpu2,zeropad"]
    assert gmem(*argv, "--scene", "both-shared", "-q") == 0
    assert gmem(*argv, "--scene", "both-shared", "--scene", "both-private", "--save-traces", str(tmp_path)) == 2
    out = capsys.readouterr().out
    assert "host-survives    broken in 9 steps of vcpu2, zeropad in scene both-private" in out
    assert "  scene    both-private: " in out
    assert "explored: vcpu2 and zeropad in both-shared and both-private, 2 scenarios, one injected failure" in out
    (file,) = tmp_path.iterdir()
    assert gmem("replay", str(file)) == 2
    assert gmem("explain", str(file)) == 0
    assert "  scene    both-private: " in capsys.readouterr().out


def test_a_trace_of_no_steps_is_told_and_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gmem("check", "none", "--hypervisor", "gunyah", *LOAD, "--save-traces", str(tmp_path)) == 2
    (file,) = tmp_path.iterdir()
    capsys.readouterr()
    file.write_text(json.dumps({**json.loads(file.read_text()), "steps": []}))
    assert gmem("replay", str(file)) == 3
    assert "law host-survives no longer breaks" in " ".join(capsys.readouterr().out.split())
    assert gmem("explain", str(file)) == 3
    assert "diverges at step 0 of 0" in capsys.readouterr().out


def test_what_is_explored_is_said_in_one_clause() -> None:
    def words(**more: Any) -> str:
        plain: dict[str, Any] = {"hypervisors": None, "scenes": None, "parties": None, "scenario": None, "laws": None,
                                 "limits": Limits(), "jobs": None, "full": True}
        return Scope(**{**plain, **more}).words()

    triples = sum(map(len, TRIPLES.values()))
    some = "of VMMs that do several things in a row, some pairs"
    assert words() == (f"every party alone and every pair in 21 scenes, and {triples} triples ({some}; in three-pages, "
                       "failing-twice, two-large-folios, large-beside-small, mixed-block, half-bound, odd-gfn, "
                       "large-for-good and larger-leaves, pairs with vcpu2; in on-demand, pairs with vcpu2 and vmm)")
    assert words(scenes=("crossed", "unbound")) == f"every party alone and every pair in crossed and unbound ({some})"
    assert words(size=4) == "every 4 parties together in two-pages, without VMMs that do several things in a row"
    assert words(size=1, scenes=("crossed",)).startswith("every party alone in crossed, without VMMs")
    assert words(full=False) == FIRST_LOOK
    assert listed([name for names in QUICK.values() for name in names]) in FIRST_LOOK
    for scene, alone in (("three-pages", "alone"), ("both-shared", "alone and with vcpu2 and repeater"),
                         ("unbound", "alone and with vcpu2")):
        assert words(full=False, scenes=[scene]).startswith(f"in {scene}, every party except vmm, {alone};")
    assert words(full=False, scenes=("crossed",)) == (
        "in crossed, every party except vmm, alone and with vcpu2; without VMMs that do several things in a row")
    assert words(parties=("vcpu", "zeropad")) == "vcpu and zeropad"
    assert words(scenario="hibernate", scenes=("crossed",)) == "hibernate (vcpu, vmm and power) in crossed"


# -- output ------------------------------------------------------------------------------------------------------------


def test_json_says_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert gmem("check", "none", "--hypervisor", "gunyah", *LOAD, "--json") == 2
    told = json.loads(capsys.readouterr().out)
    assert (told["schema"], told["design"], told["verdict"]) == ("guest-memfd-check/3", "none", "refuted")
    assert "breaks host-survives on gunyah: after 9 steps of vcpu and zeropad" in told["sentence"]
    assert told["failures"] is None
    (report,) = told["reports"]
    assert (report["hypervisor"], report["verdict"], report["scenes"]) == ("gunyah", "refuted", ["two-pages"])
    law = report["laws"]["host-survives"]
    assert (law["verdict"], law["steps"], law["parties"], law["scene"]) == ("refuted", 9, ["vcpu", "zeropad"], "two-pages")
    assert law["sentence"] == "no access the kernel may make on its own ends in an abort it cannot handle"
    assert report["findings"][0]["scene"] == "two-pages"
    assert len(law["trace"]["steps"]) == 9
    assert "pfn0.s1" in law["trace"]["blamed"]
    assert report["laws"]["progress"]["trace"] is None


@pytest.mark.parametrize(("hypervisors", "verdict", "verdicts"), [
    ("gunyah", "refuted", ["refuted"]), ("pkvm", "holds", ["holds"]), ("pkvm,gunyah", "refuted", ["holds", "refuted"])])
def test_json_has_one_shape_however_many_hypervisors(
    capsys: pytest.CaptureFixture[str], hypervisors: str, verdict: str, verdicts: list[str],
) -> None:
    gmem("check", "none", "--hypervisor", hypervisors, *LOAD, "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["verdict"] == verdict
    assert [report["verdict"] for report in told["reports"]] == verdicts
    assert ",".join(report["hypervisor"] for report in told["reports"]) == hypervisors


def strict(schema: Any) -> Any:
    """*schema* with no room for a field that it does not tell."""
    if isinstance(schema, dict):
        closed = {"additionalProperties": False} if "properties" in schema and "type" in schema else {}
        return closed | {key: strict(value) for key, value in schema.items()}
    return [strict(each) for each in schema] if isinstance(schema, list) else schema


@pytest.fixture(scope="module")
def validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    schema = strict(report_json.schema())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("argv", [
    "none --hypervisor gunyah,pkvm --parties vcpu,zeropad", "none --hypervisor kvm --max-states 1 --parties vcpu,zeropad",
    "gunyah-v17 --parties vmm-odd --failures 0", "guestmem-rfc1 --parties vcpu,stop --hypervisor kvm"])
def test_json_is_what_the_published_schema_says(capsys: pytest.CaptureFixture[str], validator: Any, argv: str) -> None:
    gmem("check", *argv.split(), "--json")
    told = json.loads(capsys.readouterr().out)
    assert [error.message for error in validator.iter_errors(told)] == []


def test_the_schema_refuses_what_it_does_not_tell(capsys: pytest.CaptureFixture[str], validator: Any) -> None:
    gmem("check", "none", "--hypervisor", "gunyah", *LOAD, "--json")
    told = json.loads(capsys.readouterr().out)
    for spoil in (lambda t: t.pop("verdict"), lambda t: t.update(verdict="good"), lambda t: t["reports"][0].update(more=1),
                  lambda t: t["reports"][0]["laws"]["host-survives"]["trace"]["steps"][0].update(step="1")):
        wrong = json.loads(json.dumps(told))
        spoil(wrong)
        assert not validator.is_valid(wrong)


def test_json_differs_from_run_to_run_in_seconds_only() -> None:
    argv = ["check", "none", "--hypervisor", "gunyah,pkvm", "--parties", "vcpu,zeropad,stop", "--json"]
    outputs = {
        re.sub(r'"seconds": [\d.]+', "", run(*argv, "-j", jobs, PYTHONHASHSEED=seed).stdout)
        for seed, jobs in (("0", "1"), ("1", "2"), ("2", "1"))
    }
    assert len(outputs) == 1


def test_ktap_has_a_plan_and_a_line_per_law(capsys: pytest.CaptureFixture[str]) -> None:
    assert gmem("check", "none", "--hypervisor", "gunyah", *LOAD, "--ktap") == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["KTAP version 1", f"1..{ALL}"]
    results = [line for line in lines if line.startswith(("ok", "not ok"))]
    assert len(results) == ALL
    assert results[0] == "not ok 1 none.gunyah.host-survives"
    assert results[1] == "ok 2 none.gunyah.guest-private"
    assert results[-1] == f"ok {ALL} none.gunyah.bounded-cost"


def test_ktap_does_not_pass_what_is_undetermined(capsys: pytest.CaptureFixture[str]) -> None:
    assert gmem("check", "library", "--hypervisor", "kvm", *LOAD, "--max-states", "3", "--ktap") == 3
    results = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not ok")]
    assert len(results) == ALL
    assert all(line.endswith("# undetermined") for line in results)


def test_colours_are_for_terminals_and_no_color_is_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["check", "none", "--hypervisor", "gunyah", *LOAD]
    assert b"\033[" in on_a_terminal(*argv, NO_COLOR="")
    assert b"\033[" not in on_a_terminal(*argv, NO_COLOR="1")
    gmem(*argv)
    assert "\033[" not in capsys.readouterr().out


def test_compare_prints_the_table_sentences_and_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert gmem("compare", "none", "library", *LOAD) == 0
    out = capsys.readouterr().out
    assert "9 V+Z" in out
    assert "\n- none (the direct map is left alone) " in out
    assert "\n- library (" in out
    assert "direct-map writes" in out
    assert max(map(len, out.splitlines())) <= 100


def test_compare_says_which_scenes_were_seen_and_which_refused(capsys: pytest.CaptureFixture[str]) -> None:
    scenes = "both-shared,no-direct-map-changes,crossed"
    assert gmem("compare", "none", "library", "--hypervisor", "gunyah", "--parties", "vcpu2,zeropad", "--scene", scenes) == 0
    out = capsys.readouterr().out
    assert f"scenes:   {', '.join(scenes.split(','))}\n" in out
    assert "refused:  no file in scene no-direct-map-changes: library on gunyah\n" in out
    assert "kept: in every interleaving of vcpu2 and zeropad in both-shared, no-direct-map-changes and crossed." in (
        " ".join(out.split()))
    assert "\nhost-survives    9 W+Z'  kept\n" in out
    assert "' in scene no-direct-map-changes: host-survives of none on gunyah.\n" in out
    assert gmem("compare", "none", "--hypervisor", "gunyah", "--parties", "vcpu2,zeropad", "--scene", scenes, "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["table"]
    assert (row["scenes"], row["refused"]) == (scenes.split(","), [])
    assert row["laws"]["host-survives"]["scene"] == "no-direct-map-changes"


@pytest.mark.long
def test_a_comparison_answers_the_question(capsys: pytest.CaptureFixture[str]) -> None:
    assert gmem("compare", "none", "library", "--hypervisor", "gunyah", "--json") == 0
    table = json.loads(capsys.readouterr().out)
    assert {row["design"]: row["verdict"] for row in table["table"]} == {"none": "refuted", "library": "holds"}
    for row in table["table"]:
        assert row["scenes"] == list(SCENES)


def test_a_comparison_leaves_out_what_was_not_posted_for_a_hypervisor(capsys: pytest.CaptureFixture[str]) -> None:
    assert gmem("compare", "--hypervisor", "kvm", "--json", *LOAD) == 0
    assert "gunyah-v17" not in {row["design"] for row in json.loads(capsys.readouterr().out)["table"]}


@pytest.mark.long
def test_the_shortest_way_to_a_panic_is_found_without_being_told_where_to_look(
    capsys: pytest.CaptureFixture[str]
) -> None:
    assert gmem("check", "none", "--hypervisor", "gunyah", "--quick", "--json") == 2
    told = json.loads(capsys.readouterr().out)
    law = told["reports"][0]["laws"]["host-survives"]
    assert law["steps"] <= 9
    assert "load_unaligned_zeropad" in law["trace"]["steps"][-1]["primitive"]
    assert told["explored"] == FIRST_LOOK


def test_compare_as_json_holds_the_whole_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert gmem("compare", "--json", *LOAD) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["schema"] == "guest-memfd-compare/2"
    assert {row["design"] for row in table["table"]} == table["sentences"].keys()
    row = next(r for r in table["table"] if (r["design"], r["hypervisor"]) == ("none", "gunyah"))
    assert row["laws"]["host-survives"]["verdict"] == "refuted"
    assert row["cost"]["direct_map_writes"] == 0


def test_compare_of_a_set_of_designs(capsys: pytest.CaptureFixture[str]) -> None:
    assert gmem("compare", "--designs", "2026", "--hypervisor", "kvm,pkvm", "--parties", "vmm2", "-q") == 0
    out = capsys.readouterr().out
    assert re.search(r"^kvm: .*\n.*\n +kvm-7.4 +direct-map-v12 +firecracker-2026 +filemap-hook +alloc-unmapped$", out, re.M)
    assert re.search(r"^ +filemap-hook +alloc-unmapped$", out, re.M)        # on pkvm, for which v12 was not posted
    assert re.search(r"^no-direct-map +- +7 T +7 T +kept +kept$", out, re.M)


def test_compare_of_the_designs_with_huge_folios(capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--hypervisor", "kvm", "--parties", "vmm2", "--scene", "large-folio")
    assert gmem("compare", "--designs", "huge", *where, "-q") == 0
    out = capsys.readouterr().out
    assert re.search(r"^ +gmem-2m +hugetlb-rfc2 +hugetlb-2026$", out, re.M)
    assert re.search(r"^host-survives +kept +7 T\*' +kept$", out, re.M)
    assert re.search(r"^all-or-nothing +kept +kept +8 T'$", out, re.M)


def test_compare_has_a_dash_where_nothing_is_promised(capsys: pytest.CaptureFixture[str]) -> None:
    assert gmem("compare", "none", "filemap-hook", "--hypervisor", "kvm", "--parties", "vmm2", "-q") == 0
    out = capsys.readouterr().out
    assert re.search(r"^no-direct-map +- +kept$", out, re.M)
    assert "-: this design does not promise it.  kept: " in out


@pytest.mark.parametrize(("asked", "said"), [
    (("--designs", "2025"), "unknown set of designs '2025'; did you mean '2026'?"),
    (("none", "--designs", "2026"), "either designs or a set of them, not both (none and '2026')"),
    (("--designs", "2026", "--designs", "huge"), "one set of designs at a time, not '2026' and 'huge'"),
    (("none", "--law", "no-direct-map"), "design 'none' does not promise no-direct-map, and is not judged by it"),
])
def test_compare_of_what_is_no_set(capsys: pytest.CaptureFixture[str], asked: tuple[str, ...], said: str) -> None:
    assert said in refused(capsys, "compare", *asked)


@pytest.mark.parametrize("verb", [("cost",), ("draw", "library")])
def test_where_one_hypervisor_is_asked_for(capsys: pytest.CaptureFixture[str], verb: tuple[str, ...]) -> None:
    assert "--hypervisor takes one name here, not 'kvm,pkvm'" in refused(capsys, *verb, "--hypervisor", "kvm,pkvm")
    assert "unknown hypervisor 'kvn'; did you mean 'kvm'?" in refused(capsys, *verb, "--hypervisor", "kvn")


def test_a_set_is_compared_only_if_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert gmem("compare", "--parties", "drainer", "--json", "-q") == 0
    usual = json.loads(capsys.readouterr().out)["table"]
    assert gmem("compare", "--designs", "2026", "--parties", "drainer", "--json", "-q") == 0
    of_2026 = json.loads(capsys.readouterr().out)["table"]
    assert not {row["design"] for row in usual} & {*SETS["2026"]}
    assert {row["design"] for row in of_2026} == {*SETS["2026"]}
    assert {row["hypervisor"] for row in usual} == {"kvm", "pkvm", "gunyah", "tdx", "snp"}
    assert {row["hypervisor"] for row in of_2026} == {"kvm", "pkvm", "gunyah", "cca"}


def test_compare_with_a_limit_reached_exits_3(capsys: pytest.CaptureFixture[str]) -> None:
    assert gmem("compare", "library", "--hypervisor", "kvm", *LOAD, "--max-states", "3") == 3
    assert "?" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["designs", "hypervisors", "parties", "laws", "scenes", "scenarios"])
def test_list_names_what_there_is(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    assert gmem("list", kind, "--json") == 0
    entries = json.loads(capsys.readouterr().out)[kind]
    assert gmem("list", kind) == 0
    out = capsys.readouterr().out
    assert entries
    assert all(f"\n  {entry['name']} " in out for entry in entries)


def test_list_says_in_what_a_scene_differs(capsys: pytest.CaptureFixture[str]) -> None:
    assert gmem("list", "scenes", "--json") == 0
    scenes = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["scenes"]}
    assert scenes["quiet-free"]["differs_in"] == ["merges_leaves True", "init_on_free False"]
    assert gmem("list", "scenes") == 0
    out = capsys.readouterr().out
    assert "differs in: nothing: it is the plainest\n" in out
    assert "differs in: failures 0, refusals 1\n" in out


def test_who_reads_beside_a_vcpu_to_see_what_is_survived_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(READERS) <= set(PARTIES)
    assert gmem("check", "fixup", "--hypervisor", "pkvm", "--scene", "nothing-yet", "--quick", "--law", "progress") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert " aborts that the kernel survives " in out
    assert "zeropad's load_unaligned_zeropad" in out


def test_help_imports_neither_engine_nor_rich() -> None:
    done = run("--help", PYTHONPROFILEIMPORTTIME="1")
    assert "argparse" in done.stderr
    assert not re.search(r"\brich\b|multiprocessing|\bctypes\b|\bjson\b", done.stderr)
    ours = set(re.findall(r"\| +(guest_memfd\S*)", done.stderr))
    modules = ("", ".cli", ".cli.room", ".cli.stop", ".compat", ".errors", ".printable")
    assert ours == {f"guest_memfd{name}" for name in modules}


def test_a_reader_who_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m guest_memfd.cli.main list | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=600, check=False)
    assert done.stderr == ""


# -- files -------------------------------------------------------------------------------------------------------------


def test_output_goes_to_a_file_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    assert gmem("check", "none", "--hypervisor", "pkvm", *LOAD, "--json", "-o", str(file)) == 0
    assert capsys.readouterr().out == ""
    assert json.loads(file.read_text())["verdict"] == "holds"
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_an_unwritable_output_is_found_out_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guest_memfd.cli.options.compare", lambda *_, **__: pytest.fail("explored before looking"))
    (tmp_path / "file").touch()
    for where in (tmp_path / "missing" / "out", tmp_path, tmp_path / "file" / "out"):
        assert str(where) in refused(capsys, "check", "none", "-o", str(where))
        assert str(where) in refused(capsys, "compare", "-o", str(where))
    assert "for traces" in refused(capsys, "check", "none", "--save-traces", str(tmp_path / "file" / "traces"))


def test_a_refused_request_leaves_no_folder_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, "check", "none", "--parties", "nobody", "--save-traces", str(tmp_path / "traces"))
    assert not (tmp_path / "traces").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o555)
    assert "Permission denied" in refused(capsys, "check", "none", "-o", str(tmp_path / "out"))
    assert "Permission denied" in refused(capsys, "check", "none", "--save-traces", str(tmp_path))


def test_a_full_device_is_one_line() -> None:
    done = run("list", "-o", "/dev/full")
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)
    assert "No space left on device" in done.stderr


def test_a_refused_request_leaves_the_old_output_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out"
    file.write_text("old")
    refused(capsys, "check", "none", "--parties", "nobody", "-o", str(file))
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_without_arguments_three_commands_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert gmem() == 4
    told = capsys.readouterr()
    assert told.out == ""
    shown = re.findall(r"^  gmem (\S+)", told.err, re.M)
    assert shown == ["compare", "check", "run"]
    assert max(map(len, told.err.splitlines())) <= 80


def test_the_package_can_be_run() -> None:
    done = subprocess.run([sys.executable, "-m", "guest_memfd", "list", "laws"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split("\n")[0], done.stderr) == (0, "laws", "")


@pytest.mark.parametrize(("argv", "says"), [
    ("--jobs", "unknown option '--jobs'"),
    ("chek", "unknown verb 'chek'; did you mean 'check'?"),
    ("check", "DESIGN"),
    ("check libary", "unknown design 'libary'; did you mean 'library'?"),
    ("check none --hypervisor gunya", "unknown hypervisor 'gunya'; did you mean 'gunyah'?"),
    ("check none --parties vcpu,zeropat", "unknown party 'zeropat'; did you mean 'zeropad'?"),
    ("check none --scene crosed", "unknown scene 'crosed'; did you mean 'crossed'?"),
    ("check none --scene crossed,crossed", "--scene names 'crossed' twice"),
    ("check none --scene ,", "--scene names nothing"),
    ("check none --parties creator", "'creator' cannot exist with design 'none' under 'kvm' in scene 'two-pages'"),
    ("check none --parties vmm,pinner", "two of these are the same task doing different things"),
    ("check none --law host-survive", "unknown law 'host-survive'; did you mean 'host-survives'?"),
    ("check none --scenario hibernat", "unknown scenario 'hibernat'; did you mean 'hibernate'?"),
    ("check none --scenario hibernate --parties vcpu", "not both"),
    ("check gunyah-v17 --hypervisor kvm", "was posted for gunyah only"),
    ("check library --hypervisor gunyah --parties pfn-cache", "'pfn-cache' cannot exist"),
    ("check none --parties vcpu,vcpu", "--parties names 'vcpu' twice"),
    ("check none --parties ,", "--parties names nothing"),
    ("check none --max-states 0", "must be at least 1, not 0"),
    ("check none --max-states -5", "must be at least 1, not -5"),
    ("check none --max-states many", "'many' is not a whole number"),
    ("check none --max-seconds 0", "must be more than 0, not 0"),
    ("check none --max-seconds nan", "'nan' is not a number of seconds"),
    ("check none --failures -1", "not -1"),
    ("check none --failures 1000", "not 1000"),
    ("check none --jobs 0", "must be at least 1, not 0"),
    ("check none --jsn", "unknown option '--jsn'; did you mean '--json'?"),
    ("check none --json --ktap", "exclude each other"),
    ("check none library", "unexpected argument 'library'"),
    ("compare nome", "unknown design 'nome'; did you mean 'none'?"),
    ("list desings", "'desings'; did you mean 'designs'?"),
    ("replay", "FILE"),
])
def test_bad_input_is_one_line_that_says_what_would_be_right(
    capsys: pytest.CaptureFixture[str], argv: str, says: str
) -> None:
    assert says in refused(capsys, *argv.split())


def test_our_own_failure_exits_1_and_asks_for_a_report(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.delenv("GMEM_DEBUG", raising=False)
    monkeypatch.setattr("guest_memfd.cli.options.compare", fail)
    assert gmem("check", "none") == 1
    err = capsys.readouterr().err
    assert err.startswith("gmem: internal error: ZeroDivisionError: two")
    assert "please report" in err
    assert err.count("\n") == 1


def test_an_interrupt_is_quiet(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("guest_memfd.cli.options.compare", interrupt)
    assert gmem("check", "none") == 130
    assert capsys.readouterr() == ("", "")


# -- traces ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A saved trace."""
    assert gmem("check", "none", "--hypervisor", "gunyah", *LOAD, "--save-traces", str(tmp_path / "traces")) == 2
    out = capsys.readouterr().out
    (file,) = (tmp_path / "traces").iterdir()
    assert file.name == "none-gunyah-host-survives.json"
    assert f"gmem replay {file}" in out
    return file


def test_replay_gives_the_same_verdict(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gmem("replay", str(saved)) == 2
    assert capsys.readouterr().out.startswith("the same verdict: host-survives is broken, none on gunyah, 9 steps")


def test_replay_says_where_it_diverges_and_why(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = json.loads(saved.read_text())
    trace["steps"][5]["primitive"] = "lock_folio"
    saved.write_text(json.dumps(trace))
    for verb in ("replay", "explain"):
        assert gmem(verb, str(saved)) == 3
        out = " ".join(capsys.readouterr().out.split())
        assert "diverges at step 6 of 9 expected vcpu to do lock_folio(pfn0), it does clear_folio(pfn0)" in out


def test_explain_shows_the_same_screen_as_check(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gmem("explain", str(saved)) == 0
    explained = capsys.readouterr().out
    gmem("check", "none", "--hypervisor", "gunyah", *LOAD)
    checked = capsys.readouterr().out
    screen = explained[:explained.index("again\n")]
    assert screen.startswith("host-survives is broken: none on gunyah, 9 steps of vcpu, zeropad\n")
    assert screen in checked


def test_explain_and_replay_as_json(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gmem("replay", str(saved), "--json") == 2
    again = json.loads(capsys.readouterr().out)
    assert (again["schema"], again["same"], again["divergence"]) == ("guest-memfd-replay/1", True, None)
    assert gmem("explain", str(saved), "--json") == 0
    trace = json.loads(capsys.readouterr().out)
    assert trace["schema"] == "guest-memfd-explain/1"
    assert trace["scene"] == "two-pages"
    assert trace["trace"]["steps"][7]["changed"] == ["pfn0: owner host -> guest, host stage 2 mapped -> withheld"]


@pytest.mark.parametrize("verb", ["explain", "replay"])
def test_a_file_that_is_no_trace_is_refused(saved: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    whole = saved.read_text()
    for text, says in [
        *((whole[:length], "is truncated") for length in range(1, len(whole) - 2, 61)),
        ("all is well", "is not JSON"),
        ("[1, 2]", "is no trace"),
        ("{}", "is no trace"),
        (whole.replace(SCHEMA, "guest-memfd-trace/9"), "is of schema 'guest-memfd-trace/9'"),
        (whole.replace('"steps"', '"stairs"'), "lacks field 'steps'"),
        (whole.replace('"none"', '"nome"'), "unknown design 'nome'; did you mean 'none'?"),
    ]:
        saved.write_text(text)
        assert says in refused(capsys, verb, str(saved))
    saved.write_bytes(b"\xff\xfe")
    assert "is no text" in refused(capsys, verb, str(saved))
    assert "No such file" in refused(capsys, verb, str(saved.with_name("missing")))
