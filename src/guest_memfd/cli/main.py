"""`gmem`: find the verb, run it, and turn whatever happens into one line and an exit code.

Nothing heavy is imported before the verb is known, so that help and mistakes answer at once.

Exit codes: 0 holds, 1 our own failure, 2 refuted, 3 undetermined (a limit was reached, nothing happened, a replay
diverges), 4 bad input, 5 the host asked for is not available, or has no memory or no descriptors left. A signal ends with
128 and its number.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn, TextIO

from guest_memfd.cli import room
from guest_memfd.cli.stop import Stopped, stoppable
from guest_memfd.compat import override
from guest_memfd.errors import BadInput, GuestMemfdError, HostUnavailable, InternalError, UnknownName, words
from guest_memfd.printable import printable

VERBS = {
    "compare": "the table: designs x hypervisors x laws, what breaks in how many steps, and what each design costs",
    "cost": "what unmapping from the direct map costs on this machine over leaving it mapped: measured, per design and GiB",
    "check": "explore one design; a law that breaks comes with the shortest way there",
    "walk": "all parties of a scene at once, at random: for what is too large to be explored",
    "explain": "a saved trace as text, as a page for a browser, or for other tools",
    "replay": "run a saved trace again: the same verdict, or where it diverges and why",
    "probe": "ask this kernel: what its guest_memfd and memfd_secret offer, do, and get wrong",
    "conform": "hold the emulated /dev/kvm against the real one: the same calls on both, compared after every call",
    "kernel": "run a command on another Linux kernel, in QEMU, without root and without /dev/kvm",
    "run": "a guest program, its memory from guest_memfd: emulated and judged by the laws, or on the real /dev/kvm",
    "draw": "the life of a page under a design: its states and what leads from one to another, as a picture (SVG)",
    "shell": "completion for bash, zsh and fish, and a man page",
    "list": "what there is: guests, designs, hypervisors, scenes, parties, laws, scenarios",
}

NEWCOMER = """\
  gmem compare
      the table: which design keeps the host alive; two or three minutes
  gmem check none --hypervisor gunyah --scenario zero-padding-load
      how one does not, step by step
  gmem run hello
      a guest on an emulated machine, its memory from guest_memfd"""
"""What somebody may want who does not know."""

EXIT_CODES = """\
exit codes: 0 holds, 1 failure of gmem itself, 2 refuted, 3 undetermined (a limit was reached, nothing happened, a
replay diverges), 4 bad input, 5 host not available, or no memory left, 128 and its number for a signal.  NO_COLOR and
COLUMNS are obeyed; GMEM_DEBUG=1 shows tracebacks."""


_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}
LONGEST = 400
"""Characters of a message; from longer ones the middle is left out."""


class Formatter(argparse.HelpFormatter):
    """argparse's, with what comes last in as many paragraphs as it was written in."""

    @override
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(super(Formatter, self)._fill_text(each, width, indent) for each in text.split("\n\n"))


