"""`gmem run --on kvm` for tests: the page that shows it, and what a terminal would show."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from linux_driver import no_guests

from guest_memfd.cli.main import main

ROOT = Path(__file__).parent.parent
PAGE_OF_DOCS = (ROOT / "docs" / "run-kvm.md").read_text(encoding="utf-8")
REASON = no_guests()
on_kvm = pytest.mark.skipif(bool(REASON), reason=REASON)


def shell(*argv: str) -> tuple[int, str]:
    """The exit code of gmem, and what a terminal would show."""
    terminal = io.StringIO()
    with redirect_stdout(terminal), redirect_stderr(terminal):
        code = main(list(argv))
    return code, terminal.getvalue()


def run(guest: str, *options: str) -> tuple[int, str]:
    return shell("run", guest, "--on", "kvm", *options)
