"""Example pages of gmem, and the document that shows them: counterexamples, and the table of the plainest scene."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from guest_memfd.cli.main import main


class Example(NamedTuple):
    """A page: its file, what it shows, and what is asked for the trace that it is about."""

    file: str
    shows: str
    check: tuple[str, ...]
    law: str


EXAMPLES = (
    Example("none-gunyah.html", "What goes wrong under Gunyah when nothing is done: a word load from the page before",
            ("none", "--hypervisor", "gunyah", "--parties", "vcpu,zeropad"), "host-survives"),
    Example("v17-pins.html", "R5: the posted driver lends a page that somebody still has a reference to",
            ("gunyah-v17", "--parties", "vcpu,device"), "pins-respected"),
)
TABLE = ("compare", "--scene", "two-pages", "--quiet")


def write(folder: Path, table: tuple[str, ...] = TABLE) -> None:
    """Make the pages in *folder*, and index.md that shows them."""
    folder.mkdir(parents=True, exist_ok=True)
    told = ["# Example pages", "", "As the commands write them: [what they are](../docs/pages.md).", ""]
    for example in EXAMPLES:
        design, *scope = example.check
        _run("check", design, *scope, "--law", example.law, "--save-traces", str(folder), "-q", "-o", "/dev/null")
        trace = next(folder.glob(f"{design}-*-{example.law}.json"))
        _run("explain", str(trace), "--on", "emulated", "--html", str(folder / example.file), "-o", "/dev/null")
        told += _shown(example.file, example.shows)
    _run(*table, "--html", str(folder / "table.html"), "-o", "/dev/null")
    told += _shown("table.html", "Designs, hypervisors and laws, in the plainest scene")
    (folder / "index.md").write_text("\n".join(told), encoding="utf-8")


def _run(*argv: str) -> None:
    if (code := main(argv)) not in (0, 2):
        raise SystemExit(f"gmem {' '.join(argv)} exits {code}")


def _shown(file: str, words: str) -> list[str]:
    return [f"## {words}", "", f"[On its own]({file})", "",
            f'<iframe src="{file}" title="{words}" width="100%" height="700" loading="lazy"></iframe>', ""]
