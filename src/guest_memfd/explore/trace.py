"""A counterexample in a file: small, self-contained, of a named version, and readable without this program.

    {"schema": "guest-memfd-trace/3", "version": ..., "design": ..., "hypervisor": ..., "scene": {...}, "failures": ...,
     "parties": [...], "law": ..., "sentence": ..., "evidence": ..., "steps": [
      {"party": ..., "choices": [...], "primitive": ..., "caller": ..., "args": [...], "result": ..., "failed": ...}]}

Host states are not in it: a replay rebuilds the first one and finds the others. Arguments and results are
JSON's null, booleans, integers and strings, and objects of one key for what JSON has not (VALUES).
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, astuple, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from guest_memfd.errors import BadInput, TraceError
from guest_memfd.explore.engine.finding import Step
from guest_memfd.explore.suite.verdict import MOST_FAILURES, Found, LawReport, Report
from guest_memfd.laws import LAWS
from guest_memfd.printable import printable
from guest_memfd.words import former
from guest_memfd.words.outcome import STAY
from guest_memfd.words.primitives import Entries, Folio, Locked, Lookup, Primitive
from guest_memfd.words.scene import Kernel, Scene, Slot
from guest_memfd.words.units import Index, Pfn

SCHEMA = "guest-memfd-trace/3"
"""Name and version; the version changes when a field goes, or changes its meaning."""


_DEEPEST, _LONGEST, _MOST_ORDER = 50, 4000, 63
"""Of what a trace holds: how deep it nests, characters of a string; and the order of a folio."""


def _folio(pfn: Any, order: Any) -> Folio:
    # type() and not isinstance(), here and below: True is an int for isinstance(), and would be written as a boolean
    # again.
    if type(pfn) is not int or type(order) is not int or not (pfn >= 0 and 0 <= order <= _MOST_ORDER):
        raise TypeError("a folio is a page frame number and an order")
    return Folio(Pfn(pfn), order)


def _lookup(folio: Any, pgoff: Any) -> Lookup:
    if type(folio) is not Folio or type(pgoff) is not int:
        raise TypeError("a lookup is a folio and a page index")
    return Lookup(folio, Index(pgoff))


def _locked(pgoff: Any, *flags: Any) -> Locked:
    if type(pgoff) not in (int, type(None)) or not all(type(flag) is bool for flag in flags):
        raise TypeError("what a lock protects is a page index and three flags")
    return Locked(pgoff, *flags)


def _entries(first: Any, nr: Any, step: Any) -> Entries:
    if not all(type(number) is int for number in (first, nr, step)) or nr < 0:
        raise TypeError("entries are integers, and a number of them")
    return Entries(first, nr, step)


VALUES: dict[str, tuple[type, Callable[..., Any], Callable[[Any], Iterable[Any]]]] = {
    "folio": (Folio, _folio, tuple),
    "lookup": (Lookup, _lookup, tuple),
    "locked": (Locked, _locked, tuple),
    "entries": (Entries, _entries, astuple),
    "tuple": (tuple, lambda *members: members, tuple),
    "waits": (type(STAY), lambda: STAY, lambda _: ()),
}
"""Key of an object -> the type it stands for, how to make one of the members in its list, and how to list them."""


@dataclass(frozen=True)
class TraceStep:
    """One recorded step; `primitive` is None when the party only made its last choices and ended.

    A choice or a tracepoint is the step of a party that goes round and round from there without any.
    """

    party: str
    choices: tuple[str, ...]
    primitive: Primitive | None
    result: Any
    failed: bool


@dataclass(frozen=True)
class Trace:
    """What a trace file says."""

    design: str
    hypervisor: str
    scene: Scene
    failures: int
    parties: tuple[str, ...]
    law: str
    evidence: str
    steps: tuple[TraceStep, ...]
    version: str


def version() -> str:
    """The version of this package, ``unknown`` if it is not installed."""
    try:
        return metadata.version("guest-memfd")
    except metadata.PackageNotFoundError:
        return "unknown"


def trace_of(report: Report, found: Found | LawReport) -> Trace:
    """The trace of a finding, or of the law, *found* of *report*; raises BadInput when the law did not break."""
    finding, parties = found.finding, found.parties
    if finding is None or parties is None:
        raise BadInput(f"there is no trace: {report.design!r} does not break law {found.law!r}")
    steps = tuple(TraceStep(s.party, s.choices, s.primitive, s.result, s.failed) for s in finding.steps)
    scene = found.scene or Scene()
    failures = scene.failures if report.failures is None else report.failures
    return Trace(report.design, report.hypervisor, scene, failures, parties, found.law, finding.evidence, steps, version())


def save(report: Report, found: Found | LawReport, path: str | os.PathLike[str]) -> None:
    """Write the trace of *found* to *path*, all of it or nothing; raises BadInput when that cannot be."""
    write(trace_of(report, found), path)


def write(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write *trace* to *path*, all of it or nothing; raises BadInput when that cannot be."""
    # In the same folder, since a rename is atomic only within one file system. A reader sees the old file or the new
    # one.
    beside = Path(path).with_name(f".gmem.{os.getpid()}.trace.tmp")
    try:
        try:
            beside.write_text(dumps(trace), encoding="utf-8")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise BadInput(f"cannot write trace {os.fspath(path)!r}: {error.strerror}") from error


