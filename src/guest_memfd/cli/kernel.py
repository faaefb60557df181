"""`gmem kernel`: a command of ours, or any, on another Linux kernel in QEMU."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from guest_memfd.cli.output import Output
from guest_memfd.errors import BadInput
from guest_memfd.kernels import find, userland
from guest_memfd.kernels.qemu import MACHINES
from guest_memfd.kernels.run import Job
from guest_memfd.kernels.run import run as run_job

EXIT_CODES = """\
exit codes: those of the command; 4 bad input, 5 the kernel or QEMU cannot be had, does not boot, or gives no answer in time.

Kernels, QEMU and Python are kept in the user's cache directory (GMEM_CACHE names another); all of it can be deleted."""

TAKES_COMMAND = True
"""What comes after ``--`` is not ours."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this verb."""
    parser.epilog = EXIT_CODES
    actions = parser.add_subparsers(metavar="run|list", dest="action", required=True, parser_class=type(parser))
    words = {"run": "boot a kernel, run a command there, which comes after --, and end with its exit code",
             "list": "the releases that can be had, the newest of each series"}
    run, list_ = (actions.add_parser(name, help=line, description=line, epilog=EXIT_CODES) for name, line in words.items())
    run.usage = "gmem kernel run KERNEL [options] [-- COMMAND ...]"
    run.add_argument("kernel", metavar="KERNEL",
                     help="a part of a release (7.3, 6.18.15), a package, or the path of a bzImage, vmlinux or Image")
    add_machine(run)
    group = run.add_argument_group("the command (default: gmem probe)")
    group.add_argument("--add", metavar="HERE:THERE", action="append", default=[], help="a file or folder more in the guest")
    group.add_argument("--user", metavar="N", type=int, help="number of the user who runs it (default: root)")
    _add_architecture(list_)


def _add_architecture(group: argparse._ActionsContainer) -> None:
    group.add_argument("--arch", metavar="A", default=userland.NATIVE or "amd64",
                       help=f"{' or '.join(MACHINES)} (default: this machine's)")


def add_machine(parser: argparse.ArgumentParser) -> None:
    """The options that say what machine a kernel runs on; `gmem probe --kernel` has them, too."""
    group = parser.add_argument_group("the machine")
    _add_architecture(group)
    group.add_argument("--append", metavar="WORDS", default="", help="for the kernel's command line, as in "
                       "kvm-arm.mode=protected")
    group.add_argument("--modules", metavar="FOLDER", type=Path, help="where the modules of an image given by path are")
    group.add_argument("--cpus", metavar="N", type=int, default=1, help="CPUs of the guest (default 1)")
    group.add_argument("--memory", metavar="MIB", type=int, default=1024, help="memory of the guest (default 1024)")
    group.add_argument("--timeout", metavar="S", type=float, default=600, help="seconds for the command (default 600)")
    group.add_argument("--steady", action="store_true", help="the guest's time goes by instructions: a busy machine does "
                       "not change what is seen; takes twice the CPU time")


def architecture(arguments: argparse.Namespace) -> str:
    """What `--arch` says. Raises BadInput for what is none."""
    if arguments.arch not in MACHINES:
        raise BadInput(f"--arch {arguments.arch}: there are {' and '.join(MACHINES)}")
    return str(arguments.arch)


def job_of(arguments: argparse.Namespace, argv: tuple[str, ...], *, files: tuple[tuple[Path, str], ...] = (),
           user: int | None = None) -> Job:
    """The job that the options of `add_machine` describe. Raises BadInput for a machine that cannot be."""
    architecture(arguments)
    for name, least in (("cpus", 1), ("memory", 256)):
        if getattr(arguments, name) < least:
            raise BadInput(f"--{name} {getattr(arguments, name)}: {least} at least")
    if not 0 < arguments.timeout < 1e6:
        raise BadInput(f"--timeout {arguments.timeout:g}: a number of seconds above 0")
    return Job(argv, arguments.timeout, user, files, cpus=arguments.cpus, memory=arguments.memory, append=arguments.append,
               steady=arguments.steady)


def tell(line: str) -> None:
    """Progress on standard error."""
    print(f"gmem: {line}", file=sys.stderr, flush=True)


def run(arguments: argparse.Namespace) -> int:
    """Boot, run, print what it said; the exit code is the command's."""
    if arguments.action == "list":
        with Output(None) as out:
            out.write("\n".join(find.releases(architecture(arguments))))
        return 0
    job = job_of(arguments, tuple(arguments.command or ("gmem", "probe")), files=tuple(map(_file, arguments.add)),
                 user=arguments.user)
    booted = find.find(arguments.kernel, arguments.arch, tell, arguments.modules)
    answer = run_job(booted, job, tell)
    sys.stderr.write(answer.err)
    if answer.out:
        with Output(None) as out:
            out.write(answer.out)
    tell(f"{answer.kernel}: exit code {answer.code}; boot {answer.boot:.1f} s, command {answer.command:.1f} s, "
         f"in all {answer.wall:.1f} s ({answer.cpu:.1f} s of CPU)")
    # A command that a signal ends has its number, negative; a shell would say 128 and the number.
    return answer.code if answer.code >= 0 else 128 - answer.code


def _file(given: str) -> tuple[Path, str]:
    here, colon, there = given.partition(":")
    if not colon or not there.startswith("/") or not Path(here).exists():
        raise BadInput(f"--add {given}: the path of a file or folder here, a colon, and an absolute path there")
    return Path(here), there
