"""A counterexample on one screen: the law, where it starts, what everybody does, where it ends, how to see it again."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from guest_memfd.check.explorer import Finding
from guest_memfd.hosts.abstract import show
from guest_memfd.hosts.abstract import state as st
from guest_memfd.laws import LAWS
from guest_memfd.report import steps
from guest_memfd.report.blame import offending
from guest_memfd.report.style import WIDTH, Style

# Round a marked field until the text is wrapped: a wrapped colour code would count as text.
_ON, _OFF = "\x01", "\x02"


@dataclass(frozen=True)
class Counterexample:
    """A finding with what one needs to know around it; *commands* are what replays and exports it, in order."""

    design: str
    hypervisor: str
    parties: tuple[str, ...]
    finding: Finding
    commands: tuple[tuple[str, str], ...] = ()


def screen(example: Counterexample, style: Style) -> Iterator[str]:
    """The lines of the screen."""
    finding = example.finding
    law = LAWS[finding.law]
    yield style.bad(f"{law.name} is broken: {example.design} on {example.hypervisor}, {len(finding.steps)} steps of "
                    f"{', '.join(example.parties)}")
    yield from wrap(law.sentence, "  law      ")
    yield from wrap(law.source, "  source   ")
    yield from wrap(finding.evidence, "  broken   ")
    yield style.head("initially")
    for line in show.overview(finding.initial):
        yield from wrap(line, "  ", "          ")
    yield style.head("then")
    yield from steps.lines(finding.steps, finding.initial)
    yield style.head("finally") + " (* marks what breaks the law)"
    yield from _final(finding, style)
    if example.commands:
        yield style.head("again")
        yield from (f"  {what:<8} {command}" for what, command in example.commands)


def wrap(text: str, first: str, following: str | None = None) -> list[str]:
    """*text* behind *first*, wrapped to the width of a report; continuation lines behind *following* (as wide)."""
    indent = " " * len(first) if following is None else following
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False,
                         break_long_words=False) or [first.rstrip()]


def _final(finding: Finding, style: Style) -> Iterator[str]:
    last = finding.steps[-1].shared if finding.steps else finding.initial
    fields, usual, marked = show.fields_of(last), show.fields_of(finding.initial), offending(finding)
    names = steps.lock_holders(finding.steps, finding.initial)
    told = {f.rpartition(".")[0] for f in fields if fields[f] != usual[f] or f in marked}
    lines = [f"pfn{n}: {show.frame(fields, n, marked, _mark, names)}" for n in range(st.FRAMES) if f"pfn{n}" in told]
    lines += [f"page{n}: {show.page(fields, n, marked, _mark)}" for n in range(st.PAGES) if f"page{n}" in told]
    lines += [line] if (line := show.around(fields, usual, marked, _mark, names)) else []
    for line in lines:
        yield from (_coloured(part, style) for part in wrap(line, "  ", "    "))


def _mark(words: str) -> str:
    return f"{_ON}*{words}{_OFF}"


# A mark that wrapping has torn apart is not coloured; its '!' is there all the same.
def _coloured(line: str, style: Style) -> str:
    out = []
    for part in line.split(_ON):
        marked, closed, rest = part.partition(_OFF)
        out.append(style.bad(marked) + rest if closed else part)
    return "".join(out).replace(_OFF, "")


def commands(
    design: str, hypervisor: str, parties: Sequence[str], law: str, *, failures: int, folder: str | None
) -> tuple[tuple[str, str], ...]:
    """What saves (unless it is saved in *folder*), replays and exports the trace of *law*."""
    file = f"{folder or 'traces'}/{trace_name(design, hypervisor, law)}"
    injected = "" if failures == 1 else f" --failures {failures}"
    save = (f"gmem check {design} --hypervisor {hypervisor} --parties {','.join(parties)} \\\n"
            f"             --law {law}{injected} --save-traces traces")
    return (*(() if folder else (("save", save),)),
            ("replay", f"gmem replay {file}"), ("export", f"gmem explain {file} --json"))


def trace_name(design: str, hypervisor: str, law: str) -> str:
    """``none-gunyah-host-survives.json``: what the trace of a broken law is called in its folder."""
    return f"{design}-{hypervisor}-{law}.json"
