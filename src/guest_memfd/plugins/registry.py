"""Names to things, built in or registered by third parties through an entry point; every failure names the plugin."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, ValuesView
from importlib import metadata
from typing import Any, Generic, TypeVar

from guest_memfd.errors import PluginError, PluginLeftOut, UnknownName
from guest_memfd.plugins.guard import IMPORTING, Guard
from guest_memfd.words import former

T = TypeVar("T")


class Registry(Generic[T]):
    """Things of one *kind* by name, as in a dictionary. Entry points of *group* are looked at once, at the first question.

    Names that are built in are answered without looking. A caller that asks for all is warned (PluginLeftOut) of those that
    do not load.
    """

    def __init__(self, kind: str, group: str, builtin: dict[str, T], check: Callable[[T], str | None] | None = None):
        self.kind, self.group, self._known, self._check = kind, group, dict(builtin), check
        self.builtin = tuple(builtin.values())
        self._broken: dict[str, str] = {}
        self._looked = self._told = False

    def _look(self) -> None:
        if self._looked:
            return
        self._looked = True
        for entry in metadata.entry_points(group=self.group):
            who = f"{self.kind} plugin {entry.name!r} ({entry.value})"
            try:
                if entry.name in self._known:
                    raise PluginError(f"{who}: the name is taken")
                with Guard(who, PluginError, timed=True, patience=IMPORTING, did="does not import:"):
                    thing = entry.load()
                self.add(entry.name, thing)
            except PluginError as error:
                self._broken[entry.name] = str(error)

    # A caller that asks for all of them is told, once, which are not among them.
    def _all(self) -> dict[str, T]:
        self._look()
        for reason in () if self._told else self._broken.values():
            warnings.warn(f"left out: {reason}", PluginLeftOut, stacklevel=3)
        self._told = True
        return self._known

    def add(self, name: str, thing: Any) -> None:
        """Register *thing*; raises PluginError saying what it lacks."""
        with Guard(f"{self.kind} plugin {name!r}", PluginError, timed=True, did="cannot be looked at: it raised"):
            lacks = missing_operations(thing) or (self._check(thing) if self._check else None)
            named = getattr(thing, "name", name)
            if not lacks and named != name:
                lacks = f"it calls itself {named!r}; the entry point and the name must be the same"
        if lacks:
            raise PluginError(f"{self.kind} plugin {name!r}: {lacks}")
        self._known[name] = thing

    def __getitem__(self, name: str) -> T:
        """The thing called *name*; UnknownName with the nearest name, PluginError if it is there and does not load."""
        if name not in self._known:
            self._look()
        if name not in self._known and name in self._broken:
            raise PluginError(self._broken[name])
        if name not in self._known:
            raise UnknownName(self.kind, name, self._known)
        return self._known[name]

    def __contains__(self, name: object) -> bool:
        if name not in self._known:
            self._look()
        return name in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def get(self, name: str) -> T | None:
        """The thing called *name*, None if there is none, or none that loads."""
        return self._known[name] if name in self else None

    def values(self) -> ValuesView[T]:
        """All things that load, in the order of their names."""
        return self._all().values()

    def broken(self) -> dict[str, str]:
        """Name -> what is wrong, of the plugins that do not load."""
        self._look()
        return dict(self._broken)


def missing_operations(thing: Any) -> str | None:
    """Say which abstract operations *thing*, or the driver's half of a hypervisor, lacks."""
    for part in (thing, getattr(thing, "ops", None)):
        if inspect.isclass(part) and inspect.isabstract(part):
            lacking = ", ".join(sorted(getattr(part, "__abstractmethods__", ())))
            posted = [name for name in former.OPERATIONS if hasattr(part, name)]
            if posted:
                return (f"{part.__qualname__} has {', '.join(posted)}, of the tables that were posted, and lacks {lacking}; "
                        f"{former.GUIDE} says what has taken their place")
            return f"{part.__qualname__} lacks the operation(s) {lacking}; core/ops.py says what each must do"
    return None
