"""What a VMM may be asked to run, as bytes at addresses. Rule of this file: input is refused in one line, or fits.

A built-in guest, a file of assembly (``.s``), a static ELF or a flat binary. Source for ELF: the gABI, chapters 4 and 5, and
Arm's ELF for the Arm 64-bit Architecture.
"""

from __future__ import annotations

import importlib
import io
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from guest_memfd.errors import BadInput, HostUnavailable
from guest_memfd.guests import GUESTS, PRIVATE_BASE, guest
from guest_memfd.hosts.emulated.arm64.asm import assemble

_MAGIC = b"\x7fELF"
_PF_X = 1
# Dynamic tags of work that nobody here would do (gABI figure 5-10): DT_NEEDED, and the sizes of tables of relocations.
_NEEDED, _RELOCATIONS = 1, (2, 8, 18, 35)       # DT_PLTRELSZ, DT_RELASZ, DT_RELSZ, DT_RELRSZ
_BIGGEST = 1 << 30
# What pyelftools raises for a damaged file beside its own errors.
_DAMAGED = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError, struct.error)


@dataclass(frozen=True)
class Image:
    """Bytes at IPAs, and where execution begins; *zeros* are (IPA, bytes) that must read as zero."""

    segments: list[tuple[int, bytes]]
    entry: int
    name: str
    zeros: list[tuple[int, int]] = field(default_factory=list)

    def ranges(self) -> list[tuple[int, int]]:
        """(IPA, bytes) of everything it occupies, lowest first."""
        return sorted([(ipa, len(data)) for ipa, data in self.segments] + self.zeros)

    @property
    def end(self) -> int:
        """The first IPA behind it."""
        return max(ipa + size for ipa, size in self.ranges())


def load(path_or_name: str | Path, base: int = PRIVATE_BASE) -> Image:
    """The image of a built-in guest or a file; what has no address of its own is placed at *base*.

    Raises BadInput (with the reason in one line), UnknownName, and HostUnavailable when an ELF file comes and pyelftools is
    missing.
    """
    name = str(path_or_name)
    is_name = name in GUESTS or not ("/" in name or "." in name or Path(name).exists())
    if isinstance(path_or_name, str) and is_name:
        return _assembled(guest(name).source.read_text(encoding="ascii"), f"{name}.s", name, base)
    data = _read(Path(path_or_name))
    if Path(path_or_name).suffix == ".s":
        try:
            return _assembled(data.decode("ascii"), name, name, base)
        except UnicodeDecodeError as error:
            raise BadInput(f"{name}: assembly has to be ASCII") from error
    return _elf(data, Path(path_or_name), base) if data.startswith(_MAGIC) else Image([(base, data)], base, name)


def fits(image: Image, ranges: Iterable[tuple[int, int]]) -> None:
    """Raise BadInput unless every segment lies in one of *ranges*, each (IPA, bytes)."""
    ranges = list(ranges)
    for ipa, size in image.ranges():
        if not any(start <= ipa and ipa + size <= start + length for start, length in ranges):
            there = ", ".join(f"{start:#x}..{start + length:#x}" for start, length in ranges) or "nothing"
            raise BadInput(f"{image.name}: the segment at {ipa:#x} of {size:#x} bytes does not fit; the guest has {there}")


def _assembled(source: str, file: str, name: str, base: int) -> Image:
    common = resources.files("guest_memfd.guests") / "common.s"
    program = assemble(f"{source}\n{common.read_text(encoding='ascii')}", base, file)
    if "_start" not in program.symbols:
        raise BadInput(f"{file}: there is no label _start")
    return Image([(base, program.data)], program.symbols["_start"], name)


