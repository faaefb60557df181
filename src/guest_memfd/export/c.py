"""The system calls of a trace as a C program for /dev/kvm, which prints what each returns.

The program of `gmem conform` (conform/prelude.c) is another: it has many files and two VMs, and says what is seen of them
afterwards; this one is to be read, and pasted into a mail.
"""

from __future__ import annotations

from collections.abc import Iterator

from guest_memfd.export.calls import calls
from guest_memfd.report.counterexample import Counterexample, length


def c_program(example: Counterexample) -> Iterator[str]:
    """The lines; raises BadInput where the trace is not made of system calls."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = calls(example)
    environment = Environment(loader=PackageLoader("guest_memfd.export"), undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True, keep_trailing_newline=False, autoescape=False)
    environment.filters["c_string"] = _string
    text = environment.get_template("program.c").render(
        about=[_comment(line) for line in about(example)], calls=made, slots=example.scene.slots, pages=example.scene.pages)
    yield from text.splitlines()


def about(example: Counterexample) -> Iterator[str]:
    """What a program is made of, a line each."""
    finding = example.finding
    yield f"{finding.law} is broken: {example.design} on {example.hypervisor}, {length(finding.steps, example.parties)}"
    yield f"broken: {finding.evidence}"
    yield f"scene: {example.scene.name}"
    for number, step in enumerate(finding.steps, 1):
        if step.failed:
            yield f"step {number}, {step.primitive}, has to fail: see fault injection in the kernel's documentation"


def _comment(words: str) -> str:
    # A backslash at the end of a line would take the next one into the comment.
    return " ".join(words.split()).replace("\\", "/").replace("*/", "* /").replace("/*", "/ *")


# Letters, digits and what a name has; anything else as an octal escape.
def _string(words: str) -> str:
    # Octal, since it ends after three digits. \x goes on for as long as letters follow that could be digits.
    plain = "".join(chr(byte) if byte < 128 and (chr(byte).isalnum() or byte in b" -_.") else f"\\{byte:03o}"
                    for byte in words.encode())
    return f'"{plain}"'
