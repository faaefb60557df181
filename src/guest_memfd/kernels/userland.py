"""What a guest has beside its kernel: a Python, as an archive of the cache. Our programs and the job come on top."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from guest_memfd.errors import HostUnavailable
from guest_memfd.kernels import cache, packages
from guest_memfd.kernels.cpio import Cpio
from guest_memfd.kernels.packages import Say

NATIVE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), "")
"""This machine's architecture, as packages call it."""

PACKAGES = ("python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libc6", "zlib1g", "libexpat1", "libffi8",
            "libbz2-1.0", "liblzma5", "libssl3", "libgcc-s1", "libuuid1", "dash")
_FILES = ("./bin/*", "./lib/*.so*", "./usr/bin/*", "./usr/lib/*")
_UNUSED = ("test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip", "pydoc_data", "config-*",
           "site-packages", "dist-packages", "__pycache__", "_test*", "_tkinter*", "_ctypes_test*", "sitecustomize.py",
           "turtle.py", "*.a", "*.exe")
_ACCOUNTS = {
    "etc/passwd": "root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n", "var/tmp/.keep": "",
}


def archive(arch: str, say: Say) -> Path:
    """The archive for *arch*: the Python that runs this where it is this machine's, the distribution's for others."""
    # With this file's text: another list of what is left out makes another archive.
    key = hashlib.sha256("|".join((sys.version, sys.prefix, Path(__file__).read_text())).encode()).hexdigest()[:16]
    return cache.kept_file(f"python-{arch}-{key}.cpio", lambda: _of_host() if arch == NATIVE else _of_packages(arch, say))


# With its standard library and the shared libraries that they need, at the places they have here.
def _of_host() -> bytes:
    python, library = Path(os.path.realpath(sys._base_executable)), Path(sysconfig.get_path("stdlib"))  # type: ignore[attr-defined]
    shell, image = Path(os.path.realpath("/bin/sh")), Cpio()
    # Modules of the standard library are linked against more than Python is: _ssl, _ctypes, _lzma.
    for binary in (python, shell, *sorted(library.glob("lib-dynload/*.so"))):
        listed = subprocess.run(["ldd", binary], capture_output=True, text=True, check=False).stdout
        for found in re.findall(r"(/\S+) \(0x", listed):
            image.add(Path(found), found)
    image.add(python, python)
    image.add(shell, "/bin/sh")
    image.add(library, library, _UNUSED, sources=False)
    return _finished(image, str(python))


def _of_packages(arch: str, say: Say) -> bytes:
    if not packages.distribution().complete:
        raise HostUnavailable(f"a guest of another architecture ({arch}) takes its Python from Debian's packages, and this "
                              "machine's package client gets others")
    root = packages.unpacked(f"python-{arch}", (f"{name}:{arch}/bookworm" for name in PACKAGES), _FILES, say)
    image, python = Cpio(), next(iter(sorted(root.glob("usr/bin/python3.*[0-9]"))))
    # Compiled by the one that runs this, if it is of the same release.
    same = python.name == f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for source in sorted(root.rglob("*")):
        path = "/" + str(source.relative_to(root))
        if source.is_symlink():
            image.link(path, os.readlink(source))
        elif source.is_file() and f"/lib/{python.name}/" not in path:
            image.put(path, source.read_bytes(), 0o755 if os.access(source, os.X_OK) else 0o644)
    image.add(root / f"usr/lib/{python.name}", f"/usr/lib/{python.name}", _UNUSED, sources=not same)
    image.link("bin/sh", "dash")
    return _finished(image, python.name)


def _finished(image: Cpio, python: str) -> bytes:
    image.link("usr/bin/python3", python)
    for path, text in _ACCOUNTS.items():
        image.put(path, text)
    image.console()
    return image.done()