def dumps(trace: Trace) -> str:
    """*trace* as JSON text, one step a line."""
    head = {
        "schema": SCHEMA, "version": trace.version, "design": trace.design, "hypervisor": trace.hypervisor,
        "scene": asdict(trace.scene), "failures": trace.failures, "parties": list(trace.parties), "law": trace.law,
        "sentence": LAWS[trace.law].sentence, "evidence": trace.evidence,
    }
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    steps = ",\n".join(f"  {json.dumps(_encode_step(step))}" for step in trace.steps)
    return "{\n" + ",\n".join(lines) + ',\n "steps": [' + (f"\n{steps}\n " if steps else "") + "]\n}\n"


def load(path: str | os.PathLike[str]) -> Trace:
    """Read the trace file *path*; raises TraceError when it is unreadable, no JSON, of another schema or incomplete."""
    name = os.fspath(path)
    try:
        # A terminal or /dev/zero would be read without end.
        if stat.S_ISCHR(os.stat(path).st_mode):
            raise TraceError(f"trace {name!r} is a device; a file or a pipe is wanted")
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise TraceError(f"cannot read trace {name!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"trace {name!r} is no text: {error.reason} at byte {error.start}") from error
    try:
        return loads(text)
    except TraceError as error:
        raise TraceError(f"trace {name!r} {error}") from error


def loads(text: str) -> Trace:
    """The trace in *text*; raises TraceError whose words continue "trace X ..."."""
    try:
        # Checked before anything else is read from it: the file may come from a stranger.
        top = _sane(json.loads(text), 0)
    except (ValueError, RecursionError) as error:
        if text[:1] == "{" and isinstance(error, json.JSONDecodeError) and _at_the_end(text, error):
            raise TraceError(f"is truncated: it ends in line {error.lineno}, in the middle of an object") from error
        raise TraceError(f"is not JSON: {error}") from error
    if not isinstance(top, dict) or not isinstance(top.get("schema"), str):
        raise TraceError(f"is no trace: an object with \"schema\": {SCHEMA!r} is wanted")
    # Before any other field: another version may have other fields, and "lacks a field" would be the wrong answer.
    if top["schema"] != SCHEMA:
        raise TraceError(f"is of schema {top['schema']!r}; this program reads {SCHEMA!r}")
    whole = _Fields(top, "")
    law = whole.text("law")
    if law not in LAWS:
        raise TraceError(f"names a law there is not: {law!r}")
    return Trace(
        whole.text("design"), whole.text("hypervisor"), _decode_scene(whole.value_of("scene")), whole.count("failures"),
        whole.texts("parties"),
        law, whole.text("evidence"),
        tuple(_decode_step(_Fields(step, f" of step {n}")) for n, step in enumerate(whole.list("steps"), 1)),
        whole.text("version"),
    )


# What will be shown to someone: no control characters, which a terminal would obey, no letters that cannot be written, and
# nothing beyond what a trace has. Newlines and tabs are left: they wrap like blanks.
def _sane(value: Any, depth: int) -> Any:
    if depth > _DEEPEST:
        raise TraceError(f"nests deeper than {_DEEPEST} levels")
    if isinstance(value, list):
        return [_sane(member, depth + 1) for member in value]
    if isinstance(value, dict):
        return {_sane(key, depth + 1): _sane(member, depth + 1) for key, member in value.items()}
    if isinstance(value, int) and not -1 << 64 < value < 1 << 64:
        raise TraceError("has a number of more than 64 bits")
    if not isinstance(value, str):
        return value
    if len(value) > _LONGEST:
        raise TraceError(f"has a string of {len(value)} characters; {_LONGEST} is the most")
    return printable(value, but="\n\t")


# A string or a word (true, null) that the end of the file cuts in two is reported where it starts.
def _at_the_end(text: str, error: json.JSONDecodeError) -> bool:
    return error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip().rstrip("aeflnrstu")) - 1


