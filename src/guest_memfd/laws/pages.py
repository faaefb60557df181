"""Laws about pages: whose they are, who maps them, who holds them, and that they come back."""

from __future__ import annotations

from typing import Any

from guest_memfd.abstract import state as st
from guest_memfd.laws.access import through
from guest_memfd.laws.law import Evidence
from guest_memfd.words import facts
from guest_memfd.words.pagestate import ANY, BORROWED, CONTENTS, DESTROYED, GUEST, HOST, KEPT, MARKED, NO_INODE
from guest_memfd.words.units import Pfn, span


def no_stale_data(state: st.State) -> Evidence:
    """A page that no one is working on holds what was last put there on purpose."""
    for frame in state.frames():
        head = state.head(frame)
        if not frame.slot or not head.uptodate or head.lock or frame.poison or (
                state.file_of(frame.slot - 1).invalidate_w):
            continue
        expect = state.page(frame.slot - 1).expect
        if expect not in (ANY, frame.content):
            return f"a page of the file holds {CONTENTS[frame.content]} where {CONTENTS[expect]} should be"
    return None


def one_owner_note(note: Any) -> Evidence:
    """The guest reaches only what is its own."""
    if isinstance(note, facts.StrayGuest):
        return f"the guest reaches a page that it no longer owns, through {through(note.via)}"
    return None


def one_owner(state: st.State) -> Evidence:
    """Outside of every operation, library, host tables and hypervisor tell the same story of each page."""
    for frame in state.frames():
        # Under the folio lock, or with the file locked exclusively, the records may disagree: someone is just
        # changing them.
        if state.head(frame).lock or (frame.slot and state.file_of(frame.slot - 1).invalidate_w):
            continue
        if not frame.allocated:
            if frame.owner != HOST:
                return "a free page is still the guest's"
        elif frame.slot:
            evidence = _one_story(state, frame) or _one_leaf(state, frame)
            if evidence:
                return evidence
    return None


def _one_story(state: st.State, frame: st.Frame) -> Evidence:
    private = state.private(frame)
    # Owner GUEST means that stage 2 withholds the page. With the attribute shared the next host access would be
    # allowed by the library and end in an abort.
    if frame.owner == GUEST and not private:
        return "the hypervisor says guest, the library says shared"
    if private and frame.user:
        return "the VMM's page table maps a page that is private to the guest"
    # The guest's consent, from before: the next conversion to shared would be granted without one of its own.
    if private and frame.withdrawn:
        return "a page has become private, and by the hypervisor's record the guest still lets the host use it"
    if private and frame.gmap and frame.s2 and frame.owner != BORROWED and (frame.s1 or frame.stale):
        return "guest and host both reach a private page"
    return None


# What is done to a leaf is done to all of it, so it cannot be right of pages of both kinds.
def _one_leaf(state: st.State, frame: st.Frame) -> Evidence:
    order = state.folio(frame.number).guest_leaf if state.layout.sizes.order and frame.gmap else 0
    first = Pfn(frame.number >> order << order)
    if any(state.private(state.frame(pfn)) != state.private(frame) for pfn in span(first, 1 << order)):
        return "a leaf of the guest maps private pages and shared ones"
    return None


def no_stale_mapping(state: st.State) -> Evidence:
    """A page is mapped where the file has it; one that has left the file is not mapped at all."""
    for frame in state.frames():
        if frame.user and frame.user != frame.slot:
            return "the VMM's page table maps a page that the file no longer holds"
        # A page that the hypervisor will never give back may stay mapped in the guest; it is counted as leaked.
        if not frame.slot and not frame.stuck and (frame.gmap or frame.gstale):
            how = "" if frame.gmap else ", in a TLB"
            return f"the guest maps a page that the file no longer holds{how}"
    for vm in state.vms():
        if vm.gpc and not state.frame(vm.gpc - 1).slot:
            return "a gfn_to_pfn_cache maps a page that the file no longer holds"
    return None


