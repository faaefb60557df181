"""Packages of the distribution, by its own package client, unpacked into the cache and never installed.

apt runs on lists of its own in the cache: nothing of the machine's apt is used but its mirror and its keys, and no root
is needed. Kernels newer than the machine's release are in its backports and in those of the next.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from guest_memfd.errors import HostUnavailable
from guest_memfd.kernels import cache

ARCHITECTURES = ("amd64", "arm64")


class Distribution(NamedTuple):
    """Whose packages they are: *name* as its mirrors' addresses end, keys, suites by what follows the address, components.

    complete: QEMU, and Python for a guest of another architecture, are taken from it as well as kernels.
    """

    name: str
    keys: Path
    suites: tuple[tuple[str, str], ...]
    components: str
    complete: bool


_KEYRINGS = Path("/usr/share/keyrings")
DEBIAN = Distribution("debian", _KEYRINGS / "debian-archive-keyring.gpg", (
    ("", "bookworm bookworm-backports trixie-backports"), ("-security", "bookworm-security")), "main", True)
"""Python and libraries are of the first suite, and fit together."""
UBUNTU = Distribution("ubuntu", _KEYRINGS / "ubuntu-archive-keyring.gpg", (
    ("", "{codename} {codename}-updates {codename}-security"),), "main", False)
"""Of the machine's own release, whose kernels change with the hardware enablement stack."""

APT = Path("/etc/apt")
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
            # Where reading has ended early it would wait for its pipe for ever, and this for it.
            process.kill()


# The lists are a day old at most.
def _apt(tool: str, *words: str, folder: Path | None = None) -> str:
    root = cache.folder() / "apt"
    stamp = root / "updated"
    if not stamp.exists() or time.time() - stamp.stat().st_mtime > A_DAY:
        for path in ("sources", "state/lists/partial", "cache/archives/partial"):
            (root / path).mkdir(parents=True, exist_ok=True)
        # Nothing is installed, as far as this apt knows: what the machine has does not decide what is fetched.
        (root / "status").touch()
        mirror, of = _mirror()
        # Ubuntu's mirrors have amd64, or as "ports" the others.
        machines = ARCHITECTURES if of is DEBIAN else ("arm64",) if mirror.endswith("-ports") else ("amd64",)
        (root / "sources" / "distribution.sources").write_text("\n".join(
            f"Types: deb\nURIs: {mirror}{more}\nSuites: {suites.format(codename=_codename())}\nComponents: {of.components}\n"
            f"Signed-By: {of.keys}\nArchitectures: {' '.join(machines)}\n" for more, suites in of.suites))
        _run(root, None, "apt-get", "-qq", "update")
        stamp.touch()
    return _run(root, folder, tool, *words)


def distribution() -> Distribution:
    """Whose packages this machine's apt gets; raises HostUnavailable."""
    return _mirror()[1]


# Where the machine's own apt gets its packages from, and whose they are.
def _mirror() -> tuple[str, Distribution]:
    for path in (APT / "sources.list", *sorted((APT / "sources.list.d").glob("*"))):
        for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
            found = re.match(r"(?:URIs:|deb(?: \[.*\])?)\s+(\S+/(debian|ubuntu)(?:-ports)?)/?(?:\s|$)", line)
            if found:
                return found[1], DEBIAN if found[2] == DEBIAN.name else UBUNTU
    raise HostUnavailable(f"this machine's package client names no mirror of Debian or Ubuntu; {INSTEAD}")


def _codename() -> str:
    return platform.freedesktop_os_release().get("VERSION_CODENAME", "")


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
        # As root, apt would become a user of its own, who may not write into the cache.
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
