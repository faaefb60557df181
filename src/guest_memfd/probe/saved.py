"""Surveys that `gmem probe --json` has written, to be set side by side: each is looked at before it is shown.

They come from other machines, so nothing in them is believed to be there or to be a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guest_memfd.errors import BadInput
from guest_memfd.printable import printable
from guest_memfd.probe import against
from guest_memfd.probe.bugs import VERDICTS
from guest_memfd.probe.matrix import SurveyOf
from guest_memfd.probe.report import ROW_VERDICTS, offers

OPTION = "--saved"
_PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "behaviour": (("id", "says", "result", "expected", "why"), tuple(ROW_VERDICTS)),
    "known_bugs": (("id", "title", "severity", "seen", "commit", "means"), tuple(VERDICTS)),
}
"""Part of a survey -> the words that each entry has, and the verdicts that it can have."""


def saved(path: str) -> SurveyOf:
    """The survey in the file *path*, under the name of its kernel; raises BadInput for what is none."""
    found = against.read(path, OPTION)
    shown = {part: [_entry(path, part, entry) for entry in _list(path, part, found)] for part in _PARTS if part in found}
    facts = found.get("offers")
    if facts is not None:
        try:
            # Shown to no one. What is amiss raises here, with the file's name,
            # and not in the middle of the page that is made of it.
            _ = [*offers(facts)]
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise _wrong(path, f"what it offers is not as gmem probe writes it ({type(error).__name__}: {error})") from error
        shown["offers"] = facts
    kernel = facts.get("kernel") if isinstance(facts, dict) else None
    seconds = found.get("seconds")
    return SurveyOf(printable(str(kernel or Path(path).stem)), shown, "",
                    float(seconds) if isinstance(seconds, (int, float)) else 0.0)


def _list(path: str, part: str, found: Mapping[str, Any]) -> list[Any]:
    if not isinstance(found[part], list):
        raise _wrong(path, f"its {part} is no list")
    return list(found[part])


def _entry(path: str, part: str, entry: Any) -> dict[str, str]:
    words, verdicts = _PARTS[part]
    if not isinstance(entry, dict):
        raise _wrong(path, f"its {part} has something else than objects")
    for key in words:
        # A row that was skipped has no result, and of some the expected one is not known.
        if not isinstance(entry.get(key), (str, type(None))) or key not in entry:
            raise _wrong(path, f"an entry of {part} has no {key!r}")
    if entry.get("verdict") not in verdicts:
        raise _wrong(path, f"an entry of {part} has a verdict other than {', '.join(verdicts)}")
    return {key: printable(entry[key] or "") for key in words} | {"verdict": entry["verdict"]}


def _wrong(path: str, why: str) -> BadInput:
    return BadInput(f"{OPTION} {path!r}: {why}")
