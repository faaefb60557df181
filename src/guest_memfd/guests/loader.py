"""What a VMM may be asked to run, as bytes at addresses. Input that does not fit is refused in one line.

A built-in guest, a file of assembly (``.s``), a static ELF or a flat binary. Source for ELF: the gABI, chapters 4 and 5, and
Arm's ELF for the Arm 64-bit Architecture.
"""

from __future__ import annotations

import importlib
import io
import os
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from guest_memfd.errors import BadInput, HostUnavailable
from guest_memfd.guests import GUESTS, PRIVATE_BASE, guest, source
from guest_memfd.guests.target import ARM64, REAL_MODE, X86_64, Target

_MAGIC = b"\x7fELF"
_PF_X = 1
# Dynamic tags of work that no one here would do (gABI figure 5-10): DT_NEEDED, and the sizes of tables of relocations.
_NEEDED, _RELOCATIONS = 1, (2, 8, 18, 35)       # DT_PLTRELSZ, DT_RELASZ, DT_RELSZ, DT_RELRSZ
_BIGGEST = 1 << 30
_TEXT = bytes(range(0x20, 0x7F)) + b"\t\n\r\f"
_REGISTERS = {"arm64": re.compile(r"\b[xw]([12]?\d|30)\b|\b[xw]zr\b"),
              "x86_64": re.compile(r"\b[re]?(ax|bx|cx|dx|si|di|sp|bp)\b|\bptr\b|\.code16\b")}
# What pyelftools raises for a damaged file beside its own errors.
_DAMAGED = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError, struct.error)


@dataclass(frozen=True)
class GuestImage:
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
        """The first IPA after it."""
        return max(ipa + size for ipa, size in self.ranges())


class GuestSource(NamedTuple):
    """What was asked for, read once: *data* of a file, or the assembly of the *builtin* guest called *name*."""

    name: str
    data: bytes
    builtin: bool = False

    @property
    def is_assembly(self) -> bool:
        """Whether it has to be assembled."""
        return self.builtin or self.name.endswith(".s")

    @property
    def text(self) -> str:
        """The assembly; raises BadInput."""
        try:
            return self.data.decode("ascii")
        except UnicodeDecodeError as error:
            raise BadInput(f"{self.name}: assembly has to be ASCII") from error


def load(given: str | Path | GuestSource, target: Target = ARM64, *, base: int | None = None) -> GuestImage:
    """The image of a built-in guest or a file, made of *target*'s code.

    What has no address of its own is placed at *base*, or where the target has it. Raises BadInput (with the reason in one
    line), UnknownName, and HostUnavailable when an ELF file comes and pyelftools is missing.
    """
    found = given if isinstance(given, GuestSource) else read(given, target.architecture)
    base = target.base if base is None else base
    if found.is_assembly:
        return _assembled(found, target, base)
    if found.data.startswith(_MAGIC):
        return _elf(found.data, Path(found.name), target, base)
    # Text that ran as machine code would crash somewhere, and say nothing of a missing ".s".
    if not found.data.translate(None, _TEXT):
        raise BadInput(f"{found.name} is text; assembly ends in .s, and what is no ELF file is taken for machine code")
    return GuestImage([(base, found.data)], base, found.name)


def read(path_or_name: str | Path, architecture: str) -> GuestSource:
    """A file, or the built-in guest of that name for *architecture*; raises BadInput, UnknownName."""
    name = str(path_or_name)
    if isinstance(path_or_name, str) and (name in GUESTS or not ("/" in name or "." in name or os.path.exists(name))):
        return GuestSource(name, source(architecture, guest(name, architecture).name).read_bytes(), builtin=True)
    return GuestSource(name, _read(Path(path_or_name)))


def x86_target(found: GuestSource, real_mode: bool) -> Target:
    """Which of x86's targets *found* is for: a guest's own word, ``.code16`` in its assembly, or *real_mode*.

    Raises BadInput.
    """
    if found.builtin:
        if real_mode and not GUESTS[found.name].real_mode:
            raise BadInput(f"--real-mode: guest {found.name!r} is made for 64-bit mode")
        real_mode = GUESTS[found.name].real_mode
    elif found.is_assembly:
        real_mode |= re.search(r"^\s*(\w+:\s*)*\.code16\b", found.text, re.MULTILINE) is not None
    return REAL_MODE if real_mode else X86_64


def fits(image: GuestImage, ranges: Iterable[tuple[int, int]]) -> None:
    """Raise BadInput unless every segment lies in one of *ranges*, each (IPA, bytes)."""
    ranges = list(ranges)
    for ipa, size in image.ranges():
        if not any(start <= ipa and ipa + size <= start + length for start, length in ranges):
            there = ", ".join(f"{start:#x}..{start + length:#x}" for start, length in ranges) or "nothing"
            hint = ranges and f"; an ELF file is linked there with -Wl,-Ttext-segment={ranges[0][0]:#x}"
            raise BadInput(f"{image.name}: the segment at {ipa:#x} of {size:#x} bytes does not fit; the guest has {there}"
                           f"{hint or ''}")


def _assembled(found: GuestSource, target: Target, base: int) -> GuestImage:
    shared = source(target.architecture, "common16" if target is REAL_MODE else "common")
    file = f"{found.name}.s" if found.builtin else found.name
    lines = found.text.count("\n") + 1
    try:
        program = target.assemble(f"{found.text}\n{shared.read_text(encoding='ascii')}", base, file)
    except BadInput as error:
        raise BadInput(_placed(str(error), file, lines, shared.name) + _others(found.text, target)) from error
    if "_start" not in program.symbols:
        raise BadInput(f"{file}: there is no label _start")
    entry = program.symbols["_start"]
    if not base <= entry < base + len(program.data):
        raise BadInput(f"{file}: _start is {entry:#x}, and the program lies at {base:#x}..{base + len(program.data):#x}")
    return GuestImage([(base, program.data)], entry, found.name)


