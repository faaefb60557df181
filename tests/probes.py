"""The probe, run for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from linux_driver import no_kvm
from refusal import one_line

from guest_memfd.cli.main import main
from guest_memfd.probe.ask.calls import load
from guest_memfd.probe.ask.here import Here
from guest_memfd.probe.ask.row import Row

NO_KVM = no_kvm()
needs_kvm = pytest.mark.skipif(bool(NO_KVM), reason=NO_KVM)
NOWHERE = "/dev/kvm-that-is-not-there"


def nothing(here: Here) -> None:
    """Do nothing."""


def crashes(here: Here) -> None:
    """Load from nowhere."""
    load(0x1000)


def row(act: Callable[..., object], expect: str | None = "ok", **more: Any) -> Row:
    return Row(f"planted.{act.__name__}", "planted", act, expect=expect, **more)


def gmem(*argv: str) -> int:
    return main(["probe", *argv])


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert gmem(*argv) == 4
    return one_line(capsys)
