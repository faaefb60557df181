"""What is asked of a protected guest: every operation in every state a page can be in, and then at random."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from guest_memfd.conform.operations import PKVM_OPERATIONS, UserCall
from guest_memfd.conform.sequence import Sequence, drawn

LENGTH = 30
"""Operations of a random sequence."""

_START = UserCall("start", (1,))
_STORE = UserCall("guest_writes", (0, 0, 0x1122_3344_5566_7788))
_SHARE, _UNSHARE = UserCall("share", (0, 0, 0)), UserCall("unshare", (0, 0, 0))
STATES: dict[str, Sequence] = {
    "no one's": (_START,),
    "the host's": (_START, UserCall("host_writes", (0, 0, 1))),
    "the guest's": (_START, _STORE),
    "lent to the host": (_START, _STORE, _SHARE),
    "written by the host while lent": (_START, _STORE, _SHARE, UserCall("host_writes", (0, 0, 1))),
    "the guest's again": (_START, _STORE, _SHARE, _UNSHARE),
    "taken by force": (_START, _STORE, UserCall("kernel_reads", (0,))),
    "taken by force, and met by the guest": (
        _START, _STORE, UserCall("kernel_writes", (0, 1)), UserCall("guest_reads", (0, 0))),
    "the guest's, and discarded": (_START, _STORE, UserCall("discard", (0,))),
    "lent, and discarded": (_START, _STORE, _SHARE, UserCall("discard", (0,))),
    "a dead guest's": (_START, _STORE, UserCall("teardown", ())),
    "another guest's before": (_START, _STORE, UserCall("teardown", ()), _START),
    "copied by a fork": (_START, _STORE, UserCall("forks", (0,))),
    "borrowed by a guest that is not protected": (UserCall("start", (0,)), _STORE),
}
"""States of page 0, and what leads there."""


def tables() -> Iterator[Sequence]:
    """After what leads to each state, each operation on page 0 with each value of each argument; and page 1 as it was."""
    for before in STATES.values():
        for operation in PKVM_OPERATIONS.values():
            plain = [param.usual[0] for param in operation.params]
            rows = {tuple(plain): None}
            for place, param in enumerate(operation.params):
                if param.name != "page":
                    rows |= {(*plain[:place], value, *plain[place + 1:]): None for value in param.values}
            for row in rows:
                # The last load shows whether the guest is still alive: one whose
                # page was taken by force is stuck at that instruction.
                yield (*before, UserCall(operation.name, row), UserCall("guest_reads", (1, 0)))


def random_sequence(seed: int, number: int) -> Sequence:
    """Sequence *number* of *seed*; one VM in six is not protected."""
    choose = Random(f"pkvm {seed} {number}")
    names, weights = [*PKVM_OPERATIONS], [each.weight for each in PKVM_OPERATIONS.values()]
    # More often would find less: what is not protected has hardly a refusal to compare.
    steps = [UserCall("start", (int(choose.random() > 1 / 6),))]
    steps += [drawn(choose, PKVM_OPERATIONS[name]) for name in choose.choices(names, weights, k=LENGTH - 1)]
    return tuple(steps)
