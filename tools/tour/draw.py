"""The life of a page as a picture, in SVG.

The same life is the same file. A node lies in the column of its direct map and in the
row of its attribute and owner.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from math import hypot
from typing import NamedTuple

from tour.life import MAPPED, NO_FILE, NOBODY, OUT, ZAPPED, Edge, Life, Node, letters, numbered, ordered

WIDTH, HEIGHT = 166, 50
ACROSS, DOWN = 250, 105
LEFT, TOP, BELOW = 257, 100, 130
COLUMNS = {NOBODY: "no folio in the page cache", MAPPED: "in the direct map", ZAPPED: "zapped, not flushed yet",
           OUT: "out of the direct map"}
ROWS = (("private", "host"), ("private", "guest"), ("private", "borrowed"), ("shared", "borrowed"), ("shared", "shared"),
        ("shared", "host"))
"""Attribute and owner, from the top down."""
FILLS = {"host": "#dbe9fb", "guest": "#fbe0c8", "shared": "#dff2d8", "borrowed": "#f3e3f7", NOBODY: "#eeeeee"}
"""By owner."""
BEND, BEND_ACROSS, BEND_DOWN = 0.09, 0.17, 0.27
"""How far an edge bends, as a part of its length: between neighbours, past other columns, past other rows."""
RADIUS = 10


class Spot(NamedTuple):
    """A place in the picture."""

    x: float
    y: float


def picture(found: Life) -> str:
    """The whole file."""
    width, height = LEFT + len(COLUMNS) * ACROSS, TOP + (len(ROWS) - 1) * DOWN + BELOW
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        "<title>The life of a page</title>",
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0,0 L10,5 L0,10 z" fill="#444444"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        *_heads(),
        *(_curve(edge) for _, edge in numbered(found)),
        *(_box(each, found) for each in ordered(found)),
        *(_number(number, edge) for number, edge in numbered(found)),
        "</svg>", ""])


def _heads() -> Iterator[str]:
    for column, words in enumerate(COLUMNS.values()):
        yield _text(Spot(LEFT + column * ACROSS + WIDTH / 2, TOP - 62), words, "middle", "bold")
    for row, (attribute, owner) in enumerate(ROWS):
        y = TOP + row * DOWN
        yield _text(Spot(20, y - 2), f"attribute {attribute}", "start", "bold")
        yield _text(Spot(20, y + 16), f"owner {owner}", "start", "normal")


def _text(at: Spot, words: str, anchor: str, weight: str) -> str:
    return (f'<text x="{at.x:g}" y="{at.y:g}" text-anchor="{anchor}" font-weight="{weight}" fill="#222222">'
            f"{escape(words)}</text>")


def centre(each: Node) -> Spot:
    """Where *each* lies; without a folio it has no owner, and lies with the host's. A file that is gone lies between."""
    if each.attribute == NO_FILE:
        return Spot(LEFT + WIDTH / 2, TOP + (len(ROWS) - 1) * DOWN / 2)
    owner = each.owner if each.cached else "host"
    row, column = ROWS.index((each.attribute, owner)), list(COLUMNS).index(each.direct)
    return Spot(LEFT + column * ACROSS + WIDTH / 2, TOP + row * DOWN)


def _box(each: Node, found: Life) -> str:
    at, begins = centre(each), found.start.get(each)
    what = f"{letters(found)[each]}: " + (f"{each.attribute}, {each.owner}" if each.cached else each.attribute)
    stroke = 'stroke="#000000" stroke-width="2.5"' if begins else 'stroke="#777777" stroke-width="1"'
    lines = [
        f'<rect x="{at.x - WIDTH / 2:g}" y="{at.y - HEIGHT / 2:g}" width="{WIDTH}" height="{HEIGHT}" rx="7" '
        f'fill="{FILLS[each.owner]}" {stroke}/>',
        _text(Spot(at.x, at.y - 4), what, "middle", "bold"),
        _text(Spot(at.x, at.y + 15), f"{found.nodes[each]:,} states", "middle", "normal"),
    ]
    if begins:
        y = at.y - HEIGHT / 2 - 6 if at.y == TOP else at.y + HEIGHT / 2 + 34
        lines.append(_text(Spot(at.x, y), f"{begins} begins here", "middle", "normal"))
    return "\n".join(lines)


# The point that the curve of an edge bends to; twice as far out as the curve itself gets.
def _control(edge: Edge) -> Spot:
    source, target = centre(edge.source), centre(edge.target)
    x, y = target.x - source.x, target.y - source.y
    bend = 2 * (BEND_ACROSS if abs(x) > ACROSS else BEND_DOWN if abs(y) > DOWN else BEND)
    return Spot((source.x + target.x) / 2 + y * bend, (source.y + target.y) / 2 - x * bend)


def _curve(edge: Edge) -> str:
    control = _control(edge)
    start, end = _border(centre(edge.source), control), _border(centre(edge.target), control)
    return (f'<path d="M{start.x:.1f},{start.y:.1f} Q{control.x:.1f},{control.y:.1f} {end.x:.1f},{end.y:.1f}" '
            'fill="none" stroke="#444444" stroke-width="1.3" marker-end="url(#head)"/>')


# Where the line from the middle of a box to *other* leaves the box.
def _border(middle: Spot, other: Spot) -> Spot:
    x, y = other.x - middle.x, other.y - middle.y
    part = min(WIDTH / 2 / abs(x) if x else 1e9, HEIGHT / 2 / abs(y) if y else 1e9)
    gap = 2 / hypot(x, y)
    return Spot(middle.x + x * (part + gap), middle.y + y * (part + gap))


def _number(number: int, edge: Edge) -> str:
    control = _control(edge)
    start, end = _border(centre(edge.source), control), _border(centre(edge.target), control)
    at = Spot((start.x + end.x) / 4 + control.x / 2, (start.y + end.y) / 4 + control.y / 2)
    return (f'<circle cx="{at.x:.1f}" cy="{at.y:.1f}" r="{RADIUS}" fill="#ffffff" stroke="#444444"/>\n'
            f'<text x="{at.x:.1f}" y="{at.y + 4:.1f}" text-anchor="middle" font-size="11" fill="#000000">{number}</text>')
