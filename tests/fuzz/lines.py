"""Command lines: verbs, options and values, right and wrong ones, in any order."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Iterable

from fuzz.kind import Kind
from guest_memfd.cli.main import main
from guest_memfd.designs import DESIGNS
from guest_memfd.hypervisors import HYPERVISORS
from guest_memfd.laws import LAWS
from guest_memfd.scenarios import PARTIES, SCENES

LONGEST = 400
"""Characters of a message; what it quotes is cut."""

CODES = range(6)
LISTS = ("designs", "laws", "parties", "scenes", "hypervisors", "guests", "scenarios")
USUALLY = ("check", "list", "explain", "replay")
VALUES = ("", "-", "--", "0", "-1", "1", "07", "1e3", "nan", "inf", "9" * 5000, "x" * 5000, "a,b", ",",
          "\x1b[31m", "\udc80", "\u202e", "/", "/dev/null", ".", "no/such/file", "\n", "%s", "{}", "'", '"', "\\", "kvm,kvm")
OPTIONS = ("--hypervisor", "--scene", "--parties", "--scenario", "--law", "--failures", "--max-states", "--max-seconds",
           "-j", "--jobs", "--json", "-o", "--quick", "--ktap", "-q", "-v", "--on", "--help", "--version", "--full", "-x",
           "--no-such")


class Lines(Kind):
    """`main()` on a command line; explorations are one party in one scene, and short."""

    name = "lines"

    def try_one(self, choose: random.Random, said: list[str]) -> str | None:
        """The exit code is documented, and a mistake is one message on stderr that fits a screen."""
        argv = self._line(choose)
        said.append(repr(argv))
        return answer(argv)

    def _line(self, choose: random.Random) -> list[str]:
        verb = choose.choice(USUALLY) if choose.random() < 0.8 else choose.choice(VALUES)
        argv = [verb]
        if verb == "check":
            argv += [self._name(choose, DESIGNS), "--parties", self._name(choose, PARTIES), "--max-states", "50", "-j", "1"]
        elif choose.random() < 0.7:
            argv.append(choose.choice((*VALUES, *LISTS)))
        for _ in range(choose.randrange(4)):
            option = choose.choice(OPTIONS)
            named = {"--hypervisor": HYPERVISORS, "--scene": SCENES, "--law": LAWS, "--parties": PARTIES}.get(option)
            if option in ("-j", "--jobs", "-o"):        # no processes, no files
                continue
            argv.append(option)
            if named is not None:
                argv.append(self._name(choose, named))
            elif choose.random() < 0.6:
                argv.append(choose.choice(VALUES))
        return argv

    def _name(self, choose: random.Random, names: Iterable[str]) -> str:
        known = list(names)
        return choose.choice(known) if choose.random() < 0.8 else choose.choice((*VALUES, choose.choice(known)[:-1]))


def answer(argv: list[str]) -> str | None:
    """What is wrong with the answer to *argv*."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: object = main(argv)
        except SystemExit as end:                       # argparse
            code = end.code
    told = err.getvalue()
    if code not in CODES:
        return f"exit code {code!r}"
    if "Traceback" in told or "Traceback" in out.getvalue():
        return f"a traceback:\n{told}"
    if code in (1, 4, 5):
        last = told.rstrip("\n").rpartition("\n")[2]
        if not last:
            return f"exit code {code} without a word"
        if code == 1:
            return f"a failure of our own: {last}"
        if len(last) > LONGEST:
            return f"a message of {len(last)} characters"
        if "\x1b" in told:
            return "an escape sequence on the terminal"
    return None