# A mistake after the guest's own *lines* is one between it and what every guest is assembled with.
def _placed(words: str, file: str, lines: int, shared: str) -> str:
    match = re.match(rf"{re.escape(file)}:(\d+): (?::: )?", words)
    if match is None or int(match[1]) <= lines:
        return words
    return f"{file}: {words[match.end():]}, in line {int(match[1]) - lines} of {shared}, which every guest is assembled with"


# Whose assembly *text* is, if not *target*'s.
def _others(text: str, target: Target) -> str:
    words = re.sub(r"#.*|//.*", "", text)
    looks = {architecture for architecture, names in _REGISTERS.items() if names.search(words)}
    theirs = next((each for each in (ARM64, X86_64) if looks == {each.architecture} != {target.architecture}), None)
    return f" (this looks like assembly for {theirs.title}, and guests here are {target.title}; see --on)" if theirs else ""


def _read(path: Path) -> bytes:
    try:
        if path.is_dir() or path.is_block_device() or path.is_char_device():
            raise BadInput(f"{path} is a {'directory' if path.is_dir() else 'device'}, not a guest image")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size      # 0 for a pipe, which can be read once only
            data = file.read(_BIGGEST + 1) if size <= _BIGGEST else b""
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from error
    except MemoryError as error:
        raise BadInput(f"{path}: no memory to read it into") from error
    size = max(size, len(data))
    if size > _BIGGEST:
        raise BadInput(f"{path}: an image of {size:#x} bytes; the limit is {_BIGGEST:#x}")
    if not data:
        raise BadInput(f"{path} is empty")
    return data


# -- ELF -------------------------------------------------------------------------------------------------------------

def _elf(data: bytes, path: Path, target: Target, base: int) -> GuestImage:
    if not target.machine:
        raise BadInput(f"{path} is an ELF file; {target.title} guests are flat binaries or assembly")
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
                       f"guests are 64-bit little-endian {target.title}")
    try:
        return _segments(elffile.ELFFile(io.BytesIO(data)), path, target, base)
    except (common.ELFError, construct.ConstructError, *_DAMAGED) as error:
        raise BadInput(f"{path}: no valid ELF file: {str(error) or type(error).__name__}".splitlines()[0]) from error


def _segments(elf: Any, path: Path, target: Target, base: int) -> GuestImage:
    header, stream = elf.header, elf.stream.getvalue()
    if header["e_machine"] != target.machine:
        raise BadInput(f"{path}: an ELF for {header['e_machine']}; guests are {target.machine}")
    if header["e_type"] not in ("ET_EXEC", "ET_DYN"):
        raise BadInput(f"{path}: an ELF of type {header['e_type']}; a guest is a static ET_EXEC or a static PIE")
    # All that pyelftools says of it is "expected 4, found 0".
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
    # By p_paddr and not p_vaddr: a guest begins with its MMU off, or with its memory mapped to itself.
    segments = [(bias + each["p_paddr"], stream[each["p_offset"]:each["p_offset"] + each["p_filesz"]])
                for each in loads if each["p_filesz"]]
    # Told and not made: whether a .bss of gigabytes fits is asked before anyone has so many zeros.
    zeros = [(bias + each["p_paddr"] + each["p_filesz"], each["p_memsz"] - each["p_filesz"])
             for each in loads if each["p_memsz"] > each["p_filesz"]]
    return GuestImage(segments, bias + entry, str(path), zeros)


def _check_static(data: bytes, headers: Sequence[Any], path: Path) -> None:
    if any(each["p_type"] == "PT_INTERP" for each in headers):
        raise BadInput(f"{path}: it wants an interpreter (PT_INTERP); link it with -static")
    # pyelftools reads the strings of a dynamic section as well, and a static PIE may have none.
    for each in (each for each in headers if each["p_type"] == "PT_DYNAMIC"):
        tags = data[each["p_offset"]:each["p_offset"] + each["p_filesz"] // 16 * 16]
        for tag, value in struct.iter_unpack("<QQ", tags[:len(tags) // 16 * 16]):
            if tag == _NEEDED or (tag in _RELOCATIONS and value):
                reason = "needs a shared library" if tag == _NEEDED else "has relocations"
                raise BadInput(f"{path}: it {reason}, and no one here would link it; link it with -static -no-pie "
                               f"-Wl,-Ttext-segment={PRIVATE_BASE:#x}")


def _check_ranges(loads: Sequence[Any], size: int, path: Path) -> None:
    behind = 0
    for each in loads:
        what = f"{path}: the segment at {each['p_paddr']:#x}"
        if each["p_offset"] + each["p_filesz"] > size:
            raise BadInput(f"{what} is truncated: its {each['p_filesz']:#x} bytes end beyond the file's {size:#x}")
        if each["p_filesz"] > each["p_memsz"]:
            raise BadInput(f"{what} has {each['p_filesz']:#x} bytes in the file and {each['p_memsz']:#x} in memory")
        if each["p_paddr"] < behind:
            raise BadInput(f"{what} overlaps the one before it")
        behind = each["p_paddr"] + each["p_memsz"]
        if behind > 1 << 64:
            raise BadInput(f"{what} of {each['p_memsz']:#x} bytes goes beyond the address space")
