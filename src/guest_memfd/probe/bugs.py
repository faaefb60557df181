"""Known bugs and traps of guest_memfd and memfd_secret: how each shows itself from user space, and what it means for a VMM.

Nothing that can hang or crash the host is tried; such a bug says why it is not. An act returns a verdict (``present``,
``fixed``, ``cannot tell``), a colon, and what was seen.
"""

from __future__ import annotations

import gzip
import os
import platform
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from guest_memfd.linux.mapping import PAGE
from guest_memfd.probe.ask.calls import ADVICE, FAILED, MAP_SHARED, RW, attempt, call, name_of, store
from guest_memfd.probe.ask.child import Slate, perform
from guest_memfd.probe.ask.guest import ProbeGuest
from guest_memfd.probe.ask.here import SECRET, SIZE, Here, bind, punch, resident
from guest_memfd.probe.ask.row import KernelFeatures
from guest_memfd.probe.offers import direct_map, patch_of, version_of
from guest_memfd.probe.rows import create, fallocate, guest, memory, pins, secret, slots
from guest_memfd.probe.rows.slots import BEYOND, GMEM, GPA
from guest_memfd.uapi.kvm import MemFlag

VERDICTS = ("present", "fixed", "cannot tell", "not tested")
_HUGE = 2 << 20
SEVERE, BUG, TRAP = "severe", "bug", "trap"
SEVERITIES = (SEVERE, BUG, TRAP)
"""severe: memory is lost, leaked or written by whom it does not belong to, or the host crashes or hangs. bug: the kernel
does other than it says. trap: as designed or documented, and a VMM that does not know it goes wrong."""


@dataclass(frozen=True)
class Bug:
    """*severity*: one of SEVERITIES. *commit*: the fix, or where it was told; *means*: what a VMM has to do.

    *act* None: not tried, because of *why*. *first*: looked for before anything else is done to the machine.
    """

    id: str
    severity: str
    title: str
    commit: str
    means: str
    act: Callable[[Here], str] | None = None
    needs: tuple[str, ...] = ()
    why: str = ""
    first: bool = False


@dataclass(frozen=True)
class BugFound:
    """A bug here: the verdict, one of `VERDICTS`, and what it rests on."""

    bug: Bug
    verdict: str
    seen: str


def find(bug: Bug, slate: Slate, path: str, features: KernelFeatures) -> BugFound:
    """Look for *bug*, in a child."""
    if bug.act is None:
        return BugFound(bug, "not tested", bug.why)
    for need in bug.needs:
        if need not in features:
            return BugFound(bug, "cannot tell", features.why(need))
    act = bug.act
    outcome = perform(lambda page: act(Here(page, path, features)), slate)
    if outcome.result is None:
        return BugFound(bug, "cannot tell", outcome.unfit or "")
    verdict, _, seen = outcome.result.partition(": ")
    if verdict not in VERDICTS:
        return BugFound(bug, "cannot tell", f"unexpected: {outcome.result}")
    return BugFound(bug, verdict, seen)


# -- how they show -----------------------------------------------------------------------------------------------------


def _offset_overflow(here: Here) -> str:
    runs = "guest" in here.features
    # The guest first: it brings the VM, and a file belongs to the VM that it was made by.
    visitor = ProbeGuest(here) if runs else None
    fd = here.gmem()
    try:
        bind(here.vm, 1, GMEM, GPA, SIZE, 0, fd, BEYOND)
    except FAILED as error:
        return f"fixed: a slot at offset 2^63-4096 of the file is refused with {name_of(error)}"
    if visitor is None or "cachestat" not in here.features:
        return "present: a slot at offset 2^63-4096 of a file of 16 KiB is accepted"
    stored = visitor.store(GPA, b"beyond")
    there = attempt(lambda: punch(fd, BEYOND, PAGE))
    punch(fd, 0, SIZE)
    bind(here.vm, 1, 0, 0, 0)
    pages = resident(fd, SIZE)
    return ("present: a slot at offset 2^63-4096 of a file of 16 KiB is accepted; the guest's store there "
            f"{_comes_to(stored)}; {_pages(pages)} past the end of the file after the file was punched and the slot "
            f"deleted; punching there {_comes_to(there)}")


def _comes_to(result: str) -> str:
    return "succeeds" if result == "ok" else f"fails with {result}"


def _pages(nr: int) -> str:
    return "1 page is left" if nr == 1 else f"{nr} pages are left"


