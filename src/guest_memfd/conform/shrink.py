"""As few steps as show a difference, with arguments as plain as can be.

Any part of a sequence is a sequence, since nothing depends on results. So blocks of steps are left out, large ones first,
for as long as the last step is still answered in two ways; then each argument is tried with plainer values.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from guest_memfd.conform.compare import Difference
from guest_memfd.conform.operations import BEGINNING, OPERATIONS, UserCall
from guest_memfd.conform.sequence import Sequence

Try = Callable[[Sequence], Difference | None]


def shrink(found: Difference, attempt: Try, seconds: float = 60.0) -> Difference:
    """The smallest difference of the same operation that *attempt*, which compares a sequence, still has.

    After *seconds* it is the smallest so far.
    """
    end = time.monotonic() + seconds
    while True:
        for sequence in _smaller(found.sequence):
            if time.monotonic() > end:
                return found
            new = attempt(sequence)
            # A shorter sequence may be answered in two ways for another reason.
            # Of the same operation, it is most likely the same.
            if new is not None and new.step.op == found.step.op:
                found = new
                break
        else:
            return found


def _smaller(sequence: Sequence) -> Iterator[Sequence]:
    length = len(sequence) - 1                          # the last step is what it is about
    if sequence[:len(BEGINNING)] == BEGINNING and length > len(BEGINNING):
        yield (*BEGINNING, sequence[-1])                # a row of a table
    size = length
    while size:
        for at in range(0, length, size):
            yield sequence[:at] + sequence[min(at + size, length):]
        size //= 2
    for at, step in enumerate(sequence):
        for place, param in enumerate(OPERATIONS[step.op].params):
            for value in param.values:
                # Values stand from plain to odd in operations.py. Only plainer ones are tried, so this comes to an end.
                if value == step.args[place]:
                    break
                args = (*step.args[:place], value, *step.args[place + 1:])
                yield (*sequence[:at], UserCall(step.op, args), *sequence[at + 1:])
