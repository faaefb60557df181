"""Which kernel is meant: the path of an image, the name of a package, or a part of a release, of which the newest counts."""

from __future__ import annotations

import hashlib
import lzma
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from guest_memfd.errors import BadInput, HostUnavailable
from guest_memfd.kernels import cache, packages
from guest_memfd.kernels.packages import Say

WANTED = ("virtio_pci", "virtio_console", "kvm_amd", "kvm_intel", "kvm")
"""Modules that are loaded where they are modules, with what they depend on."""

_FILES = ("*/vmlinuz*", "*/config-*", *(f"*/{name}.ko*" for name in ("kvm*", "irqbypass", "virtio*", "ccp")))
_HEADER = 0x250
"""Bytes of a bzImage up to and with payload_length."""
_PVH_NOTES = tuple(struct.pack("<III4s", 4, size, 18, b"Xen\0") for size in (4, 8))
"""XEN_ELFNOTE_PHYS32_ENTRY: QEMU can start the uncompressed image (CONFIG_PVH)."""


@dataclass(frozen=True)
class BootedKernel:
    """What is booted: *image*, *modules* by name, *config* where it is known; of architecture *arch*."""

    name: str
    arch: str
    image: Path
    modules: Mapping[str, Path] = field(default_factory=dict)
    config: Path | None = None

    def load_order(self) -> dict[str, bytes]:
        """The modules that are wanted, each after those it depends on."""
        order: dict[str, bytes] = {}
        for name in WANTED:
            self._add(name, order)
        return order

    def _add(self, name: str, order: dict[str, bytes]) -> None:
        if name in order or name not in self.modules:
            return
        data = _plain(self.modules[name])
        depends = re.search(rb"\0depends=([^\0]*)\0", data)
        for other in depends[1].decode().split(",") if depends else ():
            # Files may have dashes where the module's own name has underscores.
            self._add(other.replace("-", "_"), order)
        order[name] = data


def _plain(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    return _zstd(data) if path.suffix == ".zst" else data


def _zstd(data: bytes) -> bytes:
    if not shutil.which("zstd"):
        raise HostUnavailable("zstd is not here, and the modules of this kernel are compressed with it")
    return subprocess.run(["zstd", "-dcq"], input=data, capture_output=True, check=False).stdout


def find(given: str, arch: str, say: Say, modules: Path | None = None) -> BootedKernel:
    """The kernel that *given* names, for *arch*; *modules*: the folder of those of an image.

    Raises BadInput for what is no kernel, HostUnavailable where it cannot be had.
    """
    path = Path(given)
    if path.is_file():
        _check(path, arch)
        return _prepared(path.name, arch, path, modules)
    if "/" in given:
        raise BadInput(f"no kernel is at {given}: name an image, a release as in 7.3, or a package")
    have = _of(arch)
    newest = _newest(given, arch, have)
    wanted = _packages(newest, have)
    folder = packages.unpacked(f"kernel-{newest}", [_named(name, arch) for name in wanted], _FILES, say)
    image = next(iter(sorted(folder.rglob("vmlinuz*"))), None)
    if image is None:
        raise HostUnavailable(f"no kernel is in the packages {', '.join(wanted)}")
    return _prepared(newest, arch, image, folder)


def releases(arch: str) -> list[str]:
    """All releases that can be had for *arch*, the newest of each series, oldest first."""
    series: dict[tuple[int, ...], str] = {}
    for release in sorted(_releases(_of(arch), arch), key=_numbers):
        series[series_of(release)] = release
    return list(series.values())


def series_of(release: str) -> tuple[int, ...]:
    """The first two numbers of *release*: (6, 12) of 6.12.117+deb12-amd64."""
    return _numbers(release)[:2]


# The names of packages as those of the native architecture have them.
def _of(arch: str) -> set[str]:
    return {name.removesuffix(f":{arch}") for name in packages.names()}


def _named(name: str, arch: str) -> str:
    return name if arch == "amd64" else f"{name}:{arch}"


# Where the image and the modules are: in one package (Debian up to 6.18), or in two, of which Ubuntu has the image with a
# signature or without.
def _packages(release: str, have: set[str]) -> list[str]:
    plain, modules = f"linux-image-{release}", f"linux-modules-{release}"
    better = (f"linux-binary-{release}", f"linux-image-unsigned-{release}")
    return [next((name for name in better if name in have), plain), *([modules] if modules in have else [])]


# Cloud kernels are smaller, and have all that a guest needs; each is taken in place of the general one. Debian's names end
# with the architecture, Ubuntu's with a flavour, of which one is for all machines.
def _releases(have: set[str], arch: str) -> Iterator[str]:
    images = {re.sub("^linux-image-(unsigned-)?", "", name) for name in have
              if re.fullmatch(rf"linux-image-(unsigned-)?\d+\.\d+\S*-({arch}|generic)", name)
              and not re.search("-(dbg|rt|16k)", name)}
    for release in images:
        if "-cloud-" in release or not release.endswith(arch) or release.replace(f"-{arch}", f"-cloud-{arch}") not in images:
            yield release


def _newest(given: str, arch: str, have: set[str]) -> str:
    release = re.sub(r"^linux-(image|binary)-(unsigned-)?|-unsigned$", "", given)
    found = [each for each in _releases(have, arch)
             if each == release
             or re.fullmatch(rf"{re.escape(release)}([.+-][^-]*(-\d+)?)?((-cloud)?-{arch}|-generic)", each)]
    if f"linux-image-{release}" in have:
        found.append(release)
    if not found:
        known = ", ".join(dict.fromkeys(".".join(map(str, series_of(each)))
                                        for each in sorted(_releases(have, arch), key=_numbers)))
        raise HostUnavailable(f"no kernel {given!r} for {arch} can be had; there are {known or 'none'}, or an image's path")
    return max(found, key=_numbers)


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", release))


# As their boot protocols have it: x86 (HdrS at byte 514), arm64 (ARM\x64 at byte 56).
def _check(image: Path, arch: str) -> None:
    with image.open("rb") as file:
        head = file.read(1024)
    is_of = "amd64" if head[514:518] == b"HdrS" else "arm64" if head[56:60] == b"ARM\x64" else arch
    if is_of != arch:
        raise BadInput(f"{image} is a kernel for {is_of}, and {arch} is asked for (--arch)")


def _prepared(name: str, arch: str, image: Path, modules: Path | None) -> BootedKernel:
    files = sorted(modules.rglob("*.ko*")) if modules else []
    configs = sorted(image.parent.glob("config-*"))
    return BootedKernel(name, arch, _uncompressed(image) if arch == "amd64" else image,
                        {path.name.split(".")[0].replace("-", "_"): path for path in files}, configs[0] if configs else None)


# To decompress here takes a tenth of a second, and two under emulation.
def _uncompressed(image: Path) -> Path:
    data = image.read_bytes()
    if data[514:518] != b"HdrS" or len(data) < _HEADER or not shutil.which("zstd"):
        return image
    offset, length = struct.unpack_from("<II", data, 0x248)     # payload_offset, payload_length (x86 boot protocol 2.08)
    start = (data[0x1F1] + 1) * 512 + offset
    # Less four bytes: the kernel's build appends the size of the plain image, which is no part of the frame.
    plain = _zstd(data[start:start + length - 4])
    if not any(note in plain for note in _PVH_NOTES):
        return image
    return cache.kept_file(f"vmlinux-{hashlib.sha256(data).hexdigest()[:16]}", lambda: plain)
