"""A newc archive, made in memory: what the kernel unpacks as its first root (Documentation/driver-api/early-userspace)."""

from __future__ import annotations

import fnmatch
import importlib.util
import marshal
import os
import stat
import sys
from pathlib import Path


class Cpio:
    """Folders come by themselves; of two files at one path the first counts; archives may follow one another."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._seen: set[str] = set()

    def _entry(self, path: str, mode: int, data: bytes = b"", rdev: tuple[int, int] = (0, 0)) -> None:
        if path in self._seen:
            return
        # The kernel makes no folders that the archive has not
        # (init/initramfs.c): the file would be left out without a word.
        folder = os.path.dirname(path)
        if folder:
            self._entry(folder, stat.S_IFDIR | 0o755)
        self._seen.add(path)
        name = path.encode() + b"\0"
        # ino, mode, uid, gid, nlink, mtime, size, major, minor of the file system, of the device, length of the name, check
        numbers = (len(self._seen), mode, 0, 0, 1, 0, len(data), 0, 0, *rdev, len(name), 0)
        head = b"070701" + b"".join(b"%08X" % number for number in numbers)
        self._parts += [head, name, bytes(-(len(head) + len(name)) % 4), data, bytes(-len(data) % 4)]

    def put(self, path: str | Path, data: bytes | str, mode: int = 0o644) -> None:
        """A file of these contents."""
        self._entry(str(path).lstrip("/"), stat.S_IFREG | mode, data.encode() if isinstance(data, str) else data)

    def link(self, path: str | Path, target: str) -> None:
        """A symbolic link to *target*, which need not be there."""
        self._entry(str(path).lstrip("/"), stat.S_IFLNK | 0o777, target.encode())

    def console(self) -> None:
        """/dev/console, which the kernel opens before there is anybody who could mount devtmpfs."""
        self._entry("dev/console", stat.S_IFCHR | 0o600, b"", (5, 1))

    def add(self, source: Path, path: str | Path, skip: tuple[str, ...] = (), *, sources: bool = True) -> None:
        """A file or a folder of this machine; Python comes compiled, and without *sources* only so.

        *skip*: patterns of names that are left out. To compile under emulation takes longer than anything else there.
        """
        path = Path(path)
        if source.is_dir():
            for entry in sorted(source.iterdir()):
                if entry.name != "__pycache__" and not any(fnmatch.fnmatch(entry.name, each) for each in skip):
                    self.add(entry, path / entry.name, skip, sources=sources)
            return
        data = source.read_bytes()
        code = _compiled(data, str(path)) if source.suffix == ".py" else b""
        if code:
            self.put(path.parent / "__pycache__" / f"{path.stem}.{sys.implementation.cache_tag}.pyc" if sources
                     else path.with_suffix(".pyc"), code)
        if sources or not code:
            self.put(path, data, 0o755 if os.access(source, os.X_OK) else 0o644)

    def done(self) -> bytes:
        """The whole archive; nothing can be added afterwards."""
        self._entry("TRAILER!!!", 0)
        data = b"".join(self._parts)
        return data + bytes(-len(data) % 512)


# A .pyc that is never compared with its source (PEP 552); nothing for what is no Python of this release.
def _compiled(text: bytes, name: str) -> bytes:
    try:
        code = compile(text, name, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return b""
    return importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + importlib.util.source_hash(text) + marshal.dumps(code)
