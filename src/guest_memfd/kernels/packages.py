"""Packages of the distribution, by its own package client, unpacked into the cache and never installed.

apt runs on lists of its own in the cache: nothing of the machine's apt is used but its mirror and its keys, and no root
is needed. Kernels newer than the machine's release are in its backports and in those of the next.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from guest_memfd.errors import HostUnavailable
from guest_memfd.kernels import cache

ARCHITECTURES = ("amd64", "arm64")
KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SUITES = (("", "bookworm bookworm-backports trixie-backports"), ("-security", "bookworm-security"))
"""What follows the mirror's address, and the suites there; Python and libraries are of the first, and fit together."""

A_DAY = 86400
ROOM = 512 << 20
"""Bytes that have to be free before anything is fetched: on a full disk apt waits for ever."""
LONGEST = 900
"""Seconds that the package client may take for one thing."""
INSTEAD = "give the path of a kernel's image (bzImage, vmlinux or Image), and have a qemu-system on the PATH"

Say = Callable[[str], None]
"""Where progress is told."""


def names() -> set[str]:
    """The names of all packages that there are, those of another architecture with ``:`` and its name behind."""
    return set(_apt("apt-cache", "pkgnames").split())


def unpacked(name: str, packages: Iterable[str], wanted: Sequence[str], say: Say) -> Path:
    """The folder *name* of the cache: the files of *packages* that match one of *wanted*.

    Raises HostUnavailable: no package client, no network, no room, no such package.
    """
    def fill(tree: Path, work: Path) -> None:
        say(f"fetching {name}")
        _apt("apt-get", "-qq", "download", *packages, folder=work)
        for package in sorted(work.glob("*.deb")):
            _unpack(package, tree, wanted)

    return cache.kept_folder(name, fill)


def _unpack(package: Path, tree: Path, wanted: Sequence[str]) -> None:
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as process:
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member in archive:
                    if not member.isdir() and any(fnmatch(member.name, each) for each in wanted):
                        # "tar": links of packages may be absolute; no device, nothing outside of the folder.
                        archive.extract(member, tree, filter="tar")
        except tarfile.TarError as error:
            raise HostUnavailable(f"{package.name} is broken: {error}; run it again") from None
        finally:
            process.kill()


# The lists are a day old at most.
def _apt(tool: str, *words: str, folder: Path | None = None) -> str:
    root = cache.folder() / "apt"
    stamp = root / "updated"
    if not stamp.exists() or time.time() - stamp.stat().st_mtime > A_DAY:
        for path in ("sources", "state/lists/partial", "cache/archives/partial"):
            (root / path).mkdir(parents=True, exist_ok=True)
        (root / "status").touch()
        mirror = _mirror()
        (root / "sources" / "debian.sources").write_text("\n".join(
            f"Types: deb\nURIs: {mirror}{more}\nSuites: {suites}\nComponents: main\nSigned-By: {KEYS}\n"
            f"Architectures: {' '.join(ARCHITECTURES)}\n" for more, suites in SUITES))
        _run(root, None, "apt-get", "-qq", "update")
        stamp.touch()
    return _run(root, folder, tool, *words)


# Where the machine's own apt gets Debian's packages from.
def _mirror() -> str:
    for path in (Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))):
        for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
            found = re.match(r"(?:URIs:|deb(?: \[.*\])?)\s+(\S+/debian)/?(?:\s|$)", line)
            if found:
                return found[1]
    raise HostUnavailable(f"this machine's package client names no mirror of Debian; {INSTEAD}")


def _run(root: Path, folder: Path | None, tool: str, *words: str) -> str:
    if not shutil.which(tool):
        raise HostUnavailable(f"{tool} is not here; {INSTEAD}")
    there = cache.folder()
    if tool == "apt-get" and (free := shutil.disk_usage(there).free) < ROOM:
        raise HostUnavailable(f"the cache {there} has {free >> 20} MiB free, and what is fetched takes up to {ROOM >> 20}; "
                              "GMEM_CACHE names another place")
    options = {
        "Dir::Etc::sourcelist": "/dev/null", "Dir::Etc::sourceparts": root / "sources", "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null", "Dir::State": root / "state", "Dir::State::status": root / "status",
        "Dir::Cache": root / "cache", "APT::Architecture": "amd64", "Acquire::Languages": "none",
        "Acquire::http::Timeout": "60", "Acquire::https::Timeout": "60",
        "APT::Sandbox::User": "root" if os.geteuid() == 0 else "",
    }
    flags = [*(f"-o{name}={value}" for name, value in options.items()),
             *(f"-oAPT::Architectures::={each}" for each in ARCHITECTURES)]
    try:
        done = subprocess.run([tool, *flags, *words], capture_output=True, text=True, check=False, cwd=folder or root,
                              timeout=LONGEST)
    except subprocess.TimeoutExpired:
        raise HostUnavailable(f"{tool} {_shown(words)}: nothing after {LONGEST} s; {INSTEAD}") from None
    if done.returncode:
        why = (done.stderr.strip() or done.stdout.strip() or "it failed").splitlines()[-1]
        raise HostUnavailable(f"{tool} {_shown(words)}: {why}; {INSTEAD}")
    return done.stdout


def _shown(words: Sequence[str]) -> str:
    return " ".join(word for word in words[:2] if word != "-qq")
