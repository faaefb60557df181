"""Pages of docs/ that show commands and what they print: reading them, and comparing with what is printed now."""

from __future__ import annotations

import re
from collections.abc import Callable


def commands(page: str) -> list[tuple[str, str]]:
    """(arguments of gmem, output) of every command in a console block; a line ``...`` stands for any lines."""
    blocks = re.findall(r"^```console\n(.*?)^```$", page, re.M | re.S)
    return [found for block in blocks for found in re.findall(r"^\$ gmem (.*)\n((?:(?!\$ gmem ).*\n)*)", block, re.M)]


def agrees(output: str, printed: str, masked: Callable[[str], str]) -> None:
    """Fail unless *printed* is what a page shows as *output*, both line by line after *masked*."""
    lines = [masked(line) for line in printed.splitlines()]
    at = 0
    for part in output.split("...\n"):
        wanted = [masked(line) for line in part.splitlines()]
        while lines[at:at + len(wanted)] != wanted:
            at += 1
            assert at < len(lines), f"{wanted} is not in\n{printed}"
        assert at == 0 or "...\n" in output
        at += len(wanted)
    assert at == len(lines) or output.endswith("...\n")
