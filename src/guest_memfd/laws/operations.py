"""Laws about operations: what they return, what they did, what stood against them, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from errno import EAGAIN, EBADF, EBUSY, EEXIST, EFAULT, EINVAL, EIO, ENODEV, ENOENT, ENOMEM, EOPNOTSUPP
from typing import Any

from guest_memfd.errors import EHWPOISON, errno_name
from guest_memfd.laws.law import Evidence
from guest_memfd.words import facts
from guest_memfd.words.pagestate import PRIVATE_PAGE, SHARED_PAGE

DOCUMENTED: dict[str, tuple[int, ...]] = {
    "fault": (EFAULT, ENOMEM, EHWPOISON, EAGAIN),
    "user_fault": (EFAULT,),
    "allocate": (ENOMEM, EHWPOISON, EAGAIN),
    "punch": (EBUSY, EAGAIN, EIO, ENOMEM),
    "to_private": (EAGAIN, ENOMEM, EBUSY, EIO),
    "to_shared": (EBUSY, ENOMEM, EAGAIN, EIO),
    "unbind": (EBUSY, EAGAIN, ENOENT, EIO, ENOMEM),
    "teardown": (EAGAIN,),
    "create": (ENODEV, ENOMEM),
    "bind": (EEXIST, ENOMEM, EBADF, ENODEV, EAGAIN),
    "write": (EFAULT, EEXIST, ENOMEM, EHWPOISON, EAGAIN),
    "populate": (EINVAL, EEXIST, ENOMEM, EHWPOISON, EAGAIN),
    "copy": (EFAULT, EEXIST, ENOMEM),
}
"""Operation -> errno values its documentation names; a hypervisor may add its own (`Hypervisor.errnos`)."""

REASONS: dict[int, frozenset[str]] = {
    ENOMEM: frozenset({"a failure"}),
    EBUSY: frozenset({"the guest holds on"}),
    EHWPOISON: frozenset({"a poisoned page"}),
    EIO: frozenset({"a refusal for good"}),
    ENODEV: frozenset({"an end"}),
    EBADF: frozenset({"an end"}),
}
"""errno -> what must have stood against an operation that returns it."""

PASSING: dict[str, frozenset[str]] = {
    "fault": frozenset({"a failure", "hibernation", "somebody else"}),
    **dict.fromkeys(("allocate", "write", "populate"), frozenset({"somebody else"})),
    "to_private": frozenset({"a failure", "hibernation", "a reference"}),
    **dict.fromkeys(("to_shared", "bind", "unbind", "teardown"), frozenset({"a failure", "a reference"})),
}
"""Operation -> what must have stood against it when it returns -EAGAIN; where it is not here, a failure."""


def all_or_nothing(note: Any) -> Evidence:
    """What an operation returned, and what it did, must agree; it keeps to its range, and a refusal names its place."""
    if isinstance(note, facts.OutOfScope):
        return f"{note.op} {note.what} outside of its range"
    if isinstance(note, facts.Returned) and note.begun:
        return f"{note.op} returns, and the invalidation it has begun goes on for ever"
    if isinstance(note, facts.Unannounced):
        return f"{note.op} {note.what}, which no gmem_invalidate_begin() of its own has announced"
    if isinstance(note, facts.Rebound):
        return "bind takes a page that is bound already"
    if not isinstance(note, facts.Ended):
        return None
    if note.ret < 0 and -note.ret not in (*DOCUMENTED.get(note.op, ()), *note.documented):
        return f"{note.op} returns errno {-note.ret}, which is not documented for it"
    if note.error_index is not None and note.error_index not in note.scope:
        return f"{note.op} names page {note.error_index} as the one that refused, outside of its range"
    check = _ENDINGS.get(note.op)
    return (check(note) if check else None) or (_place(note) if note.op in NAMING else None)


NAMING = frozenset({"punch", "to_private", "to_shared", "unbind"})
"""Operations that return the page index of the first page that refused."""


def _place(note: facts.Ended) -> Evidence:
    # These errnos are about the whole request and not about one page.
    if note.ret in (0, -ENOMEM, -ENOENT):
        return None
    if note.error_index is None:
        doors = note.ret == -EAGAIN and "hibernation" in note.reasons
        return None if doors or not (note.places or note.ret == -EAGAIN) else f"{note.op} is refused and does not say where"
    if not note.places and note.ret != -EAGAIN:
        return None
    if note.error_index not in note.places:
        return f"{note.op} names page {note.error_index} as the one that refused, and it was another"
    return None


def _punched(note: facts.Ended) -> Evidence:
    # What has been removed lies below the page that failed, and nothing below it has stayed.
    if note.removed and note.ret in (-EAGAIN, -EIO) and note.error_index is not None and (
            any(i >= note.error_index for i in note.removed) or any(i < note.error_index for i in note.left)):
        return f"punch stops at page {note.error_index}, and what it has removed is not what lies before it"
    # A hole that has a page in it would give old data to the next reader.
    if note.ret == 0 and note.left:
        return "punch returns 0 and a page of the hole is still there"
    if note.ret in (-EBUSY, -ENOMEM) and note.removed:
        return "punch is refused and has removed a page"
    return None


def _converted(note: facts.Ended) -> Evidence:
    wanted = PRIVATE_PAGE if note.op == "to_private" else SHARED_PAGE
    left = None if note.ret == 0 else _resumable(note, wanted) if note.resumes else _unchanged(note, wanted)
    if left is not None:
        return left
    if note.ret == 0 and any(attr != wanted for attr in note.attrs):
        return f"{note.op} returns 0 and a page has not been converted"
    # Only this way are references counted; -EAGAIN on the way back is the hypervisor's.
    if note.op == "to_private" and note.ret == -EAGAIN and note.error_index in note.batched:
        return f"{note.op} is refused for a reference that draining the lru_add batches would have dropped"
    return None


# All of the range or nothing of it: user space could not know which half it has.
def _unchanged(note: facts.Ended, wanted: int) -> Evidence:
    if note.toggled:
        return f"{note.op} is refused and has changed a page"
    if note.error_index in note.scope and note.attrs[note.scope.index(note.error_index)] == wanted:
        return f"{note.op} is refused for page {note.error_index}, of which it has nothing to change"
    return None


# What is done stays done, and the page that is named divides it from what is not: who asks again from there has all of it.
def _resumable(note: facts.Ended, wanted: int) -> Evidence:
    if note.error_index is None:
        return f"{note.op} is refused, has changed a page, and does not say where to go on" if note.toggled else None
    if any(index >= note.error_index for index in note.toggled):
        return f"{note.op} is to go on at page {note.error_index}, and has changed a page from there on"
    if any(attr != wanted for index, attr in zip(note.scope, note.attrs, strict=True) if index < note.error_index):
        return f"{note.op} is to go on at page {note.error_index}, and has left out a page before it"
    return None


def _allocated(note: facts.Ended) -> Evidence:
    return "allocate returns 0 and a page is not there" if note.ret == 0 and note.left != note.scope else None


def _filled(note: facts.Ended) -> Evidence:
    return f"{note.op} returns 0 and the page is not there" if note.ret == 0 and note.left != note.scope else None


def _unbound(note: facts.Ended) -> Evidence:
    if note.ret < 0 and note.toggled:
        return f"{note.op} is refused and has changed a binding"
    return f"{note.op} returns 0 and a page is still bound" if note.ret == 0 and any(note.bound) else None


# A design without attributes has none of any page.
def _created(note: facts.Ended) -> Evidence:
    if note.ret or not any(note.attrs):
        return None
    if 0 in note.attrs:
        return "create returns 0 and a page is neither private nor shared"
    return "create returns 0 and a page is not as it was asked for" if note.asked not in ((), note.attrs) else None


def _bound(note: facts.Ended) -> Evidence:
    if note.ret < 0 and note.toggled:
        return "bind is refused and has changed a binding"
    first = (note.bound[0] if note.bound else 0) if note.gfn is None else note.gfn + 1
    if note.ret == 0 and (not first or note.bound != tuple(range(first, first + len(note.bound)))):
        return "bind returns 0 and a page is not bound to its gfn"
    return None


_ENDINGS: dict[str, Callable[[facts.Ended], Evidence]] = {
    "punch": _punched, "to_private": _converted, "to_shared": _converted, "allocate": _allocated, "unbind": _unbound,
    "teardown": _unbound, "bind": _bound, "create": _created, "write": _filled, "populate": _filled, "copy": _filled,
}


def no_false_refusal(note: Any) -> Evidence:
    """An operation fails because of something, with the errno for it; and who asked is told what has happened."""
    if isinstance(note, facts.Ended) and note.ret < 0 and not _stands_against(note):
        against = f" (only {', '.join(note.reasons)})" if note.reasons else ""
        return f"{note.op} returns -{errno_name(-note.ret)}, and nothing stands against it{against}"
    return _returned(note) if isinstance(note, facts.Returned) else None


def _stands_against(note: facts.Ended) -> bool:
    errno = -note.ret
    # The file or the VM went while the operation was on its way.
    if "an end" in note.reasons and errno in (EFAULT, ENOENT):
        return True
    if errno == EFAULT:
        return _is_not_there(note)
    if errno == ENOENT:
        return not any(note.bound)
    if errno == EEXIST:
        return any(note.bound) if note.op == "bind" else bool(note.left)
    if errno == EBUSY and note.op == "punch" and "a reference" in note.reasons:
        return True                                     # to a part of a folio that it cuts
    if errno == EAGAIN:
        return bool(set(note.reasons) & PASSING.get(note.op, frozenset({"a failure"})))
    return errno not in REASONS or bool(REASONS[errno] & set(note.reasons))


# Of the guest: it is not bound there. Of the VMM: it is not shared, or there is no page to be had.
def _is_not_there(note: facts.Ended) -> bool:
    if note.op == "fault":
        return note.gfn is None or note.bound != (note.gfn + 1,)
    return note.attrs != (SHARED_PAGE,) or bool({"a failure", "a poisoned page"} & set(note.reasons))


def _returned(note: facts.Returned) -> Evidence:
    # Beyond the end of the file, or of a design that never says: then what has ended is something else, before it.
    if note.op == "user_fault" and (note.how is None or note.how.op != "user_fault"):
        return None
    valid = note.start >= 0 and note.nr > 0 and (note.op == "punch" or note.start + note.nr <= note.size)
    if not valid:
        refused = note.ret in (-EINVAL, -EOPNOTSUPP)
        return None if refused else f"{note.op} of what is no range of the file returns {_errno(note.ret)} and not -EINVAL"
    if note.op == "hibernate" and note.how is None:
        return "hibernation is refused, and nothing stands against it"
    if note.how is not None:
        return _told(note, note.how)
    # A driver may refuse before it asks the library; and a design what it says that it does not do: a part of a huge page.
    if note.ret == -EOPNOTSUPP or note.op == "lend" or -note.ret in note.documented:
        return None
    return f"{note.op} returns {_errno(note.ret)} without having begun"


PARTS = frozenset({("lend", "fault"), ("lend", "to_private")})
"""What a driver does, and operations of the library that it ends with."""


# What the caller is told is how it has ended, and where; and it was about what he had asked for.
def _told(note: facts.Returned, how: facts.HowEnded) -> Evidence:
    if note.op == "user_fault":
        same = (note.ret == -EFAULT) == (how.ret == -EFAULT)        # SIGBUS or not; the others only try again
    else:
        same = note.ret == how.ret and (note.op == how.op or (note.op, how.op) in PARTS)
    if not same:
        return f"{how.op} has ended with {_errno(how.ret)} and {note.op} returns {_errno(note.ret)}"
    if note.op not in ("hibernate", "lend") and how.about != range(note.start, min(note.start + note.nr, note.size)):
        return f"{note.op} has been about other pages than it was asked for"
    if None not in (note.gfn, how.gfn) and note.gfn != how.gfn:
        return f"{note.op} has been about gfn {how.gfn}, and was asked for gfn {note.gfn}"
    if note.op in NAMING and note.ret < 0 and note.error_index != how.at:
        return f"{note.op} has ended at page {how.at} and tells its caller of page {note.error_index}"
    return None


def _errno(ret: int) -> str:
    return f"-{errno_name(-ret)}" if ret < 0 else str(ret)


FAULTS = {"fault": "guest", "user_fault": "VMM"}
"""Faults, and whose."""


def fault_served(note: Any) -> Evidence:
    """Who is told to go on can go on: the guest, or the VMM."""
    if not isinstance(note, facts.Ended) or note.op not in FAULTS or note.ret != 0 or note.mapped == note.scope:
        return None
    # VM_FAULT_OOM, VM_FAULT_RETRY: the VMM faults again, and what failed, or was faster, passes.
    if note.op == "user_fault" and {"a failure", "somebody else"} & set(note.reasons):
        return None
    return f"a fault returns 0, and the {FAULTS[note.op]} does not map the page: it faults again, for ever"


def bounded_cost(note: Any) -> Evidence:
    """An operation asks the host for no more than the design states."""
    if not isinstance(note, facts.Ended) or note.bound_of_cost is None:
        return None
    # At least one: an operation on an empty range may ask for what one page costs, to find out that it is empty.
    # What is done to a large folio is done to pages around the range, too.
    folios, most = max(note.around or len(note.scope), 1), note.bound_of_cost
    bounds = {"direct-map writes": (note.cost.writes, most.writes * folios),
              "TLB flushes": (note.cost.flushes, most.flushes * folios + most.once),
              # A hypervisor is asked for a large folio as a whole first, and then perhaps for each of its pages.
              "hypercalls": (note.cost.calls, most.calls * (folios + note.leaves)),
              "stalls": (note.cost.stalls, most.stalls), "leaf splits": (note.cost.splits, most.splits * note.leaves)}
    for what, (count, bound) in bounds.items():
        if count > bound:
            return f"{note.op} of {folios} pages takes {count} {what}, and at most {bound} are stated"
    return None
