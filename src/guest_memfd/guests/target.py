"""What code a guest has to be. That is: architecture, ELF machine, assembler, and where an image is put.

Assemblers are imported when something is assembled.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, NamedTuple

from guest_memfd.guests import PRIVATE_BASE

if TYPE_CHECKING:
    from guest_memfd.asm.assembler import Assembled


class Target(NamedTuple):
    """One kind of code: *architecture* as the kernel calls it, *title* for messages, *machine* of its ELF files.

    What has no address of its own is put at *base*. *machine* "": there is no ELF for it.
    """

    architecture: str
    title: str
    machine: str
    base: int

    def assemble(self, source: str, origin: int, name: str) -> Assembled:
        """*source* at *origin*; raises BadInput as ``name:line: what is wrong``."""
        module = importlib.import_module(f"guest_memfd.asm.{self.architecture}.asm")
        program: Assembled = module.assemble(source, origin, name)
        return program


ARM64 = Target("arm64", "AArch64", "EM_AARCH64", PRIVATE_BASE)
X86_64 = Target("x86_64", "x86-64", "EM_X86_64", PRIVATE_BASE)
REAL_MODE = Target("x86_64", "real-mode x86", "", 0x7C00)
"""Where a PC's firmware puts a boot sector."""
