"""The life of a page, and its picture: every state is in it, nothing lies on anything else, and each design has its own."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest

from guest_memfd.cli.main import main
from guest_memfd.designs import DESIGNS
from guest_memfd.draw.life import MAPPED, NO_ATTRIBUTE, OUT, ZAPPED, Life, life, numbered
from guest_memfd.draw.svg import HEIGHT, WIDTH, picture
from guest_memfd.hypervisors import HYPERVISORS

SVG = "{http://www.w3.org/2000/svg}"
WITH_VCPU = [("two-pages", ("vcpu",))]


SMALL = [("two-pages", ("vcpu", "vmm2")), ("two-pages", ("vcpu2", "stop"))]


@cache
def known_life() -> Life:
    return life(runs=SMALL)


def test_no_page_is_the_guest_s_while_the_host_maps_it() -> None:
    found = known_life()
    assert {each.direct for each in found.nodes if each.owner == "guest"} == {OUT}
    assert [edge.source for _, edge in numbered(found) if edge.target.owner == "guest"] == [("private", True, "host", OUT)]
    assert {edge.target.attribute for _, edge in numbered(found) if edge.source.owner == "guest"} == {"private"}


def test_another_design_has_another_life() -> None:
    found = life("none", WITH_VCPU)
    assert {each.direct for each in found.nodes if each.owner == "guest"} == {MAPPED}


def test_a_driver_that_does_not_flush_gives_the_page_away_with_its_translation() -> None:
    found = life("gunyah-v17", WITH_VCPU, "gunyah")
    assert {each.attribute for each in found.nodes} == {NO_ATTRIBUTE}
    assert [edge.source.direct for _, edge in numbered(found) if edge.target.owner == "guest"] == [ZAPPED]


def test_every_state_is_counted_and_reached() -> None:
    found = known_life()
    assert sum(found.nodes.values()) == found.states
    reached = {*found.start} | {edge.target for edge in found.edges}
    assert reached == {*found.nodes}
    assert len(found.start) == len({scene for scene, _ in SMALL})


POSTED = [(design, hypervisor) for design in DESIGNS for hypervisor in DESIGNS[design].hypervisors or HYPERVISORS]


@pytest.mark.parametrize(("design", "hypervisor"), [
    pytest.param(design, on, marks=[] if on == "gunyah" else pytest.mark.long) for design, on in POSTED])
def test_every_design_has_a_picture_without_overlaps(design: str, hypervisor: str) -> None:
    found = life(design, [("two-pages", ("vcpu2", "stop"))], hypervisor)
    svg = ElementTree.fromstring(picture(found, "a <title>", words=True))
    assert_drawn(svg, found)
    said = [each.text or "" for each in svg.findall(f"{SVG}text")]
    assert "a <title>" in said
    for number, edge in numbered(found):
        assert any(text.startswith(f"{number}  {edge.primitive}, in ") for text in said)


def assert_drawn(svg: ElementTree.Element, found: Life) -> None:
    ground, *boxes = svg.findall(f"{SVG}rect")
    assert len(boxes) == len(found.nodes)
    assert len(svg.findall(f"{SVG}circle")) == len(found.edges)
    left, top, width, height = map(float, svg.attrib["viewBox"].split())
    assert (float(ground.attrib["width"]), float(ground.attrib["height"])) == (width, height)
    spots = [(float(box.attrib["x"]), float(box.attrib["y"])) for box in boxes]
    for at, (x, y) in enumerate(spots):
        assert left <= x <= width - WIDTH
        assert top <= y <= top + height - HEIGHT
        assert all(abs(x - x2) >= WIDTH or abs(y - y2) >= HEIGHT for x2, y2 in spots[at + 1:])
    for circle in svg.findall(f"{SVG}circle"):
        at_x, at_y = float(circle.attrib["cx"]), float(circle.attrib["cy"])
        assert not any(x < at_x < x + WIDTH and y < at_y < y + HEIGHT for x, y in spots)


def test_the_picture_has_all_of_it_and_boxes_do_not_overlap() -> None:
    assert_drawn(ElementTree.fromstring(picture(known_life())), known_life())


def test_draw_writes_a_picture(tmp_path: Path) -> None:
    assert main(["draw", "guestmem-rfc1", "--hypervisor", "pkvm", "-o", str(tmp_path / "life.svg")]) == 0
    svg = ElementTree.parse(tmp_path / "life.svg").getroot()
    assert (svg.findtext(f"{SVG}title") or "").startswith("The life of a page: guestmem-rfc1 on pkvm")


@pytest.mark.parametrize(("argv", "says"), [
    (["libary"], "unknown design 'libary'; did you mean 'library'?"),
    (["none", "--hypervisor", "gunya"], "unknown hypervisor 'gunya'; did you mean 'gunyah'?"),
    (["gunyah-v17", "--hypervisor", "kvm"], "was posted for gunyah only"), (["none", "-o", "/no/where"], "cannot write")])
def test_bad_input(capsys: pytest.CaptureFixture[str], argv: list[str], says: str) -> None:
    assert main(["draw", *argv]) == 4
    assert says in capsys.readouterr().err
