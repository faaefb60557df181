"""What is wrong with a design of someone else's: with its fields, or with names that override nothing.

What it defines must override something of the library, or be called by someone.
"""

from __future__ import annotations

from typing import get_args

from guest_memfd.core.gmem import PowerPolicy
from guest_memfd.designs.design import OPERATIONS, Design
from guest_memfd.errors import shown
from guest_memfd.plugins.fields import COUNT, ERRNOS, FLAG, LINE, NAME, NAMES, SOME_NAMES, Kind, one_of, table, wrong
from guest_memfd.plugins.forgotten import in_class
from guest_memfd.plugins.overrides import beyond, unfit
from guest_memfd.words.primitives import OPS, Bound
from guest_memfd.words.scene import Scene

FIELDS = {
    "name": NAME, "title": LINE, "source": LINE, "sea_fixup": FLAG, "gup": FLAG, "converts": FLAG, "large": FLAG,
    "no_direct_map": FLAG, "splits": FLAG, "order": COUNT, "power": one_of(*get_args(PowerPolicy)),
    "hypervisors": SOME_NAMES.or_none(), "offers": NAMES, "promises": NAMES,
    "keeps": table("operations", LINE, OPERATIONS),
    "bounds": table("operations", Kind("Bound of whole numbers", lambda value: isinstance(value, Bound) and all(
        map(COUNT.fits, value))), OPS),
    "errnos": ERRNOS,
    "resumes": Kind("a tuple of conversions ('to_private', 'to_shared')", lambda value: type(value) is tuple and all(
        name in ("to_private", "to_shared") for name in value)),
    "scene": Kind("a Scene", lambda value: isinstance(value, Scene)),
}


def misspelt(design: type[Design]) -> str | None:
    """What *design* defines that nothing will ever call, or that does not fit what it overrides; None if all is well."""
    return unfit(design, Design)


def lacks(thing: object) -> str | None:
    """What is wrong with *thing* as a design; None if nothing is."""
    if not (isinstance(thing, type) and issubclass(thing, Design)):
        return f"{shown(thing)} is no subclass of guest_memfd.designs.Design"
    missing = [what for what in ("name", "title", "source") if not hasattr(thing, what)]
    if missing:
        return f"{thing.__qualname__} lacks {', '.join(missing)}"
    return misspelt(thing) or wrong(thing, FIELDS) or _not_kept(thing) or in_class(thing)


# A design that says it keeps what it overrides says the contrary of what it does.
def _not_kept(design: type[Design]) -> str | None:
    own = beyond(design, Design)
    changed = next((name for name in design.keeps if any(name in vars(each) for each in own)), None)
    return None if changed is None else f"{design.__qualname__} says that it keeps {changed!r}, and it overrides that"
