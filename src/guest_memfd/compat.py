"""What newer Pythons have, for 3.11."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeVar

if sys.version_info >= (3, 12):
    from typing import override as override
elif TYPE_CHECKING:
    from typing_extensions import override as override
else:
    _Method = TypeVar("_Method")

    def override(method: _Method) -> _Method:
        """Mark *method* as one that its base class has, too: mypy refuses the mark on any other (typing.override)."""
        return method
