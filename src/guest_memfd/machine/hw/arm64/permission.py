"""Who may do what. Descriptors go in, a set of permitted accesses comes out.

A set is six bits, EL1's read, write and execute and then EL0's. AArch64.S1DirectBasePermissions and
AArch64.S2DirectBasePermissions of the Arm ARM. Out: permission indirection and overlays, EPAN.
"""

from __future__ import annotations

from typing import Literal

from guest_memfd.machine.hw.arm64.descriptor import PXN_TABLE, UXN_TABLE

Access = Literal["r", "w", "x"]

R1, W1, X1, R0, W0, X0 = (1 << bit for bit in range(6))
ALL = 63
BITS: dict[tuple[int, str], int] = {
    (1, "r"): R1, (1, "w"): W1, (1, "x"): X1, (0, "r"): R0, (0, "w"): W0, (0, "x"): X0}
"""The bit that *access* from *el* needs."""

_AP = (R1 | W1, R1 | W1 | R0 | W0, R1, R1 | R0)
_APTABLE = (ALL, ~(R0 | W0), ~(W1 | W0), ~(R0 | W0 | W1))
# XN[1:0] with FEAT_XNX; without it only bit 1 counts.
_XN = (X1 | X0, X0, 0, X1)


def _stage1(ap: int, ap_table: int, pxn: int, uxn: int, wxn: int) -> int:
    may = _AP[ap] & _APTABLE[ap_table]
    # What EL0 can write, EL1 must not execute: PXN is implied.
    if not (pxn or may & W0 or (wxn and may & W1)):
        may |= X1
    if not (uxn or (wxn and may & W0)):
        may |= X0
    return may


# Index: AP, APTable, PXN, UXN and WXN, from bit 0 on.
_STAGE1 = tuple(_stage1(i & 3, i >> 2 & 3, i >> 4 & 1, i >> 5 & 1, i >> 6) for i in range(128))


def stage1(value: int, tables: int, wxn: bool) -> int:
    """What a leaf permits below tables whose hierarchical bits, ORed, are in *tables*; PAN is not in it.

    What EL0 may write, EL1 does not execute. *wxn* is SCTLR_EL1.WXN.
    """
    return _STAGE1[value >> 6 & 3 | tables >> 59 & 12 | (value >> 53 & 3 | tables >> 59 & 3) << 4 | wxn << 6]


def stage2(value: int, xnx: bool) -> int:
    """What a stage-2 leaf permits."""
    s2ap = value >> 6 & 3
    return s2ap | s2ap << 3 | _XN[value >> 53 & 3 if xnx else value >> 53 & 2]


def denied_by_pan(may: int, access: str, el: int) -> bool:
    """Whether PSTATE.PAN refuses a data access from EL1 because EL0 has data access of its own."""
    return el == 1 and access != "x" and bool(may & (R0 | W0))


assert PXN_TABLE >> 59 == 1
assert UXN_TABLE >> 59 == 2
