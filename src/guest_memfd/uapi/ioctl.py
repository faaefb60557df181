"""ioctl command numbers (include/uapi/asm-generic/ioctl.h): direction, argument size, type, number."""

from __future__ import annotations

NONE, WRITE, READ = 0, 1, 2
"""As user space sees it: WRITE means that the kernel reads the argument."""


def ioc(direction: int, kind: int | str, nr: int, size: int = 0) -> int:
    """_IOC(): *kind* is a byte or a character, *size* the argument's in bytes."""
    return direction << 30 | size << 16 | (ord(kind) if isinstance(kind, str) else kind) << 8 | nr


def io(kind: int | str, nr: int) -> int:
    """_IO(): no argument, or one that is no pointer."""
    return ioc(NONE, kind, nr)


def iow(kind: int | str, nr: int, size: int) -> int:
    """_IOW(): the kernel reads *size* bytes."""
    return ioc(WRITE, kind, nr, size)


def ior(kind: int | str, nr: int, size: int) -> int:
    """_IOR(): the kernel writes *size* bytes."""
    return ioc(READ, kind, nr, size)


def iowr(kind: int | str, nr: int, size: int) -> int:
    """_IOWR(): the kernel reads *size* bytes and writes them back."""
    return ioc(READ | WRITE, kind, nr, size)
