"""How a command refuses: one line on standard error, and nothing else."""

from __future__ import annotations

import pytest


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The line; nothing may be on standard output."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gmem: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err
