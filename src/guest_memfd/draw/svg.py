"""The life of a page as a picture, in SVG.

The same life is the same file. A node lies in the column of its direct map and in the
row of its attribute and owner.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from math import hypot
from typing import NamedTuple

from guest_memfd.draw.life import (
    MAPPED,
    NO_ATTRIBUTE,
    NO_FILE,
    NOBODY,
    OUT,
    ZAPPED,
    Edge,
    Life,
    Node,
    letters,
    numbered,
    ordered,
)
from guest_memfd.words.pagestate import OWNERS

WIDTH, HEIGHT = 166, 50
ACROSS, DOWN = 250, 105
LEFT, TOP, BELOW = 257, 100, 130
COLUMNS = {NOBODY: "no folio in the page cache", MAPPED: "in the direct map", ZAPPED: "zapped, not flushed yet",
           OUT: "out of the direct map"}
ROWS = (("private", "host"), ("private", "guest"), ("private", "borrowed"), ("shared", "borrowed"), ("shared", "shared"),
        ("shared", "host"), *((NO_ATTRIBUTE, owner) for owner in OWNERS))
"""Attribute and owner, from the top down; a picture has those of them that are reached."""
LINE = 19
"""Between two lines of words."""
FILLS = {"host": "#dbe9fb", "guest": "#fbe0c8", "shared": "#dff2d8", "borrowed": "#f3e3f7", NOBODY: "#eeeeee"}
"""By owner."""
BEND, BEND_ACROSS, BEND_DOWN = 0.09, 0.17, 0.27
"""How far an edge bends, as a part of its length: between neighbours, past other columns, past other rows."""
RADIUS = 10


class Spot(NamedTuple):
    """A place in the picture."""

    x: float
    y: float


def picture(found: Life, title: str = "", words: bool = False) -> str:
    """The whole file; *title* at the top, and where *words* are wanted the primitive of each arrow below."""
    plan = _Plan(found)
    said = list(_said(found, plan)) if words else []
    above = 40 if title else 0
    place = f'y="{-above}" ' if title else ""
    width, height = LEFT + len(COLUMNS) * ACROSS, plan.bottom + BELOW + len(said) * LINE
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {-above} {width} {height + above}" width="{width}" '
        f'height="{height + above}" font-family="sans-serif" font-size="13">',
        f"<title>{escape(title or 'The life of a page')}</title>",
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0,0 L10,5 L0,10 z" fill="#444444"/></marker></defs>',
        f'<rect {place}width="{width}" height="{height + above}" fill="#ffffff"/>',
        *([_text(Spot(20, -10), title, "start", "bold")] if title else []),
        *_heads(plan),
        *(plan.curve(edge) for _, edge in numbered(found)),
        *(plan.box(each) for each in ordered(found)),
        *(plan.number(number, edge) for number, edge in numbered(found)),
        *said,
        "</svg>", ""])


# Under the picture: what each arrow is, and in which operations it is taken.
def _said(found: Life, plan: _Plan) -> Iterator[str]:
    for at, (number, edge) in enumerate(numbered(found), 1):
        ops = ", ".join(sorted(found.edges[edge])).replace("`", "")
        spot = Spot(20, plan.bottom + BELOW - LINE + at * LINE)
        yield _text(spot, f"{number}  {edge.primitive}, in {ops}", "start", "normal")


def _heads(plan: _Plan) -> Iterator[str]:
    for column, words in enumerate(COLUMNS.values()):
        yield _text(Spot(LEFT + column * ACROSS + WIDTH / 2, TOP - 62), words, "middle", "bold")
    for row, (attribute, owner) in enumerate(plan.rows):
        y = TOP + row * DOWN
        yield _text(Spot(20, y - 2), attribute if attribute == NO_ATTRIBUTE else f"attribute {attribute}", "start", "bold")
        yield _text(Spot(20, y + 16), f"owner {owner}", "start", "normal")


def _text(at: Spot, words: str, anchor: str, weight: str) -> str:
    return (f'<text x="{at.x:g}" y="{at.y:g}" text-anchor="{anchor}" font-weight="{weight}" fill="#222222">'
            f"{escape(words)}</text>")


class _Plan:
    # Where everything lies: the rows that are reached, one below the other.

    def __init__(self, found: Life) -> None:
        there = {(each.attribute, each.owner if each.cached else "host") for each in found.nodes}
        self.found, self.letters = found, letters(found)
        self.rows = [row for row in ROWS if row in there]
        self.bottom = TOP + (len(self.rows) - 1) * DOWN

    def centre(self, each: Node) -> Spot:
        """Where *each* lies; without a folio it has no owner, and lies with the host's. A file that is gone lies between."""
        if each.attribute == NO_FILE:
            return Spot(LEFT + WIDTH / 2, TOP + (len(self.rows) - 1) * DOWN / 2 + (DOWN if len(self.rows) % 2 else 0))
        owner = each.owner if each.cached else "host"
        row, column = self.rows.index((each.attribute, owner)), list(COLUMNS).index(each.direct)
        return Spot(LEFT + column * ACROSS + WIDTH / 2, TOP + row * DOWN)

    def box(self, each: Node) -> str:
        """The box of *each*, with its letter and how many states say the same."""
        at, begins = self.centre(each), self.found.start.get(each)
        what = f"{self.letters[each]}: " + (f"{each.attribute}, {each.owner}" if each.cached else each.attribute)
        stroke = 'stroke="#000000" stroke-width="2.5"' if begins else 'stroke="#777777" stroke-width="1"'
        lines = [
            f'<rect x="{at.x - WIDTH / 2:g}" y="{at.y - HEIGHT / 2:g}" width="{WIDTH}" height="{HEIGHT}" rx="7" '
            f'fill="{FILLS[each.owner]}" {stroke}/>',
            _text(Spot(at.x, at.y - 4), what, "middle", "bold"),
            _text(Spot(at.x, at.y + 15), f"{self.found.nodes[each]:,} states", "middle", "normal"),
        ]
        if begins:
            y = at.y - HEIGHT / 2 - 6 if at.y == TOP else at.y + HEIGHT / 2 + 34
            lines.append(_text(Spot(at.x, y), f"{begins} begins here", "middle", "normal"))
        return "\n".join(lines)

    # The point that the curve of an edge bends to; twice as far out as the curve itself gets.
    def _control(self, edge: Edge) -> Spot:
        source, target = self.centre(edge.source), self.centre(edge.target)
        x, y = target.x - source.x, target.y - source.y
        bend = 2 * (BEND_ACROSS if abs(x) > ACROSS else BEND_DOWN if abs(y) > DOWN else BEND)
        half = Spot((source.x + target.x) / 2, (source.y + target.y) / 2)
        # To the other side where the number would lie on a box.
        if self._on_a_box(Spot(half.x + y * bend / 2, half.y - x * bend / 2)):
            bend = -bend
        return Spot(half.x + y * bend, half.y - x * bend)

    def _on_a_box(self, at: Spot) -> bool:
        return any(abs(at.x - box.x) < WIDTH / 2 + RADIUS and abs(at.y - box.y) < HEIGHT / 2 + RADIUS
                   for box in map(self.centre, self.found.nodes))

    def _ends(self, edge: Edge) -> tuple[Spot, Spot, Spot]:
        control = self._control(edge)
        return _border(self.centre(edge.source), control), control, _border(self.centre(edge.target), control)

    def curve(self, edge: Edge) -> str:
        """The arrow of *edge*."""
        start, control, end = self._ends(edge)
        return (f'<path d="M{start.x:.1f},{start.y:.1f} Q{control.x:.1f},{control.y:.1f} {end.x:.1f},{end.y:.1f}" '
                'fill="none" stroke="#444444" stroke-width="1.3" marker-end="url(#head)"/>')

    def number(self, number: int, edge: Edge) -> str:
        """The *number* of *edge*, in the middle of its arrow."""
        start, control, end = self._ends(edge)
        at = Spot((start.x + end.x) / 4 + control.x / 2, (start.y + end.y) / 4 + control.y / 2)
        return (f'<circle cx="{at.x:.1f}" cy="{at.y:.1f}" r="{RADIUS}" fill="#ffffff" stroke="#444444"/>\n'
                f'<text x="{at.x:.1f}" y="{at.y + 4:.1f}" text-anchor="middle" font-size="11" '
                f'fill="#000000">{number}</text>')


# Where the line from the middle of a box to *other* leaves the box.
def _border(middle: Spot, other: Spot) -> Spot:
    x, y = other.x - middle.x, other.y - middle.y
    part = min(WIDTH / 2 / abs(x) if x else 1e9, HEIGHT / 2 / abs(y) if y else 1e9)
    # Two units off: an arrow's head that touches the box looks as if it went in.
    gap = 2 / hypot(x, y)
    return Spot(middle.x + x * (part + gap), middle.y + y * (part + gap))
