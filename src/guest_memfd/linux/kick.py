"""How a thread in KVM_RUN is made to come back. The signal is blocked everywhere but inside KVM_RUN.

So it never runs a handler, never kills anybody, and is not lost when it comes just before the ioctl: it stays pending, and
KVM_RUN returns EINTR at once. KVM_SET_SIGNAL_MASK lets it in; Documentation/virt/kvm/api.rst, 4.35 (KVM_SET_SIGNAL_MASK).
A thread that has once run a vCPU keeps the signal blocked.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from ctypes import c_int

from guest_memfd.linux import syscall
from guest_memfd.linux.abi.kvm import SET_SIGNAL_MASK, SignalMask
from guest_memfd.linux.abi.memory import SIGEV_THREAD_ID, Itimerspec, Sigevent, numbers

KICK = signal.SIGRTMAX - 2
"""The signal; nothing else in this process may use it."""

_NSEC = 1_000_000_000
_SET = (KICK,)


class Thread:
    """What has been arranged for one thread: the signal blocked, and a timer that sends it to this thread."""

    def __init__(self) -> None:
        with syscall.named("rt_sigprocmask"):
            # Blocked in the thread and let in by KVM_RUN alone: a signal that comes between two runs stays pending
            # and is not lost.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SET)
        self.tid = threading.get_native_id()
        self.process = os.getpid()
        self.sigset = sum(1 << number - 1 for number in mask if number != KICK)
        # To this thread and not to the process: a signal that is for all may be taken by a thread that runs no vCPU.
        made = c_int()
        syscall.raw(numbers().timer_create, time.CLOCK_MONOTONIC, Sigevent(0, KICK, SIGEV_THREAD_ID, self.tid), made,
                    call="timer_create")
        self._timer = made.value

    def arm(self, seconds: float) -> None:
        """The signal once, in *seconds*; at least a nanosecond, because 0 would disarm."""
        sec, nsec = divmod(max(round(seconds * _NSEC), 1), _NSEC)
        self._settime(Itimerspec(0, 0, sec, nsec))

    def disarm(self) -> None:
        """No signal any more, one that is on its way included."""
        self._settime(Itimerspec())
        drain()

    def _settime(self, when: Itimerspec) -> None:
        syscall.raw(numbers().timer_settime, self._timer, 0, when, 0, call="timer_settime")

    def kick(self) -> None:
        """The signal now, from whichever thread of this process; of no effect once the thread has ended."""
        # With the process's number: the thread may have ended, and its own may be another process's by now.
        syscall.libc.syscall(numbers().tgkill, self.process, self.tid, KICK)

    def __del__(self) -> None:
        # A fork's child inherits no timers: there the number is no one's, or that of a timer of its own.
        if hasattr(self, "_timer") and self.process == os.getpid():
            syscall.libc.syscall(numbers().timer_delete, self._timer)


def drain() -> None:
    """Take back what is pending for this thread; else every run from now on would be over at once."""
    with syscall.named("rt_sigtimedwait"):
        while signal.sigtimedwait(_SET, 0) is not None:
            pass


_here = threading.local()


def this_thread() -> Thread:
    """That of the calling thread; a fork's child has one of its own."""
    found: Thread | None = getattr(_here, "thread", None)
    if found is None or found.process != os.getpid():
        found = _here.thread = Thread()
    return found


def let_in(vcpu: int, thread: Thread) -> None:
    """KVM_SET_SIGNAL_MASK of descriptor *vcpu*: as *thread* was when it first ran one, and the signal besides."""
    syscall.ioctl(vcpu, SET_SIGNAL_MASK, SignalMask(8, thread.sigset), call="KVM_SET_SIGNAL_MASK")
