"""Every error that leaves this package, and nothing else.

    GuestMemfdError
    +-- BadInput               you asked for something that cannot be: exit code 4
    |   +-- UnknownName        no design, hypervisor, party or law of that name
    |   +-- PluginError        a third-party hypervisor, design, party or law does not load or lacks something
    |   +-- NotAPrimitive      a procedure yielded something that no host can perform
    |   +-- DesignRaised       a design (or a party) raised while it was explored
    |   +-- TraceError         a trace file that cannot be read or does not fit
    +-- SyscallFailed          a system call or an ioctl returned -1; `errno` says why: exit code 4
    +-- Signalled              touching a mapping would have killed the process: SIGBUS or SIGSEGV: exit code 4
    +-- HostUnavailable        the host asked for is not on this machine, or there is no memory for it: exit code 5
    +-- InternalError          our own bug, please report it: exit code 1

    UserWarning
    +-- PluginLeftOut          a plugin that does not load is left out of all that there is
    +-- EngineNotice           an engine is compiled, or does not work and a slower one explores
    +-- ClusterNotice          a worker of a cluster is not used, or has died
    +-- JournalNotice          the last line of a file of finished scenarios was cut off
"""

import difflib
import errno as errnos
import os
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any

EHWPOISON = 133
"""Missing in Python's errno (include/uapi/asm-generic/errno.h)."""

_KERNEL_NAMES = {errnos.EAGAIN: "EAGAIN", errnos.EDEADLK: "EDEADLK", errnos.EOPNOTSUPP: "EOPNOTSUPP", EHWPOISON: "EHWPOISON"}
# Where Python knows two names for a number, or none.


def errno_name(errno: int) -> str:
    """The kernel's name of *errno*, which is positive (include/uapi/asm-generic/errno.h); its digits if it has none."""
    return _KERNEL_NAMES.get(errno) or errnos.errorcode.get(errno, str(errno))


def shown(value: object) -> str:
    """``repr(value)`` in one short line; the name of its type where it has none, because code of third parties raises."""
    return _short(words(repr, value, f"a {type(value).__name__}"))


def describe(error: BaseException) -> str:
    """``TypeError: message (file:line in function)``; the place is where the author of the code has to look."""
    trace, frames = error.__traceback__, []
    while trace is not None:
        frames.append((trace.tb_frame, trace.tb_lineno))
        trace = trace.tb_next
    message = _short(words(str, error, "(its __str__ raises)"))
    place = place_of(frames)
    return f"{type(error).__name__}{message and f': {message}'}{place and f' ({place})'}"


def place_of(frames: Sequence[tuple[FrameType, int]]) -> str:
    """``file:line in function`` of the innermost of *frames* that is a third party's, or of all; '' in Python's own."""
    theirs = [frame for frame in frames if not frame[0].f_code.co_filename.startswith(_OURS)]
    theirs = [frame for frame in theirs if not _is_of_python(frame[0].f_code.co_filename)]
    if not theirs and (not frames or _is_of_python(frames[-1][0].f_code.co_filename)):
        return ""
    frame, line = (theirs or frames)[-1]
    code = frame.f_code
    return f"{code.co_filename.rpartition('/')[2]}:{line} in {code.co_qualname}"


_OURS, _PYTHON = os.path.dirname(__file__) + os.sep, os.path.dirname(os.__file__) + os.sep
_MOST = 300


def _is_of_python(file: str) -> bool:
    return file.startswith("<frozen") or (file.startswith(_PYTHON) and "-packages" + os.sep not in file)


def words(how: Callable[[Any], str], value: object, otherwise: str) -> str:
    """*value* in the words that *how* makes of it; *otherwise* where its own code raises."""
    try:
        return how(value)
    except KeyboardInterrupt:
        raise
    except BaseException:
        return otherwise


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MOST else f"{line[:_MOST]}..."


class GuestMemfdError(Exception):
    """Root of all errors of this package; `exit_code` is what the command line returns."""

    exit_code = 1


class BadInput(GuestMemfdError):
    """The request cannot be carried out as written; the message names the thing and says what would be right."""

    exit_code = 4


class UnknownName(BadInput):
    """No *kind* is called *name*; suggests the nearest of *known*, and says *more*."""

    def __init__(self, kind: str, name: str, known: Iterable[str], more: str = "") -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
        super().__init__(f"unknown {kind} {name!r}; {hint}{more}")


class PluginError(BadInput):
    """A registered third-party hypervisor, design, party or law does not load, or lacks something, or misspells it."""


class NotAPrimitive(BadInput):
    """A procedure yielded something that is no primitive of `words/primitives.py`."""


class DesignRaised(BadInput):
    """A design, hypervisor or party raised an exception while it was explored; carries where, and the trace to it."""


class TraceError(BadInput):
    """A trace file is truncated, not JSON, of another version, or does not fit this program."""


class SyscallFailed(GuestMemfdError):
    """*call* returned -1 with *errno* (positive); *why* says in words what it did not like, where that is known."""

    exit_code = 4

    def __init__(self, errno: int, call: str, why: str = "") -> None:
        super().__init__(f"{call}: {errno_name(errno)} ({os.strerror(errno)}){f': {why}' if why else ''}")
        self.errno, self.call = errno, call


class Signalled(GuestMemfdError):
    """A load or store at *address* raised *signal* (its name) with si_code *code*."""

    exit_code = 4

    def __init__(self, signal: str, address: int, code: int | None = None) -> None:
        super().__init__(f"{signal} at {address:#x}{'' if code is None else f' (si_code {code})'}")
        self.signal, self.address, self.code = signal, address, code


class HostUnavailable(GuestMemfdError):
    """The host asked for, or memory to explore in, is not here; the message says what is missing and what helps."""

    exit_code = 5


class InternalError(GuestMemfdError):
    """A contradiction inside this package: a bug of ours."""


class PluginLeftOut(UserWarning):
    """All hypervisors, designs, parties or laws were asked for, and one that is registered does not load."""


class EngineNotice(UserWarning):
    """The compiled engine has just been compiled; or it does not work here, and a slower one does the same."""


class JournalNotice(UserWarning):
    """The last line of a file of finished scenarios was cut off, as its run was killed, and has been taken away."""


class ClusterNotice(UserWarning):
    """A worker of a cluster cannot be used, as its code is another; or one has died, and others do its work again."""
