"""/dev/gunyah of an emulated machine, for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from gunyah_guest import Scene

from guest_memfd.errors import SyscallFailed

LENT, SHARED, HUGE = 0xA000_0000, 0x8_0000, 2 << 20
DESIGNS = ("library", "gunyah-v17")
MAGIC = 0x0123_4567_89AB_CDEF


def errno_of(what: Callable[..., Any], *args: Any, **named: Any) -> int:
    with pytest.raises(SyscallFailed) as failed:
        what(*args, **named)
    return failed.value.errno


def nothing_is_lost(scene: Scene) -> None:
    scene.close()
    assert scene.machine.audit() == []
