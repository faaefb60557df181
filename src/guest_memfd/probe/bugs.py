"""Known bugs and traps of guest_memfd and memfd_secret: how each shows itself from user space, and what it means for a VMM.

Rule of this file: nothing that can hang or crash the host is tried; such a bug says why it is not. An act returns a verdict
(``present``, ``fixed``, ``cannot tell``), a colon, and what was seen.
"""

from __future__ import annotations

import gzip
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from guest_memfd.hosts.uapi.kvm import MemFlag
from guest_memfd.probe.calls import FAILED, attempt, call, name_of, store
from guest_memfd.probe.child import Slate, perform
from guest_memfd.probe.guest import Guest
from guest_memfd.probe.here import PAGE, SECRET, SIZE, Here, bind, punch, resident
from guest_memfd.probe.offers import direct_map, version_of
from guest_memfd.probe.row import Features
from guest_memfd.probe.rows import create, fallocate, guest, memory, pins, slots
from guest_memfd.probe.rows.slots import BEYOND, GMEM, GPA

VERDICTS = ("present", "fixed", "cannot tell", "not tested")


@dataclass(frozen=True)
class Bug:
    """*commit*: the fix, or where it was told; *means*: what a VMM has to do. *act* None: not tried, because of *why*."""

    id: str
    title: str
    commit: str
    means: str
    act: Callable[[Here], str] | None = None
    needs: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Found:
    """A bug here: the verdict, one of `VERDICTS`, and what it rests on."""

    bug: Bug
    verdict: str
    seen: str


def find(bug: Bug, slate: Slate, path: str, features: Features) -> Found:
    """Look for *bug*, in a child."""
    if bug.act is None:
        return Found(bug, "not tested", bug.why)
    for need in bug.needs:
        if need not in features:
            return Found(bug, "cannot tell", features.why(need))
    act = bug.act
    outcome = perform(lambda page: act(Here(page, path, features)), slate)
    if outcome.result is None:
        return Found(bug, "cannot tell", outcome.unfit or "")
    verdict, _, seen = outcome.result.partition(": ")
    if verdict not in VERDICTS:
        return Found(bug, "cannot tell", f"unexpected: {outcome.result}")
    return Found(bug, verdict, seen)


# -- how they show -----------------------------------------------------------------------------------------------------


def _offset_overflow(here: Here) -> str:
    runs = "guest" in here.features
    visitor = Guest(here) if runs else None
    fd = here.gmem()
    try:
        bind(here.vm, 1, GMEM, GPA, SIZE, 0, fd, BEYOND)
    except FAILED as error:
        return f"fixed: binding at offset 2^63-4096 is refused, {name_of(error)}"
    if visitor is None or "cachestat" not in here.features:
        return "present: binding at offset 2^63-4096 is accepted"
    stored = visitor.store(GPA, b"beyond")
    there = attempt(lambda: punch(fd, BEYOND, PAGE))
    punch(fd, 0, SIZE)
    bind(here.vm, 1, 0, 0, 0)
    pages = resident(fd, SIZE)
    return (f"present: binding at offset 2^63-4096 is accepted; a guest store there: {stored}; {pages} page past the end "
            f"survives a punch of "
            f"the file and the delete of the slot; a punch of it: {there}")


def _told(act: Callable[[], object], present: str, words: str, fixed: str) -> str:
    result = attempt(act)
    verdict = {present: "present", fixed: "fixed"}.get(result, "cannot tell")
    return f"{verdict}: {words}: {result}"


def _overlap_errno(here: Here) -> str:
    return _told(lambda: slots.two(here, 2 * GPA, 0, 2 * PAGE), "EINVAL", "binding pages twice", "EEXIST")


def _policy(here: Here) -> str:
    shown = memory.policy_elsewhere(here)
    return f"{'present' if shown == 'default' else 'fixed'}: after mbind(2) of one mapping another shows {shown!r}"


def _thp(here: Here) -> str:
    if _config("READ_ONLY_THP_FOR_FS") == "n":
        return "cannot tell: this kernel is built without READ_ONLY_THP_FOR_FS, so nobody makes such a page"
    return "cannot tell: with READ_ONLY_THP_FOR_FS trying it ends in a kernel warning, which may be a panic"


