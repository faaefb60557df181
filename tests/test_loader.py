"""What the loader takes and what it refuses, with files that the tests build byte by byte."""

from __future__ import annotations

import contextlib
import re
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from guest_memfd.errors import BadInput, HostUnavailable, UnknownName
from guest_memfd.guests import PRIVATE_BASE
from guest_memfd.guests.loader import GuestImage, fits, load

AARCH64, X86_64, ARM = 183, 62, 40
EXEC, DYN, REL = 2, 3, 1
LOAD, DYNAMIC, INTERP = 1, 2, 3
R, W, X = 4, 2, 1
BASE = PRIVATE_BASE


def segment(vaddr: int, data: bytes, flags: int = R | X, **other: int) -> dict[str, Any]:
    return {"type": LOAD, "flags": flags, "vaddr": vaddr, "paddr": vaddr, "data": data, "memsz": len(data)} | other


def elf(*segments: dict[str, Any], entry: int = BASE, machine: int = AARCH64, kind: int = EXEC, bits: int = 2,
        endian: int = 1) -> bytes:
    """An ELF file of these segments; nothing is checked here."""
    order = "<" if endian == 1 else ">"
    ident = b"\x7fELF" + bytes((bits, endian, 1)) + bytes(9)
    header = struct.pack(f"{order}16sHHI3QI6H", ident, kind, machine, 1, entry, 64, 0, 0, 64, 56, len(segments), 0, 0, 0)
    at, table, body = 64 + 56 * len(segments), b"", b""
    for each in segments:
        table += struct.pack(order + "IIQQQQQQ", each["type"], each["flags"], at + len(body), each["vaddr"], each["paddr"],
                             len(each["data"]), each["memsz"], 8)
        body += each["data"]
    return header + table + body


def dynamic(*tags: tuple[int, int]) -> dict[str, Any]:
    data = b"".join(struct.pack("<QQ", *tag) for tag in (*tags, (0, 0)))
    return segment(BASE + 0x8000, data, R | W, type=DYNAMIC)


@pytest.fixture
def put(tmp_path: Path) -> Any:
    def write(data: bytes, name: str = "guest.elf") -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name
    return write


def refused(path: Path | str) -> str:
    with pytest.raises(BadInput) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(path), "F")


# -- what is taken ---------------------------------------------------------------------------------------------------

def test_a_built_in_guest_by_name() -> None:
    image = load("hello")
    assert (image.name, image.entry, image.segments[0][0]) == ("hello", BASE, BASE)
    assert load("hello", base=0x4_0000_0000).segments[0][0] == 0x4_0000_0000


def test_a_flat_binary_lies_at_the_base(put: Any) -> None:
    path = put(b"\x1f\x20\x03\xd5" * 3, "guest.bin")
    assert load(path) == GuestImage([(BASE, b"\x1f\x20\x03\xd5" * 3)], BASE, str(path))
    assert load(str(path), base=0x1000).entry == 0x1000


def test_an_assembly_file_has_the_routines_of_the_guests(put: Any) -> None:
    image = load(put(b".word 0\n_start: bl enter\nb power_off\n", "mine.s"))
    assert image.entry == BASE + 4
    assert re.fullmatch(r"F:2: frob: no such instruction here", refused(put(b"_start: nop\nfrob\n", "bad.s")))
    assert refused(put(b"nop\n", "none.s")) == "F: there is no label _start"
    assert refused(put("_start: nop // \u00b5".encode(), "wide.s")) == "F: assembly has to be ASCII"


def test_a_static_executable(put: Any) -> None:
    path = put(elf(segment(BASE + 0x2000, b"data", R | W, memsz=0x1004), segment(BASE, b"code" * 2), entry=BASE + 4))
    image = load(path)
    assert image.segments == [(BASE, b"codecode"), (BASE + 0x2000, b"data")]
    assert image.zeros == [(BASE + 0x2004, 0x1000)]
    assert (image.entry, image.end, image.name) == (BASE + 4, BASE + 0x3004, str(path))


def test_physical_addresses_count(put: Any) -> None:
    image = load(put(elf(segment(0xffff_0000_0000_0000, b"code" * 4, paddr=BASE), entry=0xffff_0000_0000_0008)))
    assert (image.segments, image.entry) == ([(BASE, b"code" * 4)], BASE + 8)


def test_a_static_pie_is_moved_to_the_base(put: Any) -> None:
    path = put(elf(segment(0, b"code" * 4), segment(0x1000, b"more", R | W), dynamic((0x6fff_fffb, 0x0800_0000), (8, 0)),
                   entry=8, kind=DYN))
    image = load(path, base=0x9000_0000)
    assert (image.segments, image.entry) == ([(0x9000_0000, b"code" * 4), (0x9000_1000, b"more")], 0x9000_0008)


def test_a_segment_without_bytes_in_the_file(put: Any) -> None:
    image = load(put(elf(segment(BASE, b"code"), segment(BASE + 0x1000, b"", R | W, memsz=0x800))))
    assert image.ranges() == [(BASE, 4), (BASE + 0x1000, 0x800)]


# -- what is refused -------------------------------------------------------------------------------------------------

