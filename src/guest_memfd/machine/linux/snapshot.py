"""Hibernation: who may forbid it, in which order it happens, and which pages the image holds. An allocated page with a
hole in the linear map is saved all the same (kernel/power/hibernate.c, snapshot.c, kernel/notifier.c).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from errno import EBUSY, ENOMEM, EOPNOTSUPP, EPERM
from typing import NamedTuple, Protocol

from guest_memfd.words.units import Pa

NOTIFY_DONE = 0x0000
NOTIFY_OK = 0x0001
NOTIFY_STOP_MASK = 0x8000
NOTIFY_BAD = NOTIFY_STOP_MASK | 0x0002


class Event(IntEnum):
    """PM_* events that notifiers are called with (include/linux/suspend.h)."""

    HIBERNATION_PREPARE = 1
    POST_HIBERNATION = 2
    SUSPEND_PREPARE = 3
    POST_SUSPEND = 4
    RESTORE_PREPARE = 5
    POST_RESTORE = 6


def notifier_from_errno(errno: int) -> int:
    """What a callback returns to veto with the negative *errno*; 0 is NOTIFY_OK (include/linux/notifier.h)."""
    return NOTIFY_STOP_MASK | (NOTIFY_OK - errno) if errno else NOTIFY_OK


def notifier_to_errno(ret: int) -> int:
    """The negative errno in a callback's answer, or 0."""
    ret &= ~NOTIFY_STOP_MASK
    return NOTIFY_OK - ret if ret > NOTIFY_OK else 0


Callback = Callable[[Event], int]


class Notifier(NamedTuple):
    """A notifier block: higher priorities are called first, equal ones in order of registration."""

    name: str
    callback: Callback
    priority: int = 0


class NotifierChain:
    """pm_chain_head, a blocking chain: callbacks may sleep, and tasks are not frozen yet."""

    def __init__(self) -> None:
        self._chain: list[Notifier] = []

    def register(self, notifier: Notifier) -> None:
        """register_pm_notifier(); raises ValueError for one that is registered (a WARN and -EEXIST)."""
        if notifier in self._chain:
            raise ValueError(f"notifier {notifier.name} is registered already")
        self._chain.append(notifier)
        self._chain.sort(key=lambda one: -one.priority)

    def unregister(self, notifier: Notifier) -> None:
        """unregister_pm_notifier(); raises ValueError for one that is not registered (-ENOENT)."""
        self._chain.remove(notifier)

    def call(self, event: Event) -> int:
        """blocking_notifier_call_chain(): until someone stops it; its errno or 0."""
        return notifier_to_errno(self._call(event, self._chain)[0])

    def call_robust(self, up: Event, down: Event) -> int:
        """pm_notifier_call_chain_robust(): after a veto, those that ran before it get *down*; the vetoer does not."""
        ret, ran = self._call(up, self._chain)
        if ret & NOTIFY_STOP_MASK:
            # The one that vetoed gets no *down*, so it must leave nothing that *down* would have to undo.
            self._call(down, self._chain[:ran - 1])
        return notifier_to_errno(ret)

    # The last answer, and how many were called.
    @staticmethod
    def _call(event: Event, chain: list[Notifier]) -> tuple[int, int]:
        ret = ran = 0
        for notifier in list(chain):
            ret, ran = notifier.callback(event), ran + 1
            if ret & NOTIFY_STOP_MASK:
                break
        return ret, ran


@dataclass
class Policy:
    """What hibernation_available() looks at."""

    nohibernate: bool = False
    locked_down: bool = False
    cxl_mem_active: bool = False
    secretmem_users: int = 0
    compressors: frozenset[str] = frozenset(("lzo",))
    compressor: str = "lzo"


def hibernation_available(policy: Policy) -> bool:
    """Neither forbidden by the command line or lockdown, nor secretmem or CXL memory in use."""
    return not (policy.nohibernate or policy.locked_down or policy.secretmem_users or policy.cxl_mem_active)


class SnapshotMachine(Protocol):
    """What hibernate() and the image copy ask of the machine; physical addresses of pages."""

    def pages(self) -> Iterable[Pa]:
        """Every page of RAM that Linux knows, in order."""

    def is_free(self, pa: Pa) -> bool:
        """swsusp_page_is_free(): in the page allocator."""

    def is_nosave(self, pa: Pa) -> bool:
        """pfn_is_nosave(), or swsusp's own."""

    def is_offline(self, pa: Pa) -> bool:
        """PageOffline() of the page at *pa*: not saved."""

    def is_guard(self, pa: Pa) -> bool:
        """page_is_guard() of the page at *pa*: a guard page of debug_pagealloc, not saved."""

    def is_reserved(self, pa: Pa) -> bool:
        """PageReserved() of the page at *pa*: saved only where the linear map has it."""

    def kernel_page_present(self, pa: Pa) -> bool:
        """The linear map has it."""

    def set_direct_map_default_noflush(self, pa: Pa) -> int:
        """Make one page present in the linear map, for the copy of a page that is not; 0 or -ENOMEM."""

    def set_direct_map_invalid_noflush(self, pa: Pa) -> int:
        """Take one page out of the linear map again after its copy; 0 or -ENOMEM, and no flush."""

    def flush_tlb_kernel_page(self, pa: Pa) -> None:
        """flush_tlb_kernel_range() of the linear-map address of one page."""

    def do_copy_page(self, pa: Pa) -> bytes:
        """Copy the page word by word through the linear map; an abort that is fatal does not return."""

    def free_pages(self) -> int:
        """Pages that the allocator could give."""

    def freeze_processes(self) -> int:
        """User space stops: 0, or -EBUSY when a task refuses."""

    def thaw_processes(self) -> None:
        """User space goes on."""

    def suspend_devices(self) -> int:
        """dpm_suspend() to syscore_suspend(): 0 or a negative errno, and all is undone then."""

    def resume_devices(self) -> None:
        """The reverse of `suspend_devices`: syscore_resume() to dpm_resume()."""