def _config(name: str) -> str:
    for path in (Path("/proc/config.gz"), Path(f"/boot/config-{platform.release()}")):
        try:
            data = path.read_bytes()
        except OSError:
            continue
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode(errors="replace")
        found = re.search(rf"^CONFIG_{name}=(\w+)", text, re.M)
        return found[1] if found else "n"
    return "?"


def _reserved(here: Here) -> str:
    words, pad = attempt(lambda: create.reserved_words(here)), attempt(lambda: slots.pads(here))
    verdict = "present" if "ok" in (words, pad) else "fixed"
    return f"{verdict}: reserved words of KVM_CREATE_GUEST_MEMFD: {words}; padding of KVM_SET_USER_MEMORY_REGION2: {pad}"


def _cloexec(here: Here) -> str:
    shown = create.control(here, 0, 1, 0)
    return f"{'present' if shown == '0x0' else 'fixed'}: F_GETFD of a new guest_memfd is {shown}"


def _slot_of_closed(here: Here) -> str:
    return _told(lambda: slots.closed_while_bound(here, "bind"), "EEXIST", "a new slot at the addresses of a closed file's",
                 "ok")


def _unused(here: Here) -> str:
    shown = guest.beside_user_memory(here, 0)
    return f"{'present' if shown.startswith('anon') else 'fixed'}: a guest's load, its store seen at userspace_addr: {shown}"


def _own_accesses(here: Here) -> str:
    visitor, anon = Guest(here), here.memory()
    store(anon, b"user")
    bind(here.vm, 1, GMEM, GPA, SIZE, anon, here.gmem())
    native, emulated = visitor.load(GPA), visitor.at_cpl_0(GPA)
    if (native, emulated) == ("zero", "user"):
        return "present: an emulated load (CPL 0) read userspace_addr, and the same load at CPL 3 the guest_memfd"
    return f"cannot tell: nothing that this guest does is emulated; loads at CPL 3 and 0: {native}, {emulated}"


def _longterm(here: Here) -> str:
    shown = pins.punched_while_registered(here)
    return f"{'present' if shown == 'ok, mapping zero' else 'fixed'}: a punch of a page registered with io_uring: {shown}"


def _interrupted(here: Here) -> str:
    shown = fallocate.interrupted(here)
    return f"{'present' if shown == 'EINTR, some pages' else 'cannot tell'}: fallocate(2) of 64 MiB with a signal: {shown}"


def _readonly(here: Here) -> str:
    return _told(lambda: slots.binds(here, flags=GMEM | MemFlag.READONLY), "ok",
                 "a slot that is read-only and has a guest_memfd", "EINVAL")


def _shared_invalidation(here: Here) -> str:
    shown = guest.punched(here)
    return f"{'fixed' if shown == 'zero zero after' else 'present'}: after a punch under the guest: {shown}"


def _implied_shared(here: Here) -> str:
    address = here.map(here.gmem(1))
    shown = attempt(lambda: call("write", os.pipe()[1], address, 1))
    return f"{'fixed' if shown == 'EFAULT' else 'present'}: a host access to a file with MMAP but not INIT_SHARED: {shown}"


def _by_flag(here: Here) -> str:
    offered = [bit for bit in (1, 2) if f"flag {bit}" in here.features]
    return f"{'fixed' if offered else 'cannot tell'}: KVM_CAP_GUEST_MEMFD_FLAGS offers {offered or 'nothing'}"


def _remains_split(here: Here) -> str:
    size = 4 * PAGE
    fd = here.secret(size)
    before = direct_map()
    address = here.map(fd, size)
    store(address, b"x" * size)
    split = direct_map()
    call("munmap", address, size)
    os.close(fd)
    # The last reference goes with the task's work on return to user space; merging, if any, may be later.
    time.sleep(0.05)
    after = direct_map()
    small = {name: now.get("4k", 0) - before.get("4k", 0) for name, now in (("touched", split), ("freed", after))}
    if not before:
        return "cannot tell: /proc/meminfo does not show the direct map"
    if small["touched"] <= 0:
        return "cannot tell: 4 pages of memfd_secret landed where the direct map is split already"
    verdict = "present" if small["freed"] >= small["touched"] else "fixed"
    return f"{verdict}: 4 pages of memfd_secret moved {small['touched']} kB to 4k leaves; {small['freed']} kB after free"


