"""The small enumerations that all hosts share: who owns a page, what it holds, how far a VM or an inode is.

Values are small integers, so that a state of the abstract host is bytes; 0 is what a host begins with.
"""

from __future__ import annotations

# Owner of a frame, as the hypervisor records it.
HOST, GUEST, SHARED, BORROWED = range(4)
OWNERS = ("host", "guest", "shared", "borrowed")
"""shared: host's, lent to be used by both; borrowed: the guest's, which the guest lets the host use."""

# Where a frame is with the allocator; kept: broken hardware, out of use permanently.
FREE, ALLOCATED, KEPT = range(3)

# Who says that a frame is not in the direct map: no one, the library's mark, or the allocator, from which it came so.
MAPPED, MARKED, UNMAPPED = range(3)

# What a frame holds.
ZERO, JUNK, DATA, SECRET = range(4)
CONTENTS = ("zero", "junk", "data", "secret")
"""junk: left by an unknown previous owner; data: host and guest may both know it; secret: written by the guest while
the page was private."""

MANY = 255
"""As much as a count is kept; from there on it stays."""

ANY = 255
"""Expected content of a page no one can rely on (relinquished, or never written)."""

SHARED_PAGE, PRIVATE_PAGE = 1, 2
"""Entries of the library's attribute tree; 0 would be a hole, and is a bug."""

SLOT_INVALID = 1
"""Of an entry of memslots: KVM_MEMSLOT_INVALID, it is on its way out (include/linux/kvm_host.h)."""

RUNNING, DYING, GONE = range(3)
VM_STATES = ("running", "dying", "gone")

NO_INODE, ALIVE, EVICTED, DESTROYED = range(4)
INODE_STATES = ("none", "alive", "being evicted", "destroyed")
"""Not allocated yet; in use; its last reference has gone; its memory has gone."""

REASONS = ("a failure", "the guest holds on", "a reference", "hibernation", "a poisoned page", "somebody else", "an end",
           "a refusal for good")
"""What may stand against an operation: an injected failure, or no free frame; a refusal of the hypervisor by its rules;
someone's reference; hibernation under way; broken hardware; a lock or a slot that someone else has; a file, a VM or a
module that is not there any more; a hypervisor that will never give the page back."""
FAILURE, HELD, REFERENCE, HIBERNATION, POISON, CONTENTION, GONE_BEFORE, FOR_GOOD = (1 << n for n in range(8))
