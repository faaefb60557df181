"""Laws about single accesses: what the kernel survives, what stays secret, what a reader finds, what is free."""

from __future__ import annotations

from typing import Any

from guest_memfd.laws.law import Evidence
from guest_memfd.words import facts

ANYTHING = frozenset({"load_unaligned_zeropad", "copy_from_kernel_nofault", "safe_copy_page", "free-time poisoning"})
"""Accesses of the kernel that are not meant for any page in particular."""


def through(via: str) -> str:
    """``the direct map``, ``a user mapping``: a way to a page, in a sentence."""
    return {"direct map": "the direct map", "DMA": "DMA"}.get(via, f"a {via}")


def host_survives(note: Any) -> Evidence:
    """Every abort that the kernel takes on its own must be one that it can handle."""
    if isinstance(note, facts.Abort) and not note.survived:
        return f"{note.what} takes a {note.kind} (stage {note.stage}): {note.why}"
    if isinstance(note, facts.Broken):
        return note.what
    return None


def guest_private(note: Any) -> Evidence:
    """Only the guest reads what it wrote in private; only the guest writes where it may; and what it is lent is private."""
    if isinstance(note, facts.Returned) and note.op == "lend" and not note.ret and note.shared:
        return f"the guest is lent page {note.shared[0]}, and the host shares it"
    if not isinstance(note, facts.Access) or note.who == "guest" or not note.guests:
        return None
    # The library may read and zero a page that it is about to give away; it may not write to one that the guest has.
    if note.who == "library":
        broken = note.write and note.held
    else:
        broken = note.write or note.content == "secret"
    if not broken:
        return None
    verb = "writes" if note.write else "reads"
    return f"{note.what} {verb} a page that is private to the guest, through {through(note.via)}"


def no_stale_data(note: Any) -> Evidence:
    """A reader finds zeros or what was last put there on purpose."""
    if isinstance(note, facts.Destroyed):
        return f"the guest's data is lost: {note.how}"
    if not isinstance(note, facts.Access) or note.who not in ("guest", "VMM", "device"):
        return None
    # What another owner has left there. No one is meant to see it, neither the guest nor the VMM.
    if note.content == "junk":
        return f"the {note.who} receives a page with somebody else's data"
    # A device may have pinned the page before it was replaced: it keeps the old one, which is allowed.
    if note.expect is not None and note.who != "device" and note.content != note.expect:
        return f"the {note.who} finds {note.content} where {note.expect} should be"
    return None


def free_memory(note: Any) -> Evidence:
    """Who means a page means one that someone has."""
    # A stray load may hit any page, a free one as well; an access that means its page may not.
    if not isinstance(note, facts.Access) or not note.free or note.what in ANYTHING:
        return None
    return f"{note.what} {'writes' if note.write else 'reads'} free memory, through {through(note.via)}"


def lifetimes(note: Any) -> Evidence:
    """No primitive is called on what is gone."""
    return f"use after free of {note.what}" if isinstance(note, facts.UseAfterFree) else None


def library_alone(note: Any) -> Evidence:
    """Core kernel code may change the direct map; a module may not."""
    if isinstance(note, facts.DirectMapChange) and note.caller not in ("library", "mm"):
        return f"module {note.caller} changes the direct map itself"
    return None


def poison_note(note: Any) -> Evidence:
    """Once memory_failure() has done with a page no one gets it, and its word is what has become of it."""
    if isinstance(note, facts.Given):
        return f"{note.whom} is given a page whose memory is broken"
    if isinstance(note, facts.Access) and note.broken and note.who in ("guest", "VMM", "library"):
        return f"the {note.who} reaches a page whose memory is broken, through {through(note.via)}"
    if isinstance(note, facts.DirectMapChange) and note.broken and not note.invalid:
        return "a page whose memory is broken is put back into the direct map"
    if isinstance(note, facts.Ended) and "a poisoned page" in note.reasons and note.op in ("fault", "allocate"):
        return f"{note.op} of a page whose memory is broken returns 0" if not note.ret else None
    return _contained(note) if isinstance(note, facts.Contained) else None


NO_EXCUSE = frozenset({"a poisoned page", "somebody else"})
"""What may stand against memory_failure() and is no reason to give up: what it is about, and a lock that passes."""


def _contained(note: facts.Contained) -> Evidence:
    if note.result not in ("delayed", "failed"):
        return f"memory_failure() is told {note.result!r}, which means nothing to it"
    if note.result == "delayed" and note.reached:
        return f"memory_failure() is told that the page is taken care of, and {note.reached[0]} still reaches it"
    if note.result == "failed" and not set(note.reasons) - NO_EXCUSE:
        return "memory_failure() is told of a failure, and nothing has failed that it could not have waited for"
    return None
