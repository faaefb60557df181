"""All parties of a scene at once, at random: the library breaks nothing in a million steps, a mistake is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mistakes
import pytest

from guest_memfd.cli.main import main
from guest_memfd.explore.replay import replay
from guest_memfd.explore.trace import load
from guest_memfd.explore.world.scenario import world
from guest_memfd.explore.world.shorten import shortened
from guest_memfd.explore.world.walk import Stumble, walk
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.scenarios import SCENES

SEED = 20_261_126


@pytest.mark.parametrize("hypervisor", [*HYPERVISORS])
def test_library_breaks_nothing_in_a_short_walk(hypervisor: str) -> None:
    for scene in SCENES:
        assert walk(world("library", hypervisor, scene=scene), 300, SEED).found == [], scene


def test_a_walk_comes_across_a_mistake_and_its_seed_does_again() -> None:
    there = world(mistakes.PoisonRestored, "kvm")
    found = walk(there, 2_000, SEED).found
    assert {stumble.finding.law for stumble in found} == {"poison-contained"}
    assert found[0] in walk(there, 1, found[0].seed).found


@pytest.mark.long
@pytest.mark.parametrize(("mistake", "law"), [("PunchTellsNoCache", "no-stale-mapping"), ("FileNotHeld", "lifetimes")])
def test_a_walk_comes_across_mistakes_that_are_rare(mistake: str, law: str) -> None:
    assert law in {stumble.finding.law for stumble in walk(world(getattr(mistakes, mistake), "kvm"), 160_000, SEED).found}


def test_footprints_become_rare() -> None:
    there = world("none", "kvm", scene="no-direct-map-changes")
    short, long = walk(there, 500, SEED), walk(there, 8_000, SEED)
    assert short.footprints < long.footprints < 16 * short.footprints / 2
    assert 0 < short.last_new <= short.steps
    ended = walk(there, 1 << 40, SEED, quiet=50)
    assert 50 <= ended.steps - ended.last_new < ended.steps


# -- made shorter --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("design", "hypervisor", "steps"), [("none", "gunyah", 1_000), ("gunyah-v17", "gunyah", 100)])
def test_what_is_made_shorter_is_as_short_as_the_explorer_finds_it(design: str, hypervisor: str, steps: int) -> None:
    there = world(design, hypervisor)
    for stumble in walk(there, steps, SEED).found:
        short = shortened(there, stumble)
        finding = short.finding
        assert (finding.law, finding.evidence) == (stumble.finding.law, stumble.finding.evidence)
        assert len(finding.steps) <= len(stumble.finding.steps)
        assert {*short.parties} <= {*stumble.parties}
        least = there.explorer([name for name in there.programs if name in short.parties]).run()
        assert len(finding.steps) == next(
            len(each.steps) for each in least.findings if (each.law, each.evidence) == (finding.law, finding.evidence))


def test_what_cannot_be_made_shorter_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guest_memfd.explore.world.shorten.FEW", 0)
    there = world("none", "gunyah")
    stumble = next(each for each in walk(there, 1_000, SEED).found if each.finding.law == "host-survives")
    once = shortened(there, stumble)
    assert len(once.parties) == 2
    assert len(once.finding.steps) < len(stumble.finding.steps)
    # No single step can be left out, or the loop would have left it out.
    again = shortened(there, Stumble(once.seed, once.parties, once.finding))
    assert again == once


# -- the command ---------------------------------------------------------------------------------------------------------

def test_a_finding_is_saved_and_replays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["walk", "none", "--hypervisor", "gunyah", "--scene", "two-pages", "--steps", "2000",
            "--save-traces", str(tmp_path)]
    assert main(argv) == 2
    told = capsys.readouterr().out
    assert "none on gunyah in two-pages: 2,0" in told
    assert "host-survives is broken: none on gunyah" in told
    for saved in tmp_path.iterdir():
        assert replay(load(saved)).same, saved
    assert {"none-gunyah-host-survives.json"} <= {saved.name for saved in tmp_path.iterdir()}
    assert main(argv) == 2
    assert capsys.readouterr().out == told


def test_nothing_found_proves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["walk", "library", "--hypervisor", "kvm", "--scene", "for-good", "--steps", "500"]) == 3
    assert "nothing is proved" in capsys.readouterr().out


@pytest.mark.parametrize(("argv", "said"), [
    (["libary"], "unknown design 'libary'; did you mean 'library'"),
    (["library", "--scene", "nowhere"], "unknown scene 'nowhere'"),
    (["library", "--hypervisor", "xen"], "unknown hypervisor 'xen'"),
    (["library", "--steps", "0"], "--steps must be at least 1, not 0"),
    (["library", "--quiet-for", "-1"], "--quiet-for must be at least 1, not -1"),
    (["gunyah-v17", "--hypervisor", "kvm"], "design 'gunyah-v17' was posted for gunyah only, not for 'kvm'")])
def test_bad_input(argv: list[str], said: str, capsys: pytest.CaptureFixture[Any]) -> None:
    assert main(["walk", *argv]) == 4
    assert said in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("hypervisor", [*HYPERVISORS])
def test_library_breaks_nothing_in_many_steps(hypervisor: str) -> None:
    for number, scene in enumerate(SCENES):
        walked = walk(world("library", hypervisor, scene=scene), 8_000, SEED + 1_000_000 * number)
        print(f"{hypervisor}, {scene}: {walked.steps:,} steps, {walked.schedules:,} schedules from seed "
              f"{SEED + 1_000_000 * number}, {walked.footprints:,} footprints")
        assert walked.found == [], scene