class _Fields:
    # The members of an object, with their types looked at.

    def __init__(self, members: Any, place: str) -> None:
        if not isinstance(members, Mapping):
            raise TraceError(f"has something else than an object for all{place}")
        self.members, self.place = members, place

    def get(self, key: str, wanted: type, words: str) -> Any:
        if key not in self.members:
            raise TraceError(f"lacks field {key!r}{self.place}")
        value = self.members[key]
        if type(value) is not wanted:
            raise TraceError(f"has a field {key!r}{self.place} that is not {words}")
        return value

    def text(self, key: str) -> str:
        return str(self.get(key, str, "a string"))

    def list(self, key: str) -> list[Any]:
        return list(self.get(key, list, "a list"))

    def texts(self, key: str) -> tuple[str, ...]:
        members = self.list(key)
        if not all(isinstance(member, str) for member in members):
            raise TraceError(f"has a field {key!r}{self.place} that is not a list of strings")
        return tuple(members)

    def flag(self, key: str) -> bool:
        return bool(self.get(key, bool, "true or false"))

    def count(self, key: str) -> int:
        number = int(self.get(key, int, "an integer"))
        if not 0 <= number <= MOST_FAILURES:
            raise TraceError(f"has a field {key!r}{self.place} that is not 0 to {MOST_FAILURES}")
        return number

    def value_of(self, key: str) -> Any:
        if key not in self.members:
            raise TraceError(f"lacks field {key!r}{self.place}")
        return self.members[key]

    def value(self, key: str) -> Any:
        return _decode(self.value_of(key), f"{key!r}{self.place}")


def _decode_scene(members: Any) -> Scene:
    try:
        scene = dict(members)
        scene["shared"] = tuple(scene["shared"])
        scene["slots"] = tuple(Slot(**slot) for slot in scene["slots"])
        scene["kernel"] = Kernel(**scene["kernel"])
        made = Scene(**scene)
    except (TypeError, KeyError, ValueError) as error:
        wanted = ", ".join(field.name for field in fields(Scene))
        raise TraceError(f"has a field 'scene' that is none; an object with {wanted} is wanted ({error})") from error
    except BadInput as error:
        raise TraceError(f"has a scene that cannot be: {error}") from error
    return made


def _encode_step(step: Step | TraceStep) -> dict[str, Any]:
    primitive = step.primitive
    return {
        "party": step.party, "choices": list(step.choices),
        "primitive": primitive and primitive.name, "caller": primitive and primitive.caller,
        **({"file": primitive.file} if primitive and primitive.file else {}),
        "args": [_encode(arg) for arg in primitive.args] if primitive else [],
        "result": _encode(step.result), "failed": step.failed,
    }


def _decode_step(fields: _Fields) -> TraceStep:
    name, caller, args = fields.value("primitive"), fields.value("caller"), fields.list("args")
    primitive = None
    if name is not None:
        values = tuple(_decode(arg, f"'args'{fields.place}") for arg in args)
        file = fields.count("file") if "file" in fields.members else 0
        name = fields.text("primitive")
        primitive = Primitive(former.PRIMITIVES.get(name, name), values, fields.text("caller"), file)
    elif caller is not None or args:
        raise TraceError(f"has a caller or arguments{fields.place}, which has no primitive")
    return TraceStep(fields.text("party"), fields.texts("choices"), primitive, fields.value("result"),
                     fields.flag("failed"))


def _encode(value: Any) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    for key, (kind, _, members) in VALUES.items():
        if type(value) is kind:
            return {key: [_encode(member) for member in members(value)]}
    raise TraceError(f"{value!r} ({type(value).__name__}) cannot be written to a trace; use integers, strings, tuples")


def _decode(value: Any, place: str) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, dict) and len(value) == 1:
        key, members = next(iter(value.items()))
        if key in VALUES and isinstance(members, list):
            try:
                return VALUES[key][1](*(_decode(member, place) for member in members))
            except TypeError:
                pass                                    # a wrong number of members: said below
    raise TraceError(f"has a value in {place} that means nothing: {json.dumps(value)}")