def test_files_that_are_none(tmp_path: Path, put: Any) -> None:
    assert refused(tmp_path / "missing.bin") == "F: No such file or directory"
    assert refused(tmp_path) == "F is a directory, not a guest image"
    assert refused(put(b"")) == "F is empty"
    with pytest.raises(UnknownName, match="unknown guest 'hallo'; did you mean 'hello'"):
        load("hallo")


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate((1 << 30) + 1)
    assert refused(tmp_path / "large") == "F: an image of 0x40000001 bytes; the limit is 0x40000000"


CODE = segment(BASE, b"code" * 4)
STATIC = "link it with -static -no-pie -Wl,-Ttext-segment=0x80000000"
HUGE = (1 << 64) - BASE + 1


@pytest.mark.parametrize(("data", "message"), [
    (elf(CODE, machine=X86_64), "F: an ELF for EM_X86_64; guests are EM_AARCH64"),
    (elf(CODE, machine=ARM), "F: an ELF for EM_ARM; guests are EM_AARCH64"),
    (elf(CODE, machine=0xbeef), "F: an ELF for 48879; guests are EM_AARCH64"),
    (elf(CODE, bits=1), "F: a 32-bit little-endian ELF; guests are 64-bit little-endian AArch64"),
    (elf(CODE, endian=2), "F: a 64-bit big-endian ELF; guests are 64-bit little-endian AArch64"),
    (elf(CODE, kind=REL), "F: an ELF of type ET_REL; a guest is a static ET_EXEC or a static PIE"),
    (elf(CODE)[:40], "F: the ELF header is truncated: 40 bytes of 64"),
    (elf(CODE)[:100], "F: the program headers are truncated"),
    (elf(CODE)[:-1], f"F: the segment at {BASE:#x} is truncated: its 0x10 bytes end beyond the file's 0x87"),
    (elf(), "F: there is no PT_LOAD segment, so nothing to run"),
    (elf(segment(BASE, b"", memsz=0)), "F: there is no PT_LOAD segment, so nothing to run"),
    (elf(CODE, segment(BASE + 8, b"x")), f"F: the segment at {BASE + 8:#x} overlaps the one before it"),
    (elf(segment(BASE, b"x" * 8, memsz=4)), f"F: the segment at {BASE:#x} has 0x8 bytes in the file and 0x4 in memory"),
    (elf(segment(BASE, b"x", memsz=HUGE)), f"F: the segment at {BASE:#x} of {HUGE:#x} bytes goes beyond the address space"),
    (elf(CODE, entry=BASE + 16), f"F: the entry {BASE + 16:#x} lies in no executable segment"),
    (elf(segment(BASE, b"data", R | W)), f"F: the entry {BASE:#x} lies in no executable segment"),
    (elf(CODE, segment(0, b"/lib/ld.so\0", type=INTERP)), "F: it wants an interpreter (PT_INTERP); link it with -static"),
    (elf(CODE, dynamic((8, 24))), "F: it has relocations, and no one here would link it; " + STATIC),
    (elf(CODE, dynamic((2, 24))), "F: it has relocations, and no one here would link it; " + STATIC),
    (elf(CODE, dynamic((1, 1), (5, BASE), (10, 8))),
     "F: it needs a shared library, and no one here would link it; " + STATIC),
], ids=range(20))
def test_elf_files_that_cannot_run(put: Any, data: bytes, message: str) -> None:
    assert refused(put(data)) == message


@settings(max_examples=200)
@given(at=some.integers(0, 199), byte=some.integers(0, 255), cut=some.integers(0, 200))
def test_a_damaged_file_is_loaded_or_refused(tmp_path_factory: pytest.TempPathFactory, at: int, byte: int, cut: int) -> None:
    data = bytearray(elf(CODE, dynamic((8, 0)), entry=BASE))
    data[at % len(data)] = byte
    path = tmp_path_factory.mktemp("elf") / "damaged"
    path.write_bytes(bytes(data[:max(1, len(data) - cut)]))
    with contextlib.suppress(BadInput):
        image = load(path)
        assert image.segments or image.zeros


def test_without_pyelftools_the_host_is_unavailable(put: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "elftools.elf.elffile", None)
    with pytest.raises(HostUnavailable, match=r"pip install -e '.\[emu\]'"):
        load(put(elf(CODE)))


def test_fits_names_the_segment(put: Any) -> None:
    image = load(put(elf(CODE, segment(BASE + 0x3000, b"data", R | W, memsz=0x1001))))
    fits(image, [(0, 0x1000), (BASE, 0x4001)])
    fits(image, [(BASE, 0x1000), (BASE + 0x3000, 0x1001)])
    with pytest.raises(BadInput) as caught:
        fits(image, [(BASE, 0x4000), (0x8_0000, 0x1000)])
    assert str(caught.value) == (f"{image.name}: the segment at {BASE + 0x3004:#x} of 0xffd bytes does not fit; "
                                 f"the guest has {BASE:#x}..{BASE + 0x4000:#x}, 0x80000..0x81000; an ELF file is "
                                 f"linked there with -Wl,-Ttext-segment={BASE:#x}")
    with pytest.raises(BadInput, match="the guest has nothing"):
        fits(image, [])
