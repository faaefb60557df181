"""Where kernels, QEMU and Python are kept between runs. A file or folder appears whole or not at all.

Two runs may fill it at once: each makes its own, and the one that is renamed first stays.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from guest_memfd.errors import HostUnavailable


def folder() -> Path:
    """``$GMEM_CACHE``, else ``gmem`` in the user's cache directory; made if it is not there.

    Raises HostUnavailable where it cannot be written.
    """
    there = Path(os.environ.get("GMEM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gmem")
    try:
        there.mkdir(parents=True, exist_ok=True)
        # Tried and not asked about: permission bits say nothing of quotas and of mounts that are read-only.
        with tempfile.TemporaryFile(dir=there):
            return there
    except OSError as error:
        raise HostUnavailable(f"the cache {there} cannot be written: {error.strerror}; GMEM_CACHE names another "
                              "place") from None


def kept_file(name: str, make: Callable[[], bytes]) -> Path:
    """The file *name* of the cache; what *make* returns if it is not there yet."""
    path = folder() / name
    if not path.exists():
        data = make()
        with _writing(path), tempfile.NamedTemporaryFile(dir=path.parent, prefix=".new-") as file:
            file.write(data)
            file.flush()
            # link(2) and not rename(2): it does not replace the file that another run has put there, and may be reading.
            with suppress(FileExistsError):
                os.link(file.name, path)
    return path


def kept_folder(name: str, fill: Callable[[Path, Path], None]) -> Path:
    """The folder *name* of the cache; *fill* is given an empty folder to fill and one for what it needs meanwhile."""
    path = folder() / name
    if not path.exists():
        with _writing(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as scratch:
            tree, work = Path(scratch, "tree"), Path(scratch, "work")
            tree.mkdir()
            work.mkdir()
            fill(tree, work)
            with suppress(OSError):                     # another run was faster
                tree.rename(path)
        if not path.exists():
            raise HostUnavailable(f"{path} cannot be made")
    return path


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HostUnavailable(f"{path} cannot be written: {error.strerror}") from None