def _read(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise BadInput(f"{path} is a directory, not a guest image")
        if path.stat().st_size > _BIGGEST:
            raise BadInput(f"{path}: an image of {path.stat().st_size:#x} bytes; the limit is {_BIGGEST:#x}")
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from error
    if not data:
        raise BadInput(f"{path} is empty")
    return data


# -- ELF -------------------------------------------------------------------------------------------------------------

def _elf(data: bytes, path: Path, base: int) -> Image:
    try:
        elffile = importlib.import_module("elftools.elf.elffile")
        common = importlib.import_module("elftools.common.exceptions")
        construct = importlib.import_module("elftools.construct")
    except ImportError as error:
        raise HostUnavailable("an ELF file is read with pyelftools, which is not installed; "
                              "pip install -e '.[emu]'") from error
    if len(data) < 64:
        raise BadInput(f"{path}: the ELF header is truncated: {len(data)} bytes of 64")
    if data[4] != 2 or data[5] != 1:
        raise BadInput(f"{path}: a {'64' if data[4] == 2 else '32'}-bit {'big' if data[5] == 2 else 'little'}-endian ELF; "
                       f"guests are 64-bit little-endian AArch64")
    try:
        return _segments(elffile.ELFFile(io.BytesIO(data)), path, base)
    except (common.ELFError, construct.ConstructError, *_DAMAGED) as error:
        raise BadInput(f"{path}: no valid ELF file: {str(error) or type(error).__name__}".splitlines()[0]) from error


def _segments(elf: Any, path: Path, base: int) -> Image:
    header, stream = elf.header, elf.stream.getvalue()
    if header["e_machine"] != "EM_AARCH64":
        raise BadInput(f"{path}: an ELF for {header['e_machine']}; guests are EM_AARCH64")
    if header["e_type"] not in ("ET_EXEC", "ET_DYN"):
        raise BadInput(f"{path}: an ELF of type {header['e_type']}; a guest is a static ET_EXEC or a static PIE")
    if header["e_phoff"] + header["e_phnum"] * header["e_phentsize"] > len(stream):
        raise BadInput(f"{path}: the program headers are truncated")
    headers = [segment.header for segment in elf.iter_segments()]
    _check_static(stream, headers, path)
    loads = sorted((each for each in headers if each["p_type"] == "PT_LOAD" and each["p_memsz"]),
                   key=lambda each: int(each["p_paddr"]))
    if not loads:
        raise BadInput(f"{path}: there is no PT_LOAD segment, so nothing to run")
    # A PIE has no address of its own, unless its linker gave it one.
    bias = base if header["e_type"] == "ET_DYN" and loads[0]["p_paddr"] < 0x1000 else 0
    _check_ranges(loads, len(stream), path)
    start = header["e_entry"]
    entry = next((start - each["p_vaddr"] + each["p_paddr"] for each in loads
                  if each["p_flags"] & _PF_X and each["p_vaddr"] <= start < each["p_vaddr"] + each["p_memsz"]), None)
    if entry is None:
        raise BadInput(f"{path}: the entry {start:#x} lies in no executable segment")
    segments = [(bias + each["p_paddr"], stream[each["p_offset"]:each["p_offset"] + each["p_filesz"]])
                for each in loads if each["p_filesz"]]
    zeros = [(bias + each["p_paddr"] + each["p_filesz"], each["p_memsz"] - each["p_filesz"])
             for each in loads if each["p_memsz"] > each["p_filesz"]]
    return Image(segments, bias + entry, str(path), zeros)


def _check_static(data: bytes, headers: Sequence[Any], path: Path) -> None:
    if any(each["p_type"] == "PT_INTERP" for each in headers):
        raise BadInput(f"{path}: it wants an interpreter (PT_INTERP); link it with -static")
    # pyelftools reads the strings of a dynamic section as well, and a static PIE may have none.
    for each in (each for each in headers if each["p_type"] == "PT_DYNAMIC"):
        tags = data[each["p_offset"]:each["p_offset"] + each["p_filesz"] // 16 * 16]
        for tag, value in struct.iter_unpack("<QQ", tags[:len(tags) // 16 * 16]):
            if tag == _NEEDED or (tag in _RELOCATIONS and value):
                reason = "needs a shared library" if tag == _NEEDED else "has relocations"
                raise BadInput(f"{path}: it {reason}, and nobody here would link it; link it with -static -no-pie")


def _check_ranges(loads: Sequence[Any], size: int, path: Path) -> None:
    behind = 0
    for each in loads:
        what = f"{path}: the segment at {each['p_paddr']:#x}"
        if each["p_offset"] + each["p_filesz"] > size:
            raise BadInput(f"{what} is truncated: its {each['p_filesz']:#x} bytes end behind the file's {size:#x}")
        if each["p_filesz"] > each["p_memsz"]:
            raise BadInput(f"{what} has {each['p_filesz']:#x} bytes in the file and {each['p_memsz']:#x} in memory")
        if each["p_paddr"] < behind:
            raise BadInput(f"{what} overlaps the one before it")
        behind = each["p_paddr"] + each["p_memsz"]
        if behind > 1 << 64:
            raise BadInput(f"{what} of {each['p_memsz']:#x} bytes goes beyond the address space")
