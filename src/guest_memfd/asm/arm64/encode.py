"""Instructions to words. One operand syntax has one encoding. What does not fit is refused and never changed to fit.

The encodings are in encode_data.py, encode_memory.py and encode_system.py; asm.py reads lines and calls `encode`.
"""

from __future__ import annotations

from guest_memfd.asm.arm64.encode_data import DATA, move
from guest_memfd.asm.arm64.encode_memory import MEMORY
from guest_memfd.asm.arm64.encode_system import SYSTEM
from guest_memfd.asm.arm64.operand import Value

_ENCODERS = DATA | MEMORY | SYSTEM


def known(mnemonic: str) -> bool:
    """Whether there is such an instruction here."""
    return mnemonic in _ENCODERS or mnemonic == "mov"


def encode(mnemonic: str, operands: list[str], at: int, value: Value) -> list[int]:
    """The words of one instruction at address *at*; *value* evaluates expressions. Only MOV gives more than one.

    Raises Malformed.
    """
    if mnemonic == "mov":
        return move(operands, value)
    return [_ENCODERS[mnemonic](operands, at, value)]
