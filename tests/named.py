"""Names for the mistakes of a module, so that `gmem check tests/mistakes_x.py:Mistake` has each."""

from __future__ import annotations

import re
from typing import Any

from guest_memfd.designs import Design


def mistakes(module: dict[str, Any]) -> list[type[Design]]:
    """The designs that *module*, a dictionary of what it defines, defines itself."""
    return [thing for thing in module.values()
            if isinstance(thing, type) and issubclass(thing, Design) and thing.__module__ == module["__name__"]]


def name_all(module: dict[str, Any]) -> None:
    """Call each after its class: ``drains-first``."""
    for design in mistakes(module):
        design.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", design.__name__).lower()
