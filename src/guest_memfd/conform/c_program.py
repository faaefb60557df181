"""A sequence as a C program that needs a kernel and nothing else: for a report to those who write the kernel."""

from __future__ import annotations

from pathlib import Path

from guest_memfd.conform.sequence import Sequence

_SIGNED_END = 1 << 31


def program(sequence: Sequence, says: str) -> str:
    """The text of it, with *says* at its head. It prints the answer to each step as the host's subject gives it."""
    prelude = Path(__file__).with_name("prelude.c").read_text(encoding="utf-8")
    head = "".join(f"// {line}\n" for line in says.splitlines())
    steps = "".join(f"\tSTEP({step.op}, {', '.join(map(_number, step.args))});\n" for step in sequence)
    return f"{head}\n{prelude}int main(void)\n{{\n\tbegin();\n{steps}\treturn 0;\n}}\n"


def _number(value: int) -> str:
    if 0 <= value < _SIGNED_END:
        return str(value) if value < 10 else hex(value)
    return f"{value % (1 << 64):#x}ULL"