def nothing_lost_note(note: Any) -> Evidence:
    """What is freed is the host's, out of the guest's reach, and says nothing of the guest."""
    if not isinstance(note, facts.Freed):
        return None
    if note.owner != "host" or note.guest_reaches:
        return f"a page is freed while it is the guest's (owner {note.owner})"
    if note.content == "secret":
        return "a page is freed with the guest's data in it"
    return None


def nothing_lost(state: st.State) -> Evidence:
    """When the last reference is gone everything is back, or counted as what the hypervisor keeps for good."""
    for frame in state.frames():
        # Broken memory stays out of use, and is lost by no one's mistake.
        evidence = None if frame.poison else _leaked(state, frame) if frame.stuck or state.head(frame).kept else _lost(frame)
        if evidence:
            return evidence
    kept = [head for frame in state.frames() if (head := state.head(frame)).kept]
    left = {
        "the inode": any(file.inode not in (NO_INODE, DESTROYED) for file in state.all_files()),
        "the file": any(file.files for file in state.all_files()),
        "the module": state.module,
        "a page is still counted as away, and so": max(state.away - sum(frame.no_direct_map == MARKED for frame in kept), 0),
        "what the hypervisor keeps of the file": any(file.inode and not file.released for file in state.all_files()),
        "an invalidation": any(vm.progress for vm in state.vms()),
        "the door that hibernation closes": state.preparing,
    }
    for what, count in left.items():
        if count:
            return f"{what} is held for ever"
    if state.leaked != len(kept):
        return f"{state.leaked} pages are counted as leaked, and there are {len(kept)}"
    return None


def _lost(frame: st.Frame) -> Evidence:
    if frame.allocated == KEPT:
        return "a page is kept out of use for ever"
    if frame.allocated:
        return f"a page is never freed ({_references(frame)})"
    if not frame.s1 or not frame.s2 or frame.stale:
        return "a free page is not in the direct map"
    return None


TRIES = 2
"""How many failures there must have been before a page may be given up that the hypervisor has not refused for good."""


# The hypervisor will not give it back, or what it takes has failed again and again: then it must never be used again, and be
# counted once.
def _leaked(state: st.State, frame: st.Frame) -> Evidence:
    if not frame.stuck and state.given - state.failures < TRIES:
        return "a page is kept out of use for ever, and the hypervisor had not refused for good"
    head = state.head(frame)
    if head.kept == 1 and head.refs() == 1:
        return None
    if frame.owner == HOST and not head.kept:        # it came back in the end, by another way
        return _lost(frame)
    return f"a page that the hypervisor keeps is not given up properly ({_references(head)})"


def _references(frame: st.Frame) -> str:
    kinds = ("cache", "lru", "lookup", "provided", "pin", "get", "spec", "kept")
    return ", ".join(f"{kind} {getattr(frame, kind)}" for kind in kinds if getattr(frame, kind)) or "no reference"


def pins_respected_note(note: Any) -> Evidence:
    """No one holds a way in when a page becomes private."""
    if isinstance(note, facts.MadePrivate):
        if note.pins:
            return f"a page is {note.how} while somebody holds a reference to reach it by"
        if note.cached_mapping:
            return f"a page is {note.how} while a gfn_to_pfn_cache maps it"
    return None


def pins_respected(state: st.State) -> Evidence:
    """Nor gets one later."""
    for frame in state.frames():
        head = state.head(frame)
        if (head.pin or head.get) and frame.slot and not head.lock and state.private(frame) and (
                not state.file_of(frame.slot - 1).invalidate_w):
            return "a private page has been pinned"
    for vm in state.vms():
        if vm.gpc and (frame := state.frame(vm.gpc - 1)).slot and state.private(frame) and (
                not state.file_of(frame.slot - 1).invalidate_w):
            return "a gfn_to_pfn_cache maps a private page"
    return None


def no_direct_map(state: st.State) -> Evidence:
    """Who has the folio locked is on his way of taking it out, or has a window on it for the moment."""
    for frame in state.frames():
        if not frame.slot or state.head(frame).lock:
            continue
        if frame.s1:
            return "a page of the file is in the direct map"
        if frame.stale:
            return "a page of the file is in a TLB by its entry in the direct map"
    return None
