"""What can go wrong, by subject. Where two operators come to the same code, the first of them has the mutant."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mutants.change import Change
from mutants.operators import conditions, locks, loops, numbers, returns, steps, values, words
from mutants.site import Site

Operator = Callable[[Site], Iterator[Change]]

OPERATORS: dict[str, Operator] = {operator.__name__.replace("_", "-"): operator for operator in (
    steps.drop_undo, steps.drop_step, steps.swap_steps, steps.repeat_step, steps.ignore_result, steps.drop_assignment,
    steps.return_early,
    locks.no_lock, locks.other_mode, locks.other_lock, locks.wait_for_lock,
    returns.return_zero, returns.return_error, returns.drop_return, returns.drop_index, returns.index_off_by_one,
    returns.other_errno,
    conditions.negate, conditions.drop_condition, conditions.drop_operand, conditions.and_or, conditions.compare,
    loops.part_of_batch, loops.leave_loop, loops.return_in_loop,
    numbers.other_place, numbers.off_by_one, numbers.arithmetic, numbers.sign, numbers.drop_clamp,
    words.other_constant, words.other_word, words.other_call, words.other_attribute, words.flip_bool,
    values.swap_arguments, values.drop_entry, values.swap_entries, values.drop_keyword,
)}
"""Name -> operator; the first line of its docstring says what it does."""
