"""A survey beside an earlier one, of another kernel or of the same one before: what has changed, and what got worse.

What the earlier one says is looked at before it is believed to be of the right kind, or shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guest_memfd.errors import BadInput
from guest_memfd.printable import printable
from guest_memfd.probe.survey import SCHEMA

_OFFERS = {
    "capabilities": ("kvm", "capabilities"), "guest_memfd flags": ("kvm", "guest_memfd_flags"),
    "VM types": ("kvm", "vm_types"), "KVM usable": ("kvm", "usable"), "vCPU": ("vcpu", "kind"),
    "memfd_secret": ("memfd_secret",), "page sizes": ("page_sizes",), "module parameters": ("module_parameters",),
    "hibernation": ("hibernation",),
}
"""What is compared of the offers; limits and the direct map are the machine's of the moment."""
_LONGEST = 200


@dataclass(frozen=True)
class Change:
    """*what* (``offer``, ``row`` or ``bug``) *id* said *was* in the earlier survey, and says *now* in this one.

    *worse*: a row with another result, or a bug that was fixed and is present.
    """

    what: str
    id: str
    was: str
    now: str
    worse: bool = False


@dataclass(frozen=True)
class Against:
    """All changes since the survey in *file*, of *kernel*; *alone*: rows and bugs that only one of the two has tried."""

    file: str
    kernel: str
    changes: tuple[Change, ...]
    alone: int

    @property
    def worse(self) -> bool:
        """Whether any change is one for the worse; `gmem probe` then exits with status 2."""
        return any(change.worse for change in self.changes)


def read(path: str, option: str = "--against") -> dict[str, Any]:
    """The survey in the file *path*, that *option* names; raises BadInput for what is none."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{option} {path!r}: {error.strerror}") from error
    # RecursionError: a file of ten thousand brackets is JSON, and is no survey.
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{option} {path!r} is not JSON: {error}") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise BadInput(f"{option} {path!r} is no survey: what gmem probe --json writes is wanted, of schema {SCHEMA!r}")
    return found


def compare(file: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Against:
    """What has changed from *old*, as `read` returned it, to *new*, which is the same of now."""
    changes, alone = [*_offers(old, new)], 0
    for what, part, key in (("row", "behaviour", "result"), ("bug", "known_bugs", "verdict")):
        if part not in old or part not in new:
            continue
        was, now = _by_id(old[part], key), _by_id(new[part], key)
        both = [name for name in now if name in was]
        alone += len({*was, *now}) - len(both)
        changes += [Change(what, name, was[name], now[name], what == "row" or now[name] == "present")
                    for name in both if was[name] != now[name]]
    kernel = _at(old, ("offers", "kernel"))
    named = "a kernel that it does not name" if kernel is None else _words(kernel)
    return Against(printable(file), named, tuple(changes), alone)


# Only what has an answer: a row that was skipped has no result, and of some bugs nothing can be told.
def _by_id(entries: Any, key: str) -> dict[str, str]:
    found = [each for each in entries if isinstance(each, dict)] if isinstance(entries, list) else []
    return {_words(each.get("id")): _words(each[key]) for each in found
            if each.get(key) is not None and each[key] not in ("cannot tell", "not tested")}


def _offers(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    for name, path in _OFFERS.items():
        was, now = _at(old, ("offers", *path)), _at(new, ("offers", *path))
        # Where one of the two was not asked for its offers, everything would count as changed.
        if was == now or not isinstance(old.get("offers"), dict) or "offers" not in new:
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            for key in sorted({*was, *now}, key=str):
                if was.get(key) != now.get(key):
                    yield Change("offer", f"{name}: {_words(key)}", _words(was.get(key)), _words(now.get(key)))
        else:
            yield Change("offer", name, _words(was), _words(now))


def _at(found: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _words(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return printable(str(value))[:_LONGEST]