def _secret_cloexec(here: Here) -> str:
    shown = create.control(here, SECRET, 1, 0)
    return f"{'present' if shown == '0x0' else 'fixed'}: F_GETFD of memfd_secret(0) is {shown}"


def _closed_slot_uaf(here: Here) -> str:
    if version_of(here.features.release) >= (6, 18):
        return "fixed: by its release, this kernel has the fix; it was not tried"
    return "not tested: a kernel without the fix uses freed memory, which could crash the host"


BUGS: tuple[Bug, ...] = (
    Bug("bind-offset-overflow", "a slot's offset near 2^63 passes the check against the file's size",
        "fixed in 7.2: \"KVM: guest_memfd: Treat memslot binding offsets as unsigned\" (22 May 2026)",
        "check offset + size against the file yourself before you bind; such a page goes only with the file",
        _offset_overflow, ("slots", "flag 1", "flag 2")),
    Bug("bind-twice-errno", "pages that are bound already are refused with EINVAL instead of EEXIST",
        "fixed in 7.2: 7ea987a90585, selftest 772989854acd",
        "do not tell overlap from bad input by the errno; accept both",
        _overlap_errno, ("slots",)),
    Bug("mbind-ignored", "mbind(2) of a mapping does not reach the file: guest faults follow the faulting task's policy",
        "fixed in 6.19: shared policy in the inode (tag kvm-x86-gmem-6.19, 83e0e12219a4)",
        "set the policy of the allocating thread, or allocate by fallocate(2) under it",
        _policy, ("gmem", "flag 1", "flag 2", "numa")),
    Bug("interleave-index", "interleaving counts a page's offset twice and skips every other node (6.19 to 7.1)",
        "fixed in 7.2: 48dbe4732198",
        "look at numa_maps before you rely on MPOL_INTERLEAVE",
        lambda here: "cannot tell: this needs two nodes and a kernel from 6.19 on", ("6.19 on",)),
    Bug("huge-page-collapse", "khugepaged builds a huge page in a guest_memfd: a warning, and SIGBUS at the next touch",
        "\"mm: thp: deny THP for files on anonymous inodes\" (14 Feb 2026), Fixes: 7fbb5e188248; syzbot "
        "33a04338019ac7e43a44",
        "no MADV_HUGEPAGE and no MADV_COLLAPSE on mappings of a guest_memfd",
        _thp),
    Bug("read-only-slot", "a slot both read-only and with a guest_memfd is accepted; writes to it neither fault nor exit",
        "6.8-rc (Sean Christopherson)",
        "never ask for both flags",
        _readonly, ("slots",)),
    Bug("shared-not-invalidated", "a punch of a shared file does not reach the guest's mapping",
        "6.18-rc (Sean Christopherson, Oct 2025)",
        "on such a kernel delete the slot before you punch",
        _shared_invalidation, ("slots", "guest", "flag 1", "flag 2")),
    Bug("mmap-implies-shared", "a file that can be mapped counts as shared",
        "6.18-rc; INIT_SHARED was added before the release",
        "say INIT_SHARED when you mean it",
        _implied_shared, ("gmem", "flag 1")),
    Bug("flags-not-by-bit", "one capability says mmap, and not which flags can be created",
        "6.18-rc; KVM_CAP_GUEST_MEMFD_FLAGS replaced it",
        "ask for the bitmap, KVM_CAP_GUEST_MEMFD_FLAGS",
        _by_flag, ("kvm",)),
    Bug("reserved-unchecked", "reserved words and padding of the arguments are not looked at",
        "none known",
        "zero them: a later kernel may give them a meaning",
        _reserved, ("slots",)),
    Bug("no-cloexec", "a guest_memfd is inherited by exec, and keeps VM and memory alive there",
        "none; the ioctl has no flag for it",
        "set FD_CLOEXEC at once, and mind a fork in another thread",
        _cloexec, ("gmem",)),
    Bug("secret-no-cloexec", "memfd_secret(2) is inherited by exec unless it is told otherwise",
        "as documented",
        "pass O_CLOEXEC",
        _secret_cloexec, ("secretmem",)),
    Bug("closed-file-keeps-slot", "the slot of a closed file goes on occupying its guest addresses",
        "none known",
        "delete the slot before you close the file, or the guest loops on memory faults",
        _slot_of_closed, ("slots",)),
    Bug("private-file-unused", "a default VM takes a file without MMAP for a slot, and uses userspace_addr instead",
        "by design until in-place conversion",
        "check that the VM type can have private memory; do not trust the bind",
        _unused, ("slots", "guest", "cachestat")),
    Bug("own-accesses", "KVM's own accesses go to userspace_addr even where the guest has the guest_memfd",
        "by design",
        "map the same file there",
        _own_accesses, ("slots", "guest", "flag 1", "flag 2")),
    Bug("punch-under-pin", "a punch does not wait for a long-term pin: a device goes on writing to the old page",
        "by design until in-place conversion",
        "unregister and unmap from IOMMUs before you punch",
        _longterm, ("gmem", "flag 1", "flag 2")),
    Bug("fallocate-eintr", "fallocate(2) that a signal interrupts fails and keeps what it has allocated",
        "by design",
        "on EINTR go on, or punch what you asked for",
        _interrupted, ("gmem", "cachestat", "memory 512M")),
    Bug("direct-map-stays-split", "a leaf of the direct map that was split for memfd_secret is never merged again",
        "none known",
        "take secret memory once, in one piece, early",
        _remains_split, ("secretmem",)),
    Bug("slot-of-closed-file-uaf", "deleting a slot while the last reference to its file goes uses freed memory",
        "ae431059e75d (in 6.18, and in 6.12.y and 6.17.y of Nov 2025)",
        "on an older kernel delete every slot before you close its file",
        _closed_slot_uaf),
    Bug("unbound-index", "the result of the store that binds is ignored: without memory a slot's pages stay unbound",
        "checked in trees with in-place conversion",
        "a guest's EIO on a fresh slot means this",
        why="it takes an allocation that fails inside the kernel"),
    Bug("poison-leak", "every guest access to a poisoned page leaks a reference",
        "6.11 (Paolo Bonzini, 11 June 2024)",
        "do not resume a guest on a poisoned page",
        why="poisoning takes a page of this machine out of use for good"),
    Bug("grab-folio-error", "an error pointer of filemap_grab_folio() is taken for a page",
        "SNP series, 2024 (Michael Roth)",
        "leave the host some memory",
        why="it takes an allocation that fails, and then crashes the host"),
    Bug("populate-deadlock", "populate takes mmap_lock under invalidate_lock, a user fault the other way round",
        "7.0: tag kvm-x86-gmem-6.20, 2a62345b3052",
        "keep source pages resident while you populate",
        why="it hangs two threads of the host for good; and needs SNP or TDX"),
    Bug("cpuid-page-write", "SNP's CPUID page is written back through a read-only pin",
        "f13e90059908, 97cd21d57e9b",
        "give a source page that is writable and not shared",
        why="it needs SNP"),
    Bug("slot-move", "moving a slot with a guest_memfd, or changing its flags, would leave a stale binding",
        "hardened in 7.0, af62fe2494da",
        "delete and create; every such change is EINVAL",
        why="user space cannot reach it: KVM refuses before"),
    Bug("conversion-half-done", "a conversion refused with EAGAIN has taken the pages out of the host's page tables",
        "by design (in-place conversion)",
        "after EAGAIN expect faults again, not an untouched mapping",
        why="it takes a VM that can have private memory, and pinned pages"),
    Bug("secretmem-highmem", "memfd_secret on 32-bit kernels with high memory: a warning and SIGBUS",
        "mainline 7.1 has it (Brendan Jackman, June 2026)",
        "do not use it there",
        why="it is for 32-bit kernels only, and ends in a warning"),
)
"""In the order in which they are shown."""
