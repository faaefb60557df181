"""Places as frames: a step of a procedure that stays within its inner frames is known for whoever has called them.

Theory of operation. Ten parties call the same operation of a library, from some hundred places of their own. What the
operation does with a result follows from its frames, and its callers are suspended in a ``yield from`` until it returns. So
a step that did not come back to a caller is kept by the frames that took part, and serves all who end in the same ones: the
frames of the caller are put in front of what the inner ones became, and no procedure is run.

Which frames took part is seen by the generators. Those of the chain before the step that are there after it, in the same
order, were not left; all but the last of them did not run. That a caller is not run is not enough: it may hold a list that
the inner frames change. Only frames that hold nothing of that kind (`place.keeps_to_itself`) are taken for themselves.

Frames have numbers here, so a place is a tuple of small integers. Third parties' procedures are run each time
(automaton.py), as running again is how they are watched.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import GeneratorType
from typing import Any

from guest_memfd.explore.engine.place import frame_key, keeps_to_itself
from guest_memfd.words.primitives import Primitive

Place = tuple[int, ...]
"""Numbers of frames, the outermost first."""

Chain = Sequence["GeneratorType[Any, Any, Any]"]

END: Place = ()


class Frames:
    """The frames of all parties that were ever seen, and the steps that stay within some of them."""

    def __init__(self, *, live: bool = False) -> None:
        self.live = live                                # only live locals tell frames apart
        self._numbers: dict[Any, int] = {}
        self._own: list[bool] = []                      # per frame: it keeps to itself
        self._after: dict[tuple[Place, Any], tuple[Place, Primitive]] = {}

    def place(self, chain: Chain) -> Place:
        """The place of a procedure that is suspended in *chain*; raises TypeError where one holds what has no hash."""
        return tuple(map(self._number, chain))

    def _number(self, generator: GeneratorType[Any, Any, Any]) -> int:
        key = frame_key(generator, live=self.live)
        known = self._numbers.get(key)
        if known is None:
            known = self._numbers[key] = len(self._own)
            self._own.append(keeps_to_itself(generator, live=self.live))
        return known

    def learn(self, before: Place, then: Chain, result: Any, now: Chain, primitive: Primitive) -> Place:
        """The place of *now*, where *primitive* is waited on; *result* has led there from *before*, which was *then*."""
        kept = 0
        for one, other in zip(then, now, strict=False):
            if one is not other:
                break
            kept += 1
        ran = max(kept - 1, 0)
        inner = self.place(now[ran:])
        if ran and all(self._own[frame] for frame in before[ran:]):
            self._after[before[ran:], result] = inner, primitive
            return before[:ran] + inner
        # What a caller holds may have been changed by whom it has called.
        return self.place(now[:ran]) + inner

    def after(self, place: Place, result: Any) -> tuple[Place, Primitive] | None:
        """Where *result* leads to from *place*, and what is waited on there, if that is known."""
        for at in range(len(place) - 1, 0, -1):
            if not self._own[place[at]]:
                return None
            known = self._after.get((place[at:], result))
            if known is not None:
                return place[:at] + known[0], known[1]
        return None
