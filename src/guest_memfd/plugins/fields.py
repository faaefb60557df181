"""Fields of what third parties register: each is what is read of it, or it is named with what it should be."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from guest_memfd.errors import shown
from guest_memfd.words.primitives import MAX_ERRNO, OPS


class Kind(NamedTuple):
    """What a field may be, in words, and whether a value is that."""

    words: str
    fits: Callable[[Any], bool]

    def or_none(self) -> Kind:
        """The same, or None."""
        return Kind(f"{self.words}, or None", lambda value: value is None or self.fits(value))


def wrong(thing: object, wanted: Mapping[str, Kind]) -> str | None:
    """The first of the fields *wanted* that *thing* has otherwise, in words, or None. A property is not asked."""
    for field, kind in wanted.items():
        if isinstance(inspect.getattr_static(thing, field, None), property):
            continue
        if not kind.fits(value := getattr(thing, field)):
            return f"its {field} is {shown(value)}, and has to be {kind.words}"
    return None


def one_of(*values: Any) -> Kind:
    """Any of *values*, compared by identity or equality; the words list them."""
    # Compared only with its like: a value of a third party's may do anything when it is compared.
    return Kind(" or ".join(map(repr, values)), lambda value: any(
        value is each or (type(value) is type(each) and value == each) for each in values))


def table(of: str, values: Kind, keys: tuple[str, ...] | None = None) -> Kind:
    """A dictionary from *of*, one of *keys* if they are given, to *values*."""
    which = "" if keys is None else f" ({', '.join(keys)})"
    return Kind(f"a dictionary from {of}{which} to {values.words}", lambda value: isinstance(value, Mapping) and all(
        type(key) is str and (keys is None or key in keys) and values.fits(each) for key, each in value.items()))


def takes(count: int) -> Kind:
    """A function that can be called with *count* arguments."""
    words = "a function of one argument" if count == 1 else f"a function of {count} arguments"
    return Kind(words, lambda value: _takes(value, count))


def _takes(value: Any, count: int) -> bool:
    if not callable(value):
        return False
    try:
        inspect.signature(value).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:                                  # Python cannot tell
        pass
    return True


def _is_line(value: Any) -> bool:
    return type(value) is str and bool(value.strip()) and value.isprintable()


def _is_tuple(value: Any, member: Kind) -> bool:
    return isinstance(value, tuple) and all(map(member.fits, value))


NAME = Kind("a name: letters, digits, '-', '_', '.', '+'",
            lambda value: type(value) is str and re.fullmatch(r"\w[\w.+-]*", value) is not None)
LINE = Kind("a line of words", _is_line)
FLAG = Kind("True or False", lambda value: type(value) is bool)
NAMES = Kind("a tuple of names (with a comma after a single one)", lambda value: _is_tuple(value, NAME))
SOME_NAMES = Kind(NAMES.words, lambda value: NAMES.fits(value) and bool(value))
COUNT = Kind("a whole number, 0 or more", lambda value: type(value) is int and value >= 0)
ERRNO = Kind("an errno (ENOMEM: 12)", lambda value: type(value) is int and 0 < value <= MAX_ERRNO)
MINUS_ERRNO = Kind("-errno (-ENOMEM: -12)", lambda value: type(value) is int and -MAX_ERRNO <= value < 0)
ERRNOS = table("operations", Kind("tuples of errno", lambda value: _is_tuple(value, ERRNO)), OPS)
