"""One row in a process of its own: what it returns, the signal that killed it with code and address, or no answer in time.

Nothing that a row does reaches the process that asks. The child leads a process group of its own, which is killed
whatever happens; it is traced, so that a fault can be looked at before it kills (ptrace(2), PTRACE_GETSIGINFO).
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import resource
import signal
import struct
import time
from collections.abc import Callable
from contextlib import suppress

from guest_memfd.linux import fd
from guest_memfd.probe.ask.calls import FAILED, name_of
from guest_memfd.probe.ask.row import RowOutcome

TIMEOUT = 2.0
"""Seconds that a row may take."""
PATIENCE = 5
"""How many times as long it may take when it is tried again."""

SIGNAL_CODES: dict[tuple[int, int], str] = {
    (signal.SIGBUS, 1): "BUS_ADRALN", (signal.SIGBUS, 2): "BUS_ADRERR", (signal.SIGBUS, 3): "BUS_OBJERR",
    (signal.SIGBUS, 4): "BUS_MCEERR_AR", (signal.SIGSEGV, 1): "SEGV_MAPERR", (signal.SIGSEGV, 2): "SEGV_ACCERR",
}
"""si_code by name (include/uapi/asm-generic/siginfo.h)."""

_FAULTS = {signal.SIGBUS, signal.SIGSEGV, signal.SIGILL, signal.SIGFPE, signal.SIGABRT, signal.SIGSYS}
_TRACEME, _CONT, _GETSIGINFO = 0, 7, 0x4202
_PDEATHSIG = 1
_HEAD = struct.Struct("<QQII")
_RESULT, _UNFIT = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


class Unfit(Exception):         # noqa: N818 - it says it without the suffix
    """What a row builds on is not to be had here; the message says why."""


class Slate:
    """A page that child and parent share: where the mapping under test is, and what came of the row.

    No descriptor is needed for it, so a child that has used up all of its own can still answer. *patience*: how many times
    as long as usual every row may take.
    """

    SIZE = 1 << 16

    def __init__(self, patience: float = 1) -> None:
        self._page = mmap.mmap(-1, self.SIZE)
        self.patience = patience

    def wipe(self) -> None:
        """Before the next row."""
        self._page[:_HEAD.size] = bytes(_HEAD.size)

    def mark(self, base: int, size: int) -> None:
        """Offsets of faults count from *base*, the start of *size* bytes."""
        self._page[:16] = struct.pack("<QQ", base, size)

    def say(self, kind: int, text: str) -> None:
        """The last word of the child."""
        data = text.encode("utf-8", "replace")[:self.SIZE - _HEAD.size]
        # The text first, its kind last. A child that is killed in between has said nothing, and not half of it.
        self._page[_HEAD.size:_HEAD.size + len(data)] = data
        self._page[16:24] = struct.pack("<II", kind, len(data))

    def read(self) -> RowOutcome | None:
        """What the child said, if anything."""
        _, _, kind, length = _HEAD.unpack(self._page[:_HEAD.size])
        text = self._page[_HEAD.size:_HEAD.size + length].decode("utf-8", "replace")
        if kind == _RESULT:
            return RowOutcome(result=text)
        return RowOutcome(unfit=text) if kind == _UNFIT else None

    def place(self, address: int) -> str:
        """*address* as an offset into the mapping under test, if it is near it."""
        base, size, _, _ = _HEAD.unpack(self._page[:_HEAD.size])
        return f"at offset {address - base:#x}" if base and base <= address < base + size else "elsewhere"

    def close(self) -> None:
        """Give the page back."""
        self._page.close()


def perform(act: Callable[[Slate], object], slate: Slate, timeout: float = TIMEOUT) -> RowOutcome:
    """Run *act* in a child and return what it came to; None is ``ok``, OSError the errno's name, `Unfit` a reason.

    timeout: seconds until the child is killed. On a busy machine that says nothing about the kernel, so it is tried again,
    with PATIENCE; if no answer comes then either, it is unfit.
    """
    timeout *= slate.patience
    outcome = _once(act, slate, timeout)
    if not outcome.late:
        return outcome
    again = _once(act, slate, PATIENCE * timeout)
    late = f"no answer in {timeout:g} s, and when it was tried again none in {PATIENCE * timeout:g} s"
    return RowOutcome(unfit=late, late=True) if again.late else again


def _once(act: Callable[[Slate], object], slate: Slate, timeout: float) -> RowOutcome:
    slate.wipe()
    # Blocked before the fork: sigtimedwait() finds the signal of a child that ends before anyone waits for it.
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    try:
        try:
            pid = os.fork()
        except OSError as error:
            return RowOutcome(unfit=f"fork: {name_of(error)}")
        if pid == 0:
            _child(act, slate)
        # The child does the same. Whoever comes first, the group is there when it is to be killed.
        with suppress(OSError):
            os.setpgid(pid, pid)
        try:
            return _watch(pid, slate, timeout)
        finally:
            end(pid)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def begin() -> None:
    """What every child does first: it leads a group of its own, ends with its parent, and leaves no core."""
    gc.disable()
    fd.dropped = str.strip                              # no one is told: the end of the process closes everything
    # The caller may have a handler for faults; the tracer is to see them first, and no one else.
    for each in (*_FAULTS, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGALRM):
        signal.signal(each, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    with suppress(OSError):
        os.setpgid(0, 0)
    _libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _child(act: Callable[[Slate], object], slate: Slate) -> None:
    try:
        begin()
        _libc.ptrace(_TRACEME, 0, None, None)
        result = act(slate)
        slate.say(_RESULT, "ok" if result is None else str(result))
    except Unfit as error:
        slate.say(_UNFIT, str(error))
    except FAILED as error:
        slate.say(_RESULT, name_of(error))
    except MemoryError:
        slate.say(_UNFIT, "no memory left")
    except BaseException as error:
        slate.say(_UNFIT, f"our own failure: {type(error).__name__}: {error}")
    finally:
        os._exit(0)


# Looks without reaping: as long as the child is there, dead or alive, no one else can have its number.
def _watch(pid: int, slate: Slate, timeout: float) -> RowOutcome:
    end = time.monotonic() + timeout
    while True:
        seen = os.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
        if seen is None:
            left = end - time.monotonic()
            if left <= 0:
                return RowOutcome(late=True)
            # A SIGCHLD may go to another thread of the caller; then the next look is a little later.
            signal.sigtimedwait({signal.SIGCHLD}, min(left, 0.02))
        elif seen.si_code == os.CLD_EXITED:
            return slate.read() or RowOutcome(unfit="our own failure: the child said nothing")
        elif seen.si_code in (os.CLD_KILLED, os.CLD_DUMPED):
            return RowOutcome(result=signal.Signals(seen.si_status).name)
        elif seen.si_status in _FAULTS:
            return RowOutcome(result=_fault(pid, seen.si_status, slate))
        else:
            # SIGTRAP: an exec of the row, which the tracer is told about.
            _libc.ptrace(_CONT, pid, None, 0 if seen.si_status == signal.SIGTRAP else seen.si_status)


def _fault(pid: int, number: int, slate: Slate) -> str:
    # siginfo_t on 64 bits: the code after si_signo and si_errno, the address after four bytes of padding.
    info = ctypes.create_string_buffer(128)
    name = signal.Signals(number).name
    if _libc.ptrace(_GETSIGINFO, pid, None, ctypes.addressof(info)) != 0:
        return name
    code, address = struct.unpack_from("<8xi4xQ", info.raw)
    # Sent by kill(2) or abort(3) it has no address: the same bytes are a pid and a uid then.
    if (number, code) not in SIGNAL_CODES:
        return name
    return f"{name} {SIGNAL_CODES[number, code]} {slate.place(address)}"


def end(pid: int) -> None:
    """Kill child *pid* with all that it has started, and reap it."""
    # The child again after its group, for it may not have come to make one.
    for kill in (os.killpg, os.kill):
        with suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
    while os.WIFSTOPPED(os.waitpid(pid, 0)[1]):
        pass


def ptrace_works(slate: Slate) -> bool:
    """Whether a child may be traced; without it signals come without code and address."""
    def crash(_: Slate) -> None:
        ctypes.string_at(8, 1)

    return " " in (perform(crash, slate).result or "")
