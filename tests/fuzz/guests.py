"""Guest images in which bytes have changed: loaded as what they still are, or refused in a line."""

from __future__ import annotations

import random

from test_loader import BASE, CODE, dynamic, elf

from fuzz.kind import Kind
from guest_memfd.errors import BadInput
from guest_memfd.guests.loader import GuestSource, load
from guest_memfd.guests.target import ARM64, X86_64

TEXT = b"start: mov x0, #1\n        str x0, [x1, #8]!\n        b start\n.align 4\n.quad start, 7\n.ascii \"text\"\n"
LONGEST = 400


class Guests(Kind):
    """`load` of an ELF file, a flat binary or a file of assembly."""

    name = "guests"

    def try_one(self, choose: random.Random, said: list[str]) -> str | None:
        """Loads, or BadInput of a line."""
        name, data = choose.choice((("elf", elf(CODE, dynamic((8, 0)), entry=BASE)), ("elf", elf(CODE)), ("asm.s", TEXT),
                                    ("flat", choose.randbytes(64))))
        changed = bytearray(data)
        for _ in range(choose.randrange(6)):
            at = choose.randrange(len(changed))
            changed[at:at + choose.choice((1, 1, 1, 4, 8))] = choose.choice((
                choose.randbytes(1), b"\xff" * choose.choice((1, 4, 8)), b"\0" * 8, b"", bytes([changed[at] ^ 1])))
            if not changed:
                break
        said.append(f"{name}: {bytes(changed).hex()}")
        try:
            image = load(GuestSource(name, bytes(changed)), choose.choice((ARM64, X86_64)))
        except BadInput as error:
            words = str(error)
            return f"an error of {len(words)} characters" if len(words) > LONGEST or "\n" in words else None
        return None if image.segments or image.zeros else "an image of nothing"
