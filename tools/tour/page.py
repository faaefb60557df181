"""docs/tour.md, written from a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from guest_memfd.words.primitives import Folio
from tour.follow import Been
from tour.look import ROWS, Look
from tour.quote import quote
from tour.ride import GFN, INDEX, IPA, PAGES, PROGRAM
from tour.wrap import wrapped

SOURCE = "src/guest_memfd/"
SMALL = 10
"""Numbers from here on are shown in hexadecimal."""

HEAD = """\
# A tour: one page is lent, from the ioctl to the TLB

This document follows one page of memory through the code, layer by layer. A protected guest of pKVM stores to a page that it
has never touched, while the VMM is in the ioctl KVM_RUN. Before the ioctl returns, the page is taken from the host and given
to the guest. *Lend* is this project's word for that under every hypervisor: from then on the guest has the page alone, until
it is taken back. pKVM's own word is *donate*. After the tour comes [a picture of the states a page can be
in](#the-life-of-a-page).

No kernel runs here. All of it is Python: the guest_memfd library that the project proposes, and an emulated arm64 machine
with Linux 7.3's direct map and pKVM ([emulated-host.md](emulated-host.md)). The page tables, the TLBs and the guest's
instructions are real ones, in emulated memory. Everything below comes from a run on it: the order of the stops, the
numbers, and the lines of code. A script writes this document (`make tour`), and `tests/test_tour.py` fails if the code does
something else. Each stop names the place that does the same in Linux, where there is one. The [glossary](glossary.md)
explains the words that this project uses in its own way.

| stop | where | function |
| --- | --- | --- |
{stops}

## Before the tour

Five take part. The *VMM* is a process. *Linux* runs at EL1: KVM, the guest_memfd library, the memory management. *EL2* is
the part of pKVM that Linux cannot overrule. The *guest* runs at EL1, too, with a stage 2 of its own. The *CPUs* walk the
page tables, and their TLBs keep what they have found.

An address goes through two page tables. Stage 1 belongs to what runs, Linux or the guest. Stage 2 belongs to EL2, and
there is one for the host and one for each guest. The guest of this tour has not turned its stage 1 on.

The guest is this program:

```asm
{program}```

It runs in a VM with one memslot. The memory of the memslot is a guest_memfd of {pages} pages, and all its pages are
private. The guest has run up to the byte on the console (`strb`) and is about to store 42 (`str`). The page that it stores
to is page {index} of the file, at guest physical address {ipa:#x}, so its gfn is {gfn:#x}. This is what the machine says of
that page, and of the frame that it will get, before the first stop:

| | now | what it is |
| --- | --- | --- |
{rows}

An entry of a page table is shown as a number, then its level (L3: it maps one page), what it is, and its output address
(OA). At each stop a table says which of these change between this stop and the next one.

In the code of the library, `yield from` stands before everything that has to be asked for: a step of the host, or a part of
the library that asks for such steps. What comes back is the result, 0 or -errno for most.
"""

END = """\
## What has changed

The ioctl is over, and the guest has turned itself off. This is what was said of the page at the first stop, and what is said
of it now:

{table}
Two tables keep the host out now. In stage 1, Linux's own table, the direct map has no valid entry for the frame. In stage 2,
EL2's table for the host, the frame has no valid entry either. The *design* `none`, another library for the same files,
leaves the first one as it was: with it the run does not come to stop {zap}. [The table in the
README](../README.md#the-answer) says what that leads to.

When the VM ends, the page goes the other way: the library asks pKVM for it (`reclaim`), pKVM fills it with zeros, and the
library puts it back into the direct map before it frees the folio. [library.md](library.md) has all procedures, their locks,
and what each of them leaves behind when it fails.
"""


def page(been: Sequence[Been], life: str) -> str:
    """All of the document: a tour past all that has *been*, and then *life*."""
    first, last = been[0].before, been[-1].after
    rows = "\n".join(f"| {row} | {first[row]} | {meaning} |" for row, meaning in ROWS.items())
    zap = next(number for number, one in enumerate(been, 1) if "direct map" in one.stop.title)
    parts = [
        HEAD.format(program=PROGRAM, ipa=IPA, gfn=GFN, index=INDEX, pages=PAGES, rows=rows, stops=_stops(been)),
        *(_stop(number, one, "next stop" if one is not been[-1] else "end of the ioctl")
          for number, one in enumerate(been, 1)),
        END.format(table=_table(first, last), zap=zap),
        life,
    ]
    return wrapped("\n".join(parts))


def _stops(been: Sequence[Been]) -> str:
    lines = []
    for number, one in enumerate(been, 1):
        files = dict.fromkeys(quote(point).file.removeprefix(SOURCE) for point in one.stop.points)
        names = [point.code.co_name for point in one.stop.points]
        lines.append(f"| {number}. {one.stop.title} | {_marked(files)} | {_marked(names)} |")
    return "\n".join(lines)


def _marked(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _stop(number: int, been: Been, until: str) -> str:
    changed = _table(been.before, been.after)
    linux = f"In Linux: {been.stop.linux}.\n\n" if been.stop.linux else ""
    return (f"## {number}. {been.stop.title}\n\n{been.stop.text}\n\n{linux}{_code(been)}{_called(been)}"
            + (f"This changes before the {until}:\n\n{changed}" if changed
               else f"Before the {until} nothing changes for the page.\n"))


def _code(been: Been) -> str:
    quotes = [quote(point) for point in been.stop.points]
    return "".join(f"[`{found.file.removeprefix(SOURCE)}`](../{found.file}), `{point.code.co_qualname}`:\n\n"
                   f"```python\n{found.text}```\n\n" for point, found in zip(been.stop.points, quotes, strict=True))


def _called(been: Been) -> str:
    calls = []
    for point, given in zip(been.stop.points, been.given, strict=True):
        said = ", ".join(_given(point.code.co_varnames[:point.code.co_argcount], given))
        calls += [f"`{point.code.co_name}` with {said}"] if said else []
    return f"In this run: {'; '.join(calls)}.\n\n" if calls else ""


def _given(names: Sequence[str], given: Mapping[str, Any]) -> Iterator[str]:
    for name in names:
        value = given[name]
        if isinstance(value, Folio):
            yield f"{name} = pfn {value.pfn:#x}"
        elif isinstance(value, int) and type(value) is not bool:
            yield f"{name} = {int(value) if value < SMALL else hex(value)}"


# Rows of which something else is said *after* than *before*; "" if there is none.
def _table(before: Look, after: Look) -> str:
    rows = [f"| {row} | {before[row]} | {after[row]} |\n" for row in ROWS if before[row] != after[row]]
    return "| | before | after |\n| --- | --- | --- |\n" + "".join(rows) if rows else ""
