"""A sequence on the real kernel in a process of its own, forked for it: what kills it is an answer, too."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress

from guest_memfd.conform.sequence import Sequence
from guest_memfd.conform.subject import Performing, StepAnswer
from guest_memfd.linux import fd

SECONDS = 60.0
"""That a sequence may take, however busy the machine."""


class Child:
    """*sequence* on what *make* makes, under way in a child; `answers` waits for it."""

    def __init__(self, make: Callable[[], Performing], sequence: Sequence) -> None:
        self._pipe, theirs = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            _child(make, sequence, theirs)
        os.close(theirs)

    def answers(self) -> list[StepAnswer]:
        """One for each step, fewer if it died: then the last says of what. All is over then."""
        # The clock starts here and not at the fork. While the emulated half ran, nobody
        # read: the child may have stood still before a full pipe.
        data, end = bytearray(), time.monotonic() + SECONDS
        try:
            while select.select([self._pipe], [], [], max(end - time.monotonic(), 0))[0]:
                got = os.read(self._pipe, 1 << 16)
                if not got:
                    break
                data += got
            else:
                # What hangs is killed, and the comparison sees a signal: a
                # kernel that does not come back is an answer, too.
                os.kill(self._pid, signal.SIGKILL)
        except BaseException:
            os.kill(self._pid, signal.SIGKILL)
            raise
        finally:
            os.close(self._pipe)
            _, status = os.waitpid(self._pid, 0)
        # A line that has no end yet is not an answer: the child died while it
        # wrote it, or it is the text of our own failure.
        lines = bytes(data).split(b"\n")
        answers = [StepAnswer(*json.loads(line)) for line in lines[:-1]]
        if os.WIFSIGNALED(status):
            answers.append(StepAnswer(f"the process is killed by {signal.Signals(os.WTERMSIG(status)).name}", ""))
        elif os.WEXITSTATUS(status):
            answers.append(StepAnswer(f"our own failure: {lines[-1].decode(errors='replace')}", ""))
        return answers


def _child(make: Callable[[], Performing], sequence: Sequence, pipe: int) -> None:
    code = 1
    try:
        fd.dropped = str.strip                          # the end of the process closes everything
        # Ctrl-C reaches the whole group. A Python handler here would raise,
        # and that would look like a failure of the child.
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        # A child that is killed is an expected answer: no core file for it.
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        subject = make()
        for step in sequence:
            os.write(pipe, json.dumps(subject.perform(step)).encode() + b"\n")
        code = 0
    except BaseException as error:
        os.write(pipe, f"{type(error).__name__}: {error}".encode())
    finally:
        # Never sys.exit(): that would run exit handlers and flush the buffers that were the parent's before the fork.
        os._exit(code)
