"""All kinds of input, by name."""

from __future__ import annotations

from fuzz.guests import Guests
from fuzz.hypercalls import GunyahCalls, PkvmCalls
from fuzz.kind import Kind
from fuzz.lines import Lines
from fuzz.lives import GunyahLives, KvmLives, PkvmLives
from fuzz.plugins import Plugins
from fuzz.traces import Traces

KINDS: dict[str, type[Kind]] = {kind.name: kind for kind in (
    Lines, Traces, Guests, Plugins, KvmLives, PkvmLives, GunyahLives, GunyahCalls, PkvmCalls)}
