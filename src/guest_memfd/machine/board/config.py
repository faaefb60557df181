"""How a machine is built: its size, its kernel, and what goes wrong on purpose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from guest_memfd.machine.el2.gunyah.el2 import InjectKind

OnFree = Literal["poison", "zero", "nothing"]


@dataclass(frozen=True)
class Config:
    """How a machine is built.

    ram: bytes. release, rodata, bbml3, tlb_range: the kernel, its command line and the CPU, as `LinearMap` takes them; with
    rodata ``noalias`` or ``off`` nothing can change the direct map. on_free: what the kernel does to a page when it is
    freed. scattered: that many single frames are all that guest_memfd can have, *apart* pages from one to the next; 0:
    whatever is free. blocks: that many blocks of 2 MiB are, side by side, of each half of which page *spot* is watched.
    cpus: how many TLBs. inject: what Gunyah makes of a host access to a page it withholds, ``sea`` or,
    as some reviewers asked for, ``fixable``. kvm_release, kvm_architecture: whose answers /dev/kvm gives
    (dev/kvm/release.py); its guests stay arm64's.
    """

    ram: int = 1 << 30
    release: str = "7.3"
    rodata: str = "full"
    bbml3: bool = False
    tlb_range: bool = True
    on_free: OnFree = "zero"
    scattered: int = 0
    blocks: int = 0
    spot: int = 1
    apart: int = 2
    cpus: int = 3
    sea_fixup: bool = False
    inject: InjectKind = "sea"
    kvm_release: str = "7.4"
    kvm_architecture: str = "arm64"
    slice: float = 5.0