class Parser(argparse.ArgumentParser):
    """argparse, with errors that go where all others go."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=Formatter, **kwargs)

    @override
    def error(self, message: str) -> NoReturn:
        """Raise BadInput instead of exiting."""
        raise BadInput(f"{message}; see {self.prog} --help")


class Version(argparse.Action):
    """--version, which looks the version up only when asked."""

    @override
    def __call__(self, *_: Any) -> NoReturn:
        """Print the version of the installed package, or that there is none, and exit with status 0."""
        from importlib import metadata

        try:
            print(f"gmem {metadata.version('guest-memfd')}")
        except metadata.PackageNotFoundError:
            print("gmem (not installed)")
        sys.exit(0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line *argv* (default: sys.argv) and return its exit code.

    A signal that ends a process is 128 and its number, as a shell says it: everything begun has been taken away by then.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        with stoppable():
            _standard_streams()
            warnings.showwarning = _warn
            room.keep()
            code = _run(given)
            sys.stdout.flush()
    except KeyboardInterrupt as error:
        return 128 + (error.number if isinstance(error, Stopped) else 2)
    except BrokenPipeError:
        _stop_writing()
        # 128 and SIGPIPE, as if it had not been caught: `gmem compare | head` ends as cat would.
        return 141
    except Exception as error:
        return _told(error, given)
    finally:
        room.give_back()
    return code


# argparse ends the process after --help and --version; there is something to flush.
def _run(argv: list[str]) -> int:
    try:
        return run(argv)
    except SystemExit as done:
        return int(done.code or 0)


# The reader has seen enough, or there is no room; without this the interpreter would complain again at exit.
def _stop_writing() -> None:
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


# A descriptor that the caller has closed must not become a VM's, and text that the locale has no letters for is no failure.
def _standard_streams() -> None:
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)              # the lowest that is free
    sys.stdout = sys.stdout or open(1, "w", closefd=False)      # noqa: SIM115 - as long as the process
    sys.stderr = sys.stderr or open(2, "w", closefd=False)      # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _told(error: Exception, argv: Sequence[str]) -> int:
    # Asked first, and then the reserve goes: to find the words takes memory, too.
    lacks = not isinstance(error, HostUnavailable) and room.lacks(error)
    room.give_back()
    if isinstance(error, GuestMemfdError) and not isinstance(error, InternalError) and not lacks:
        return _fail(str(error), error.exit_code)
    if os.environ.get("GMEM_DEBUG"):
        raise error
    if lacks:
        less = "fewer processes (-j 1) or a limit (--max-states N) need less; " if {*argv} & {"check", "compare"} else ""
        return _fail(f"there is no memory left; {less}ulimit -v may allow more", 5)
    if isinstance(error, OSError):
        if error.filename is None and error.errno in _UNWRITABLE:
            _stop_writing()
            return _fail(f"cannot write to standard output: {error.strerror}", 4)
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return _fail(f"{error.strerror}: no descriptor is left; ulimit -n may allow more", 5)
    name = type(error).__name__
    what = words(lambda raised: f"{name}: {str(raised).partition(chr(10))[0]}", error,
                 f"{name}, which cannot say what it is about")
    return _fail(f"internal error: {what}; please report (GMEM_DEBUG=1 shows where)", 1)


# A warning is a line like any other.
def _warn(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
    line: str | None = None,
) -> None:
    _fail(str(message), 0)


def _fail(message: str, code: int) -> int:
    with suppress(OSError):
        # Where standard error is closed, or full, the exit code is all that can be said.
        print("\n".join(map(_shown, f"gmem: {message}".split("\n"))), file=sys.stderr)
    return code


# Names and numbers that someone else has chosen may hold control characters, and be of any length.
def _shown(line: str) -> str:
    line = printable(line)
    return line if len(line) <= LONGEST else f"{line[:LONGEST * 2 // 3]} ... {line[5 - LONGEST // 3:]}"


def run(argv: list[str]) -> int:
    """Parse *argv*, import its verb, run it; raises what the verb raises."""
    verb = next((word for word in argv if not word.startswith("-")), None)
    if verb is not None and verb not in VERBS:
        raise UnknownName("verb", verb, VERBS)
    module = import_module(f"guest_memfd.cli.{verb}") if verb else None
    if not argv:
        raise BadInput(f"no verb given; three to begin with:\n{NEWCOMER}\nall of them: gmem --help")
    top, verbs = parsers({verb: module} if verb and module else {})
    own = verbs.get(verb or "")
    # argparse would take "--" away, and what follows for arguments of the verb.
    argv, command = (argv[:argv.index("--")], argv[argv.index("--") + 1:]) if "--" in argv else (argv, None)
    if command is not None and not hasattr(module, "TAKES_COMMAND"):
        raise BadInput(f"unexpected argument '--'; see {(own or top).prog} --help")
    arguments, extra = top.parse_known_args(argv)
    arguments.command = command
    if module is None or own is None:
        _reject(extra, top)
        raise BadInput(f"no verb given: {', '.join(VERBS)}; see gmem --help")
    _reject(extra, own)
    from guest_memfd.cli.output import reserved

    with reserved():
        return int(module.run(arguments))


def parsers(modules: Mapping[str, ModuleType]) -> tuple[Parser, dict[str, Parser]]:
    """The parser of all, which knows every verb by name, and those of the verbs in *modules* with their options."""
    top = Parser(
        prog="gmem", epilog=EXIT_CODES,
        description="Which design of guest_memfd keeps the host alive? Explore it, and see what breaks it.")
    top.add_argument("--version", action=Version, nargs=0, help="print the version and exit")
    verbs = top.add_subparsers(metavar="VERB", parser_class=Parser)
    every = {
        name: verbs.add_parser(name, help=line, description=line, epilog=EXIT_CODES) for name, line in VERBS.items()
    }
    for name, module in modules.items():
        module.add_arguments(every[name])
    return top, {name: every[name] for name in modules}


def _reject(extra: Sequence[str], parser: argparse.ArgumentParser) -> None:
    for word in extra:
        if word.startswith("-"):
            known = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", parser.format_help()))
            raise UnknownName("option", word.partition("=")[0], known)
        raise BadInput(f"unexpected argument {word!r}; see {parser.prog} --help")


if __name__ == "__main__":
    sys.exit(main())