@dataclass
class HibernationImage:
    """The pages saved: by physical address; all-zero pages are in a bitmap instead."""

    pages: dict[Pa, bytes] = field(default_factory=dict)
    zero: set[Pa] = field(default_factory=set)

    def __contains__(self, pa: Pa) -> bool:
        return pa in self.pages or pa in self.zero


def saveable_page(machine: SnapshotMachine, pa: Pa) -> bool:
    """Whether the image must hold the page. A hole in the linear map matters for reserved pages only."""
    # Only a reserved page is left out for its hole. A lent page is allocated and not reserved, so it is saved: the
    # copy maps it and reads it, and stage 2 may answer with an abort.
    if machine.is_nosave(pa) or machine.is_free(pa) or machine.is_offline(pa):
        return False
    if machine.is_reserved(pa) and not machine.kernel_page_present(pa):
        return False
    return not machine.is_guard(pa)


def safe_copy_page(machine: SnapshotMachine, pa: Pa) -> bytes:
    """The contents of a page; a hole is mapped for the time of the copy, and made again with a flush."""
    if machine.kernel_page_present(pa):
        return machine.do_copy_page(pa)
    # No flush on the way in: a TLB holds no entry for a hole. After the copy one is needed, or the old entry would
    # still reach the page.
    machine.set_direct_map_default_noflush(pa)
    data = machine.do_copy_page(pa)
    machine.set_direct_map_invalid_noflush(pa)
    machine.flush_tlb_kernel_page(pa)
    return data


def saveable_pages(machine: SnapshotMachine) -> list[Pa] | int:
    """What the image will hold, in order; -ENOMEM when the copies do not fit into free memory."""
    saved = [pa for pa in machine.pages() if saveable_page(machine, pa)]
    return saved if len(saved) <= machine.free_pages() else -ENOMEM


def swsusp_save(machine: SnapshotMachine) -> HibernationImage | int:
    """Count once more, then copy; -ENOMEM as above."""
    # Suspending devices may have allocated pages since the first count.
    saved = saveable_pages(machine)
    if isinstance(saved, int):
        return saved
    image = HibernationImage()
    for pa in saved:
        data = safe_copy_page(machine, pa)
        if any(data):
            image.pages[pa] = data
        else:
            image.zero.add(pa)
    return image


class SnapshotPower:
    """system_transition_mutex, the notifier chain, and whether a snapshot is in progress. `log` is the order of things."""

    def __init__(self, policy: Policy | None = None) -> None:
        self.policy, self.chain = policy or Policy(), NotifierChain()
        self.snapshot_device_users = 0
        self.log: list[str] = []

    def hibernate(self, machine: SnapshotMachine) -> HibernationImage | int:
        """hibernate(): the image, or a negative errno and everything as before.

        -EPERM (not available), -EOPNOTSUPP (no such compression), -EBUSY (/dev/snapshot is open, or a task does not
        freeze), a notifier's veto, -ENOMEM.
        """
        if not hibernation_available(self.policy):
            return -EPERM
        if self.policy.compressor not in self.policy.compressors:
            return -EOPNOTSUPP
        if self.snapshot_device_users:
            return -EBUSY
        self.log.append("notifiers")
        # Tasks still run here, so a notifier that only counts would miss what they do until the freeze. It has to
        # forbid, too.
        error = self.chain.call_robust(Event.HIBERNATION_PREPARE, Event.POST_HIBERNATION)
        if error:
            return error
        self.log += ["sync", "freeze filesystems", "freeze processes"]
        result: HibernationImage | int = machine.freeze_processes()
        if not result:
            result = self._hibernation_snapshot(machine)
            machine.thaw_processes()
        # Also after a failure: every notifier that saw PREPARE has to see the end, or it would refuse permanently.
        self.chain.call(Event.POST_HIBERNATION)
        return result

    def _hibernation_snapshot(self, machine: SnapshotMachine) -> HibernationImage | int:
        self.log += ["memory bitmaps", "prepare devices", "preallocate memory"]
        saved = saveable_pages(machine)
        if isinstance(saved, int):
            return saved
        self.log += ["freeze kernel threads", "suspend devices"]
        error = machine.suspend_devices()
        if error:
            return error
        self.log += ["offline CPUs", "image"]
        image = swsusp_save(machine)
        machine.resume_devices()
        return image

    def suspend(self, machine: SnapshotMachine) -> int:
        """suspend_prepare() and suspend to RAM: nothing is copied, and nothing looks at secretmem."""
        error = self.chain.call_robust(Event.SUSPEND_PREPARE, Event.POST_SUSPEND)
        if error:
            return error
        error = machine.freeze_processes()
        if not error:
            error = machine.suspend_devices()
            if not error:
                machine.resume_devices()
            machine.thaw_processes()
        self.chain.call(Event.POST_SUSPEND)
        return error

    def open_snapshot_device(self) -> int:
        """/dev/snapshot (kernel/power/user.c): user space writes the image; same conditions as hibernate()."""
        if not hibernation_available(self.policy):
            return -EPERM
        if self.snapshot_device_users:
            return -EBUSY
        error = self.chain.call_robust(Event.HIBERNATION_PREPARE, Event.POST_HIBERNATION)
        if not error:
            self.snapshot_device_users = 1
        return error

    def close_snapshot_device(self) -> None:
        """The other end of it."""
        self.snapshot_device_users = 0
        self.chain.call(Event.POST_HIBERNATION)