def _told(act: Callable[[], object], present: str, words: str, fixed: str) -> str:
    result = attempt(act)
    verdict = {present: "present", fixed: "fixed"}.get(result, "cannot tell")
    return f"{verdict}: {words} {_comes_to(result)}"


def _overlap_errno(here: Here) -> str:
    return _told(lambda: slots.two(here, 2 * GPA, 0, 2 * PAGE), "EINVAL",
                 "a second slot for pages of the file that have one", "EEXIST")


def _policy(here: Here) -> str:
    shown = memory.policy_elsewhere(here)
    return (f"{'present' if shown == 'default' else 'fixed'}: after mbind(2) to one node by way of one mapping, another "
            f"mapping of the file has the policy {shown!r}")


def _interleave(here: Here) -> str:
    nodes = memory.interleaved(here)
    turns = nodes == [nodes[0], 1 - nodes[0]] * (len(nodes) // 2)
    verdict = "cannot tell" if not set(nodes) <= {0, 1} else "fixed" if turns else "present"
    return f"{verdict}: eight pages that are to be interleaved over nodes 0 and 1 are on {', '.join(map(str, nodes))}"


def _thp(here: Here) -> str:
    built = _config("READ_ONLY_THP_FOR_FS")
    if built == "n":
        return "cannot tell: this kernel is built without READ_ONLY_THP_FOR_FS, so no one makes such a page"
    if built != "n" and "expendable" in here.features:
        return _collapsed(here, built == "y")
    how = "with READ_ONLY_THP_FOR_FS" if built != "?" else "this kernel's configuration is not to be seen; with the option"
    return f"cannot tell: {how} trying it ends in a kernel warning, which may be a panic"


# Without the option it is refused on every kernel; so to be refused says something only where the option is seen.
def _collapsed(here: Here, with_option: bool) -> str:
    # Wherever the mapping begins, two aligned megabytes lie within it.
    size = 4 * _HUGE
    address = here.map(here.gmem(size=size), size)
    store(address, b"x" * size)
    said = attempt(lambda: call("madvise", -(-address // _HUGE) * _HUGE, _HUGE, ADVICE["COLLAPSE"]) or None)
    verdict = "present" if said == "ok" else "fixed" if with_option else "cannot tell"
    unseen = "" if with_option else ", and whether this kernel has READ_ONLY_THP_FOR_FS is not to be seen"
    return f"{verdict}: MADV_COLLAPSE of 2 MiB of a guest_memfd {_comes_to(said)}{unseen}"


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
    return (f"{verdict}: KVM_CREATE_GUEST_MEMFD with a reserved word set {_comes_to(words)}, "
            f"KVM_SET_USER_MEMORY_REGION2 with padding set {_comes_to(pad)}")


def _cloexec(here: Here) -> str:
    shown = create.control(here, 0, 1, 0)
    return f"{_inherited(shown)} a new guest_memfd {_closes(shown)} on exec"


def _inherited(flags: str | None) -> str:
    return "present:" if flags == "0x0" else "fixed:"


def _closes(flags: str | None) -> str:
    return "is not closed" if flags == "0x0" else "is closed"


def _slot_of_closed(here: Here) -> str:
    return _told(lambda: slots.closed_while_bound(here, "bind"), "EEXIST",
                 "the file of a slot is closed; a new slot at its guest addresses", "ok")


def _unused(here: Here) -> str:
    shown = guest.beside_user_memory(here, 0)
    if shown.startswith("anon"):
        return "present: the guest loads what userspace_addr holds, its store lands there, and the file stays empty"
    return "fixed: the guest does not load what userspace_addr holds"


def _own_accesses(here: Here) -> str:
    visitor, anon = ProbeGuest(here), here.memory()
    store(anon, b"user")
    bind(here.vm, 1, GMEM, GPA, SIZE, anon, here.gmem())
    native, emulated = visitor.load(GPA), visitor.at_cpl_0(GPA)
    if (native, emulated) == ("zero", "user"):
        return "present: an emulated load (CPL 0) read userspace_addr, and the same load at CPL 3 the guest_memfd"
    return f"cannot tell: nothing that this guest does is emulated; loads at CPL 3 and 0: {native}, {emulated}"


def _longterm(here: Here) -> str:
    shown = pins.punched_while_registered(here)
    if shown == "ok, mapping zero":
        return ("present: a page that io_uring holds a long-term pin of is punched at once, and the mapping shows a new "
                "page of zeros")
    return f"fixed: punching a page that io_uring holds a long-term pin of {_comes_to(shown.partition(',')[0])}"


def _interrupted(here: Here) -> str:
    shown = fallocate.interrupted(here)
    if shown == "EINTR, some pages":
        return "present: a signal during fallocate(2) of 64 MiB makes it fail with EINTR, and some of the pages stay"
    result, _, pages = shown.partition(", ")
    return f"cannot tell: fallocate(2) of 64 MiB with a signal {_comes_to(result)}, and {pages} stay"


def _readonly(here: Here) -> str:
    return _told(lambda: slots.binds(here, flags=GMEM | MemFlag.READONLY), "ok",
                 "a slot that is read-only and has a guest_memfd", "EINVAL")


def _shared_invalidation(here: Here) -> str:
    shown = guest.punched(here)
    if shown == "zero zero after":
        return "fixed: after a punch guest and host both load zeros, and the host sees what the guest stores then"
    return f"present: after a punch the guest loads, the host loads, and the host loads after the guest's store: {shown}"


def _implied_shared(here: Here) -> str:
    # By the kernel's copy. A load of our own would be SIGBUS, and the child could not say what it was about.
    address = here.map(here.gmem(1))
    shown = attempt(lambda: call("write", os.pipe()[1], address, 1))
    return (f"{'fixed' if shown == 'EFAULT' else 'present'}: the host's access to a file with MMAP and without INIT_SHARED "
            f"{_comes_to(shown)}")


def _by_flag(here: Here) -> str:
    offered = [bit for bit in (1, 2) if f"flag {bit}" in here.features]
    which = f"flags {' and '.join(map(str, offered))}" if offered else "no flag"
    return f"{'fixed' if offered else 'cannot tell'}: KVM_CAP_GUEST_MEMFD_FLAGS offers {which}"


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
    return (f"{verdict}: touching 4 pages of memfd_secret split {small['touched']} kB of the direct map into leaves of 4k; "
            f"after they were freed {small['freed']} kB are still split")


def _secret_cloexec(here: Here) -> str:
    shown = create.control(here, SECRET, 1, 0)
    return f"{_inherited(shown)} what memfd_secret(0) returns {_closes(shown)} on exec"


_FILES = 16


def _unaccounted(here: Here) -> str:
    """Without privileges, under a limit of 4 pages: map 4, touch them, unmap them, keep the file; again and again."""
    secret.under_limit(here, 4)
    held = 0
    for _file in range(_FILES):
        address = call("mmap", 0, SIZE, RW, MAP_SHARED, here.secret(), 0)
        more = secret.readable_pages(address, SIZE // PAGE)
        call("munmap", address, SIZE)
        held += more
        if more < SIZE // PAGE:
            break
    verdict = "present" if held > SIZE // PAGE else "fixed"
    return f"{verdict}: under a limit of 4 pages, {held} pages in {_FILES} files are held by mapping 4 of them at a time"


def _closed_slot_uaf(here: Here) -> str:
    release = here.features.release
    # By its number and not by trying: who loses the race uses freed memory, and most kernels do not notice.
    if version_of(release) >= (6, 18) or (version_of(release) == (6, 12) and patch_of(release) >= 59):
        tried = "it was not tried"
        if "expendable" in here.features and "slots" in here.features:
            tried = f"{_race(here)} slots were deleted while their file went, and nothing happened"
        return f"fixed: by its release, this kernel has the fix; {tried}"
    if "expendable" not in here.features or "slots" not in here.features:
        return "not tested: a kernel without the fix uses freed memory, which could crash the host"
    return f"cannot tell: {_race(here)} slots were deleted while their file went, and the kernel is still there"


def _race(here: Here) -> int:
    """Delete a slot in one thread while another closes its file, for a second; how often."""
    end, times = time.monotonic() + 1, 0
    while time.monotonic() < end:
        fd = here.gmem()
        bind(here.vm, 1, GMEM, GPA, SIZE, 0, fd)
        # The interpreter's lock is released in close(2) and in the ioctl: the two are in the kernel at the same time.
        closing = threading.Thread(target=os.close, args=(fd,))
        closing.start()
        bind(here.vm, 1, 0, 0, 0)
        closing.join()
        times += 1
    return times


BUGS: tuple[Bug, ...] = (
    Bug("bind-offset-overflow", SEVERE, "a slot's offset near 2^63 passes the check against the file's size",
        "\"KVM: guest_memfd: Treat memslot binding offsets as unsigned\" (22 May 2026); in 7.2, 6.12.114",
        "check offset + size against the file yourself before you bind; such a page goes only with the file",
        _offset_overflow, ("slots", "flag 1", "flag 2")),
    Bug("bind-twice-errno", BUG, "pages that are bound already are refused with EINVAL instead of EEXIST",
        "fixed in 7.2: 7ea987a90585, selftest 772989854acd",
        "do not tell overlap from bad input by the errno; accept both",
        _overlap_errno, ("slots",)),
    Bug("mbind-ignored", BUG,
        "mbind(2) of a mapping does not reach the file: guest faults follow the faulting task's policy",
        "fixed in 6.19: shared policy in the inode (tag kvm-x86-gmem-6.19, 83e0e12219a4)",
        "set the policy of the allocating thread, or allocate by fallocate(2) under it",
        _policy, ("gmem", "flag 1", "flag 2", "numa")),
    Bug("interleave-index", BUG, "interleaving counts a page's offset twice and skips every other node (6.19 to 7.1)",
        "fixed in 7.2: 48dbe4732198",
        "look at numa_maps before you rely on MPOL_INTERLEAVE",
        _interleave, ("gmem", "flag 1", "flag 2", "inodes of its own", "two nodes")),
    Bug("huge-page-collapse", SEVERE,
        "khugepaged builds a huge page in a guest_memfd: a warning, and SIGBUS at the next touch",
        "\"mm: thp: deny THP for files on anonymous inodes\" (14 Feb 2026), Fixes: 7fbb5e188248; syzbot "
        "33a04338019ac7e43a44",
        "no MADV_HUGEPAGE and no MADV_COLLAPSE on mappings of a guest_memfd",
        _thp),
    Bug("read-only-slot", BUG,
        "a slot both read-only and with a guest_memfd is accepted; writes to it neither fault nor exit",
        "6.8-rc (Sean Christopherson)",
        "never ask for both flags",
        _readonly, ("slots",)),
    Bug("shared-not-invalidated", SEVERE, "a punch of a shared file does not reach the guest's mapping",
        "6.18-rc (Sean Christopherson, Oct 2025)",
        "on such a kernel delete the slot before you punch",
        _shared_invalidation, ("slots", "guest", "flag 1", "flag 2")),
    Bug("mmap-implies-shared", SEVERE, "a file that can be mapped counts as shared",
        "6.18-rc; INIT_SHARED was added before the release",
        "say INIT_SHARED when you mean it",
        _implied_shared, ("gmem", "flag 1")),
    Bug("flags-not-by-bit", TRAP, "one capability says mmap, and not which flags can be created",
        "6.18-rc; KVM_CAP_GUEST_MEMFD_FLAGS replaced it",
        "ask for the bitmap, KVM_CAP_GUEST_MEMFD_FLAGS",
        _by_flag, ("kvm",)),
    Bug("reserved-unchecked", TRAP, "reserved words and padding of the arguments are not looked at",
        "none known",
        "zero them: a later kernel may give them a meaning",
        _reserved, ("slots",)),
    Bug("no-cloexec", TRAP, "a guest_memfd is inherited by exec, and keeps VM and memory alive there",
        "none; the ioctl has no flag for it",
        "set FD_CLOEXEC at once, and mind a fork in another thread",
        _cloexec, ("gmem",)),
    Bug("secret-no-cloexec", TRAP, "memfd_secret(2) is inherited by exec unless it is told otherwise",
        "as documented",
        "pass O_CLOEXEC",
        _secret_cloexec, ("secretmem",)),
    Bug("secret-unaccounted", BUG, "memory of memfd_secret that is not mapped any more counts against no limit",
        "CVE-2026-93243, \"mm/secretmem: properly account locked pages\"; in 7.2, 6.12.113 and 6.1.191",
        "do not let others call memfd_secret(2): RLIMIT_MEMLOCK does not bound what they can take for good",
        _unaccounted, ("secretmem",)),
    Bug("closed-file-keeps-slot", TRAP, "the slot of a closed file goes on occupying its guest addresses",
        "none known",
        "delete the slot before you close the file, or the guest loops on memory faults",
        _slot_of_closed, ("slots",)),
    Bug("private-file-unused", TRAP, "a default VM takes a file without MMAP for a slot, and uses userspace_addr instead",
        "by design until in-place conversion",
        "check that the VM type can have private memory; do not trust the bind",
        _unused, ("slots", "guest", "cachestat")),
    Bug("own-accesses", TRAP, "KVM's own accesses go to userspace_addr even where the guest has the guest_memfd",
        "by design",
        "map the same file there",
        _own_accesses, ("slots", "guest", "flag 1", "flag 2")),
    Bug("punch-under-pin", TRAP, "a punch does not wait for a long-term pin: a device goes on writing to the old page",
        "by design until in-place conversion",
        "unregister and unmap from IOMMUs before you punch",
        _longterm, ("gmem", "flag 1", "flag 2")),
    Bug("fallocate-eintr", TRAP, "fallocate(2) that a signal interrupts fails and keeps what it has allocated",
        "by design",
        "on EINTR go on, or punch what you asked for",
        _interrupted, ("gmem", "cachestat", "memory 512M")),
    Bug("direct-map-stays-split", TRAP, "a leaf of the direct map that was split for memfd_secret is never merged again",
        "none known",
        "take secret memory once, in one piece, early",
        _remains_split, ("secretmem",), first=True),
    Bug("slot-of-closed-file-uaf", SEVERE, "deleting a slot while the last reference to its file goes uses freed memory",
        "ae431059e75d (in 6.18, and in 6.12.y and 6.17.y of Nov 2025)",
        "on an older kernel delete every slot before you close its file",
        _closed_slot_uaf),
    Bug("unbound-index", BUG, "the result of the store that binds is ignored: without memory a slot's pages stay unbound",
        "\"Split bind() into prepare()+commit()\", \"Establish bindings after memslot\"; in 7.3.2, 6.12.117",
        "a guest's EIO on a fresh slot means this",
        why="it takes an allocation that fails inside the kernel"),
    Bug("dying-file-unbind", SEVERE, "a slot is deleted while its file goes, without the lock that keeps its pages in place",
        "\"take the invalidate lock when unbinding a dying file\"; in 7.3.2",
        "delete every slot before you close its file",
        why="it is a race whose loser writes to freed memory"),
    Bug("sev-populate-dirty", BUG, "pages that SEV-SNP has populated are not marked dirty, and may be lost",
        "\"KVM: SEV: Fix page dirtying in sev_gmem_post_populate\"; in 7.2.13",
        "keep the source until the guest has run",
        why="it needs SNP"),
    Bug("poison-leak", BUG, "every guest access to a poisoned page leaks a reference",
        "6.11 (Paolo Bonzini, 11 June 2024)",
        "do not resume a guest on a poisoned page",
        why="poisoning takes a page of this machine out of use for good"),
    Bug("grab-folio-error", SEVERE, "an error pointer of filemap_grab_folio() is taken for a page",
        "SNP series, 2024 (Michael Roth)",
        "leave the host some memory",
        why="it takes an allocation that fails, and then crashes the host"),
    Bug("populate-deadlock", SEVERE, "populate takes mmap_lock under invalidate_lock, a user fault the other way round",
        "7.0: tag kvm-x86-gmem-6.20, 2a62345b3052",
        "keep source pages resident while you populate",
        why="it hangs two threads of the host for good; and needs SNP or TDX"),
    Bug("cpuid-page-write", SEVERE, "SNP's CPUID page is written back through a read-only pin",
        "f13e90059908, 97cd21d57e9b",
        "give a source page that is writable and not shared",
        why="it needs SNP"),
    Bug("slot-move", SEVERE, "moving a slot with a guest_memfd, or changing its flags, would leave a stale binding",
        "hardened in 7.0, af62fe2494da",
        "delete and create; every such change is EINVAL",
        why="user space cannot reach it: KVM refuses before"),
    Bug("conversion-half-done", TRAP, "a conversion refused with EAGAIN has taken the pages out of the host's page tables",
        "by design (in-place conversion)",
        "after EAGAIN expect faults again, not an untouched mapping",
        why="it takes a VM that can have private memory, and pinned pages"),
    Bug("secretmem-highmem", BUG, "memfd_secret on 32-bit kernels with high memory: a warning and SIGBUS",
        "mainline 7.1 has it (Brendan Jackman, June 2026)",
        "do not use it there",
        why="it is for 32-bit kernels only, and ends in a warning"),
)
"""In the order in which they are shown."""
