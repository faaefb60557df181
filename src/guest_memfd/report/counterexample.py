"""A counterexample on one screen: the law, where it starts, what everybody does, where it ends, how to see it again."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from guest_memfd.abstract import show
from guest_memfd.abstract import state as st
from guest_memfd.explore.engine.finding import Finding, Step
from guest_memfd.explore.suite.verdict import LawReport
from guest_memfd.laws import LAWS
from guest_memfd.report import steps
from guest_memfd.report.blame import offending
from guest_memfd.report.style import Style
from guest_memfd.scenarios import TEARDOWN
from guest_memfd.words.scene import Scene

# Round a marked field until the text is wrapped: a wrapped colour code would count as text.
_ON, _OFF = "\x01", "\x02"


Command = tuple[str, tuple[str, ...]]
"""What it is for, and its parts, between which it may go on in the next line."""
BEFORE = "before anybody moves"
"""When something breaks that is found in no steps: creating the file and binding it was enough."""


def length(steps: Sequence[Step], parties: Sequence[str]) -> str:
    """``12 steps of vcpu, vmm and 3 of the teardown, one an injected failure``: the teardown's are no one's of *parties*."""
    if not steps:
        return BEFORE
    last = sum(step.party == TEARDOWN.name for step in steps)
    torn = f" and {last} of the teardown" if last else ""
    return f"{len(steps) - last} steps of {', '.join(parties)}{torn}{_injected(sum(step.failed for step in steps))}"


def way(law: LawReport, parties: Sequence[str]) -> str:
    """`length` of the way to break *law*; what is known of it where nobody waited for its trace."""
    if law.finding is not None or not law.steps:
        return length(law.finding.steps if law.finding else (), parties)
    return f"{law.steps} steps with {', '.join(parties)}{_injected(law.injected)} (its trace was not made)"


def _injected(failed: int) -> str:
    return f", {failed} of them injected failures" if failed > 1 else ", one an injected failure" if failed else ""


@dataclass(frozen=True)
class Counterexample:
    """A finding with what one needs to know around it; *commands* are what replays and exports it, in order."""

    design: str
    hypervisor: str
    scene: Scene
    parties: tuple[str, ...]
    finding: Finding
    commands: tuple[Command, ...] = ()


def screen(example: Counterexample, style: Style) -> Iterator[str]:
    """The lines of the screen."""
    finding = example.finding
    law = LAWS[finding.law]
    how = length(finding.steps, example.parties)
    yield from map(style.bad, style.wrap(f"{law.name} is broken: {example.design} on {example.hypervisor}, {how}", "", "  "))
    yield from style.wrap(f"{example.scene.name}: {example.scene.title}", "  scene    ")
    yield from style.wrap(law.sentence, "  law      ")
    yield from style.wrap(law.source, "  source   ")
    yield from style.wrap(finding.evidence, "  broken   ")
    yield style.head("initially")
    for line in show.overview(finding.initial):
        yield from style.wrap(line, "  ", "          ")
    if finding.steps:
        yield style.head("then")
        yield from steps.lines(finding.steps, finding.initial, style)
        yield style.head("finally") + " (* marks what breaks the law)"
        yield from _final(finding, style)
    if example.commands:
        yield style.head("again")
        for what, parts in example.commands:
            yield from _command(f"{'  ' + what:<{_INDENT}}", parts, style)


def _final(finding: Finding, style: Style) -> Iterator[str]:
    last = finding.steps[-1].shared
    fields, usual, marked = show.fields_of(last), show.fields_of(finding.initial), offending(finding)
    names = steps.lock_holders(finding.steps, finding.initial)
    told = {f.rpartition(".")[0] for f in fields if fields[f] != usual[f] or f in marked}
    counts = st.layout_of(last).counts
    lines = [f"pfn{n}: {show.frame(fields, n, marked, _mark, names)}" for n in range(counts["pfn"]) if f"pfn{n}" in told]
    lines += [f"page{n}: {show.page(fields, n, marked, _mark)}" for n in range(counts["page"]) if f"page{n}" in told]
    lines += [f"gfn{n}: {show.gfn(fields, n, marked, _mark)}" for n in range(counts["gfn"]) if f"gfn{n}" in told]
    lines += [line] if (line := show.around(fields, usual, marked, _mark, names)) else []
    for line in lines:
        yield from (_coloured(part, style) for part in style.wrap(line, "  ", "    "))


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
    design: str, hypervisor: str, scene: Scene, parties: Sequence[str], law: str, *, failures: int | None,
    folder: str | None, loads: Sequence[str] = (),
) -> tuple[Command, ...]:
    """What saves (unless it is saved in *folder*), replays and exports the trace of *law*, with files to be loaded."""
    file = os.path.join(folder or "traces", trace_name(design, hypervisor, law))
    injected = "" if failures is None else f" --failures {failures}"
    where = "" if scene == Scene() else f" --scene {scene.name}"
    what, who = f"gmem check {design} --hypervisor {hypervisor}{where}", f"--parties {','.join(parties)}"
    save = (what, who, f"--law {law}{injected}{_loading(loads)} --save-traces traces")
    return (*(() if folder else (("save", save),)), *again(file, loads))


def again(file: str, loads: Sequence[str] = ()) -> tuple[Command, ...]:
    """What replays and exports the trace in *file*, with files to be loaded."""
    more = _loading(loads)
    return (("replay", (f"gmem replay {pasted(file)}{more}",)),
            ("export", (f"gmem explain {pasted(file)}{more}", "--json")))


def _loading(files: Sequence[str]) -> str:
    return "".join(f" --load {pasted(file)}" for file in files)


def pasted(path: str) -> str:
    """*path* so that a shell that gets it pasted means that path, and a terminal shows it and obeys nothing in it."""
    if path.isprintable():
        return shlex.quote(path)
    return f"$'{''.join(f'{chr(92)}{byte:03o}' if byte in _ESCAPED else chr(byte) for byte in os.fsencode(path))}'"


_ESCAPED = {*range(0x20), 0x27, 0x5C, *range(0x7F, 0x100)}


_INDENT = 11
"""Columns before a command."""


def _command(line: str, parts: Sequence[str], style: Style) -> Iterator[str]:
    first, *rest = parts
    line += first
    for part in rest:
        if len(f"{line} {part} \\") > style.width:
            yield f"{line} \\"
            line = " " * (_INDENT + 1)
        line += f" {part}"
    yield line


def trace_name(design: str, hypervisor: str, law: str) -> str:
    """``none-gunyah-host-survives.json``: what the trace of a broken law is called in its folder."""
    return f"{design}-{hypervisor}-{law}.json"
