"""The laws: one function, one sentence, one source each. What must hold whatever the design, whoever is interrupted.

A law sees facts (notes of `hosts/abstract/notes.py`), states, and the end of the world after everything was torn down;
it answers with evidence in words, or None. It never repairs, filters or forgives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from guest_memfd.hosts.abstract import notes
from guest_memfd.hosts.abstract import state as st
from guest_memfd.hosts.host import EAGAIN, EBUSY, EFAULT, EHWPOISON, ENOENT, ENOMEM

Evidence = str | None


@dataclass(frozen=True)
class Law:
    """A law. `when` says in words at which moments it is checked."""

    name: str
    sentence: str
    source: str
    when: str
    state: Callable[[st.State], Evidence] | None = None
    note: Callable[[Any], Evidence] | None = None
    end: Callable[[st.State], Evidence] | None = None

    def in_state(self, shared: bytes) -> Evidence:
        """Evidence in a reachable state."""
        return self.state(st.State(shared)) if self.state else None

    def on_note(self, note: Any) -> Evidence:
        """Evidence in a fact."""
        return self.note(note) if self.note else None

    def at_end(self, shared: bytes) -> Evidence:
        """Evidence in the state after teardown."""
        return self.end(st.State(shared)) if self.end else None


def host_survives(note: Any) -> Evidence:
    """Every abort that the kernel takes on its own must be one that it can handle."""
    if isinstance(note, notes.Abort) and not note.survived:
        return f"{note.what} takes a {note.kind} (stage {note.stage}): {note.why}"
    if isinstance(note, notes.Broken):
        return note.what
    return None


def guest_private(note: Any) -> Evidence:
    """Only the guest reads what it wrote in private; only the guest writes where it may write in private."""
    if not isinstance(note, notes.Access) or note.who == "guest" or not note.guests:
        return None
    if note.who == "library":
        broken = note.write and note.held
    else:
        broken = note.write or note.content == "secret"
    if not broken:
        return None
    verb = "writes" if note.write else "reads"
    return f"{note.what} {verb} a page that is private to the guest, through {_through(note.via)}"


def no_stale_data(note: Any) -> Evidence:
    """A reader finds zeros or what was last put there on purpose."""
    if isinstance(note, notes.Destroyed):
        return f"the guest's data is lost: {note.how}"
    if not isinstance(note, notes.Access) or note.who not in ("guest", "VMM", "device"):
        return None
    if note.content == "junk":
        return f"the {note.who} receives a page with somebody else's data"
    if note.expect is not None and note.who != "device" and note.content != note.expect:
        return f"the {note.who} finds {note.content} where {note.expect} should be"
    return None


def one_owner_note(note: Any) -> Evidence:
    """The guest reaches only what is its own."""
    if isinstance(note, notes.StrayGuest):
        return f"the guest reaches a page that it no longer owns, through {_through(note.via)}"
    return None


def one_owner(state: st.State) -> Evidence:
    """Outside of every operation, library, host tables and hypervisor tell the same story of each page."""
    if state.invalidate_w:
        return None
    for frame in state.frames():
        if frame.lock:
            continue
        if not frame.allocated:
            if frame.owner != st.HOST or frame.gmap:
                return "a free page is still the guest's"
            continue
        if frame.slot:
            evidence = _one_story(state, frame)
            if evidence:
                return evidence
        elif frame.gmap:
            return "the guest maps a page that the file no longer holds"
    return None


def _one_story(state: st.State, frame: st.Frame) -> Evidence:
    private = state.private(frame)
    if frame.owner == st.GUEST and not private:
        return "the hypervisor says guest, the library says shared"
    if private and frame.user:
        return "the VMM's page table maps a page that is private to the guest"
    if private and frame.gmap and frame.s2 and frame.owner != st.BORROWED and (frame.s1 or frame.stale):
        return "guest and host both reach a private page"
    return None


def nothing_lost_note(note: Any) -> Evidence:
    """What is freed is the host's, out of the guest's reach, and says nothing of the guest."""
    if not isinstance(note, notes.Freed):
        return None
    if note.owner != "host" or note.guest_reaches:
        return f"a page is freed while it is the guest's (owner {note.owner})"
    if note.content == "secret":
        return "a page is freed with the guest's data in it"
    return None


def nothing_lost(state: st.State) -> Evidence:
    """When the last reference is gone everything is back."""
    for frame in state.frames():
        if frame.poison:
            continue
        if frame.allocated == st.KEPT:
            return "a page is kept out of use for ever"
        if frame.allocated:
            return f"a page is never freed ({_references(frame)})"
        if not frame.s1 or not frame.s2 or frame.stale:
            return "a free page is not in the direct map"
    left = {
        "the inode": state.inodes, "the file": state.files, "the module": state.module,
        "a page is still counted as away, and so": state.away, "an invalidation": state.progress,
        "the door that hibernation closes": state.preparing,
    }
    for what, count in left.items():
        if count:
            return f"{what} is held for ever"
    return None


def _references(frame: st.Frame) -> str:
    kinds = ("cache", "lru", "lookup", "provided", "pin", "get", "spec")
    return ", ".join(f"{kind} {getattr(frame, kind)}" for kind in kinds if getattr(frame, kind)) or "no reference"


def pins_respected_note(note: Any) -> Evidence:
    """Nobody holds a way in when a page becomes private."""
    if isinstance(note, notes.MadePrivate):
        if note.pins:
            return f"a page is {note.how} while somebody holds a reference to reach it by"
        if note.cached_mapping:
            return f"a page is {note.how} while a gfn_to_pfn_cache maps it"
    return None


def pins_respected(state: st.State) -> Evidence:
    """Nor gets one later."""
    for frame in state.frames():
        if (frame.pin or frame.get) and frame.slot and not frame.lock and not state.invalidate_w and (
                state.private(frame)):
            return "a private page has been pinned"
    return None


DOCUMENTED: dict[str, tuple[int, ...]] = {
    "fault": (EFAULT, ENOMEM, EHWPOISON, EAGAIN),
    "allocate": (ENOMEM, EHWPOISON, EAGAIN),
    "punch": (EBUSY, EAGAIN),
    "to_private": (EAGAIN, ENOMEM, EBUSY),
    "to_shared": (EBUSY, ENOMEM, EAGAIN),
    "unbind": (EBUSY, EAGAIN, ENOENT),
    "teardown": (EAGAIN,),
}
"""Operation -> errno values its documentation names."""


def all_or_nothing(note: Any) -> Evidence:
    """What an operation returned, and what it did, must agree; and it keeps to its range."""
    if isinstance(note, notes.OutOfScope):
        return f"{note.op} {note.what} outside of its range"
    if not isinstance(note, notes.Ended):
        return None
    if note.ret < 0 and -note.ret not in DOCUMENTED.get(note.op, ()):
        return f"{note.op} returns errno {-note.ret}, which is not documented for it"
    if note.error_index is not None and note.error_index not in note.scope:
        return f"{note.op} names page {note.error_index} as the one that refused, outside of its range"
    check = _ENDINGS.get(note.op)
    return check(note) if check else None


def _punched(note: notes.Ended) -> Evidence:
    if note.ret == 0 and note.left:
        return "punch returns 0 and a page of the hole is still there"
    if note.ret == -EBUSY and note.removed:
        return "punch is refused and has removed a page"
    if note.ret < 0 and note.error_index is None:
        return "punch fails and does not say where"
    return None


def _converted(note: notes.Ended) -> Evidence:
    if note.ret < 0 and note.toggled:
        return f"{note.op} is refused and has changed a page"
    wanted = st.PRIVATE_PAGE if note.op == "to_private" else st.SHARED_PAGE
    if note.ret == 0 and any(attr != wanted for attr in note.attrs):
        return f"{note.op} returns 0 and a page has not been converted"
    if note.ret == -EBUSY and note.error_index is None:
        return f"{note.op} is refused and does not say where"
    # Only this way are references counted; -EAGAIN on the way back is the hypervisor's.
    if note.op == "to_private" and note.ret == -EAGAIN and note.error_index in note.batched:
        return f"{note.op} is refused for a reference that draining the lru_add batches would have dropped"
    return None


def _allocated(note: notes.Ended) -> Evidence:
    return "allocate returns 0 and a page is not there" if note.ret == 0 and note.left != note.scope else None


def _unbound(note: notes.Ended) -> Evidence:
    return f"{note.op} returns 0 and a page is still bound" if note.ret == 0 and note.bound else None


_ENDINGS: dict[str, Callable[[notes.Ended], Evidence]] = {
    "punch": _punched, "to_private": _converted, "to_shared": _converted, "allocate": _allocated, "unbind": _unbound,
}


def library_alone(note: Any) -> Evidence:
    """Core kernel code may change the direct map; a module may not."""
    if isinstance(note, notes.DirectMapChange) and note.caller not in ("library", "mm"):
        return f"module {note.caller} changes the direct map itself"
    return None


def _through(via: str) -> str:
    return {"direct map": "the direct map", "DMA": "DMA"}.get(via, f"a {via}")


LAWS: dict[str, Law] = {law.name: law for law in (
    Law("host-survives",
        "no access the kernel may make on its own ends in an abort it cannot handle",
        "arch/arm64/mm/fault.c do_sea(), arch/arm64/mm/extable.c; 19/35 thread, Feb-Mar 2024",
        "at every access of the kernel", note=host_survives),
    Law("guest-private",
        "what is private to a guest is read or written by nobody else: not through stage 1, a stale TLB entry, a user "
        "mapping, a pin, DMA, or an image on disk",
        "Documentation/virt/kvm/api.rst guest_memfd; David Hildenbrand, 26 Feb 2024; Mike Rapoport, 19 Aug 2024",
        "at every access", note=guest_private),
    Law("no-stale-data",
        "whoever receives a page sees zeros or his own data, never another's; data that must be preserved is",
        "virt/kvm/guest_memfd.c kvm_gmem_prepare_folio(); Ackerley Tng, 8 Aug 2024",
        "at every access of guest, VMM and device", note=no_stale_data),
    Law("one-owner",
        "no page is private to two parties, and the host's tables, the hypervisor's and the library's say the same",
        "arch/arm64/kvm/hyp/nvhe/mem_protect.c; Gunyah API, memory extents",
        "in every state where no lock is held on the page", state=one_owner, note=one_owner_note),
    Law("nothing-lost",
        "when the last reference is gone every page is back: owned by the host, in the direct map, scrubbed, free - "
        "whatever failed on the way, whoever was unloaded",
        "mm/secretmem.c secretmem_free_folio(); Vishal Annapurve, 10 Oct 2024",
        "when a page is freed, and after teardown", note=nothing_lost_note, end=nothing_lost),
    Law("pins-respected",
        "a page that someone may still reach through a reference is not converted",
        "David Hildenbrand, 26 Feb and 6-17 Aug 2024",
        "when a page becomes private, and in every state", state=pins_respected, note=pins_respected_note),
    Law("all-or-nothing",
        "a refused operation leaves what its documentation says, with the documented errno and offset",
        "in-place conversion v8-v13 (2026); Sean Christopherson, 3 Apr 2025",
        "when an operation returns", note=all_or_nothing),
    Law("progress",
        "no deadlock, no lost wake-up; every operation ends, or ends after finitely many retries",
        "mm/guestmem RFC v2 discussion, Aug 2024",
        "by the explorer: in states from which nobody moves, and on cycles"),
    Law("library-alone",
        "only the library changes the direct map",
        "Christoph Hellwig, 22 and 26 Feb 2024",
        "at every change of a direct-map entry", note=library_alone),
    Law("bounded-cost",
        "splits, flushes and page-table pages stay within the stated bound, and are counted",
        "Dave Hansen, 5 Dec 2025; arch/x86/mm/pat/set_memory.c",
        "by counting operations (gmem compare); reported, not judged"),
)}
"""All ten, in the order of the design."""
