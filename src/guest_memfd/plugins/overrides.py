"""What a subclass may define: overrides that fit, and names that its own code mentions. A misspelt override is neither.

Nothing of the class is run, and in doubt nothing is reported.
"""

from __future__ import annotations

import difflib
import dis
import inspect
import itertools
from collections.abc import Collection
from types import FunctionType
from typing import Any

from guest_memfd.core.ops import GuestMemfdOps
from guest_memfd.plugins.mentions import codes, mentioned
from guest_memfd.words import former

OFFERS = "offers"
"""A class attribute: names that the class defines neither for itself nor for its base, but for someone else to call."""


def unfit(cls: type, base: type) -> str | None:
    """What *cls*, a subclass of *base*, defines that nothing will ever call, or that does not fit what it overrides."""
    own = beyond(cls, base)
    known = _known(base)
    for each in own:
        for name, value in vars(each).items():
            if name.startswith("__"):
                continue
            wrong = _misfit(name, value, base) if name in known else None
            if name not in known and not mentioned(name, own, base):
                wrong = _unheard_of(name, value, base, known)
            if wrong is not None:
                return f"{each.__qualname__} defines {name!r}, {wrong}"
    return None


def beyond(cls: type, base: type) -> list[type]:
    """The classes that *cls* has on top of *base*, itself first."""
    return [each for each in cls.__mro__ if each not in base.__mro__]


# Every name that *base* has: defined, annotated, or set by a constructor.
def _known(base: type) -> set[str]:
    known = {OFFERS}
    for each in base.__mro__:
        known |= vars(each).keys() | _annotations(each).keys()
        known |= {name for code in codes(vars(each).get("__init__")) for name in code.co_names}
    return known


def _annotations(cls: type) -> dict[str, Any]:
    return dict(vars(cls).get("__annotations__", {}))


def _unheard_of(name: str, value: object, base: type, known: Collection[str]) -> str | None:
    if issubclass(base, GuestMemfdOps) and name in former.OPERATIONS:
        return f"which nothing calls; it is of a table that was posted, and {former.GUIDE} says what has taken its place"
    private = name.startswith("_")                      # no one else could call it, so only what looks like a slip is one
    alike = sorted(each for each in known if not each.startswith("_"))
    near = difflib.get_close_matches(name.lstrip("_"), alike, n=1, cutoff=0.8 if private else 0.5)
    if private and not near:
        return None
    meant = f"did you mean {near[0]!r}?" if near else f"{base.__qualname__} has nothing like it"
    return f"which nothing {'calls' if _is_method(value) else 'reads'}; {meant}"


def _misfit(name: str, value: object, base: type) -> str | None:
    original = inspect.getattr_static(base, name, None)
    if isinstance(value, property) and any(_is_of_the_class(_annotations(each).get(name)) for each in base.__mro__):
        return "a property, but it is read of the class"
    if _is_method(value) and not _is_method(original):
        return "a method, but it overrides an attribute"
    if _is_method(original) and not _is_method(value):
        return "an attribute, but it overrides a method"
    if inspect.isgeneratorfunction(original) and _returns_constants(value):
        return "which is no procedure: one that has nothing to ask for says 'yield from ()'"
    new, old = _signature(value), _signature(original)
    if new is None or old is None or _takes(new, old):
        return None
    return f"which takes ({_list(new)}), but it is called with ({_list(old)})"


# A plain function may hand on another's procedure, and never a constant.
def _returns_constants(method: Any) -> bool:
    function = getattr(method, "__func__", method)
    if not isinstance(function, FunctionType) or inspect.isgeneratorfunction(function):
        return False
    code = [step.opname for step in dis.get_instructions(function)]
    returned = [before if name == "RETURN_VALUE" else name for before, name in itertools.pairwise(code)
                if name.startswith("RETURN_")]          # from Python 3.12 on there is RETURN_CONST
    return bool(returned) and all(name in ("LOAD_CONST", "RETURN_CONST") for name in returned)


def _is_of_the_class(annotation: object) -> bool:
    return str(annotation).removeprefix("typing.").startswith("ClassVar")


def _is_method(value: object) -> bool:
    return (callable(value) and not isinstance(value, type)) or isinstance(value, staticmethod | classmethod)


# The parameters of a method as it is called on an instance; None where there are none to be seen.
def _signature(method: Any) -> inspect.Signature | None:
    function = getattr(method, "__func__", method)
    if not isinstance(function, FunctionType):
        return None
    signature = inspect.signature(function)
    bound = not isinstance(method, staticmethod)
    return signature.replace(parameters=[*signature.parameters.values()][bound:])


# Whether what takes *new* can be called as what takes *old* is: with all parameters, or with those that must be there.
def _takes(new: inspect.Signature, old: inspect.Signature) -> bool:
    parameters = [p for p in old.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    for given in (parameters, [p for p in parameters if p.default is p.empty]):
        by_name = [p.name for p in given if p.kind is p.KEYWORD_ONLY]
        try:
            new.bind(*[None] * (len(given) - len(by_name)), **dict.fromkeys(by_name))
        except TypeError:
            return False
    return True


def _list(signature: inspect.Signature) -> str:
    return ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in signature.parameters.values())
