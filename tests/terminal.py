"""gmem on a terminal: what it writes there."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios


def on_a_terminal(*argv: str, width: int | None = None, **env: str) -> bytes:
    """What gmem writes when its standard output is a terminal, of *width* columns (None: it does not say how many)."""
    ours, theirs = pty.openpty()
    if width is not None:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    with subprocess.Popen([sys.executable, "-m", "guest_memfd.cli.main", *argv], stdout=theirs,
                          stderr=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm", **env}) as process:
        os.close(theirs)
        out = b""
        try:
            while chunk := os.read(ours, 65536):
                out += chunk
        except OSError:             # Linux's way to say that the other side has closed
            pass
        process.wait(timeout=600)
    os.close(ours)
    return out
