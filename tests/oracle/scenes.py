"""Random translation regimes: registers, tables in memory, and addresses worth asking about.

Tables are written here by hand, entry by entry, and not by the package's own table builder. What the other side is known
not to have (level-0 blocks, reserved sizes) is not generated; *address_size* adds output addresses beyond IPS and PS.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from guest_memfd.machine.hw.arm64.granule import K4, K16, K64, Granule
from guest_memfd.machine.hw.arm64.registers import CpuFeatures, Tcr, Vtcr
from guest_memfd.machine.hw.arm64.walk import Stage1, Stage2
from guest_memfd.machine.hw.ram import Ram

RAM = 64 << 20
CODE = 0x1000
TABLES, TABLES_END = 1 << 20, 24 << 20
AF, SH, FULL = 1 << 10, 3 << 8, 3 << 6
VA_BITS = {K4: (48, 39, 36, 30, 42), K16: (47, 36, 48, 40), K64: (48, 42, 39)}
IPA_BITS = {K4: (40, 36, 39, 34, 43, 32), K16: (40, 36, 42, 33), K64: (40, 36, 42, 34)}
NO_XNX = CpuFeatures(xnx=False)


def start_levels(granule: Granule, ia_bits: int) -> list[int]:
    """Every first level that SL0 can name for this size."""
    found = []
    for level in ((0, 1, 2) if granule is K4 else (1, 2, 3)):
        least = (3 - level) * granule.stride + granule.shift + 1
        if least <= ia_bits <= least + granule.stride + 3:
            found.append(level)
    return found


@dataclass
class Tree:
    """One set of tables."""

    granule: Granule
    bits: int
    start: int
    root: int


@dataclass
class Scene:
    ram: Ram
    rnd: random.Random
    s1: Stage1
    s2: Stage2 | None
    hints: list[tuple[int, int]] = field(default_factory=list)
    free: int = TABLES
    marks: bool = True

    def registers(self) -> dict[str, int]:
        """SCTLR_EL1 has nTWI: Unicorn ends a run with a WFI of its own, which must not trap at EL0."""
        s2 = self.s2
        return {"TCR_EL1": self.s1.tcr.value, "TTBR0_EL1": self.s1.ttbr0, "TTBR1_EL1": self.s1.ttbr1,
                "MAIR_EL1": self.s1.mair, "SCTLR_EL1": 0x30d50800 | self.s1.enabled | self.s1.wxn << 19,
                "VTCR_EL2": s2.vtcr.value if s2 else 0, "VTTBR_EL2": s2.vttbr if s2 else 0,
                "HCR_EL2": 1 << 31 | (s2 is not None)}

    def alloc(self, size: int) -> int:
        at = -(-self.free // size) * size
        if at + size > TABLES_END:
            raise MemoryError
        self.free = at + size
        return at

    def place(self, tree: Tree, ia: int, level: int, value: int, table_bits: int = 0) -> bool:
        """Store *value* as the entry of *ia* at *level*, with tables down to it; False if a leaf is in the way."""
        g, table = tree.granule, tree.root
        for at in range(tree.start, level + 1):
            number = (ia & (1 << tree.bits) - 1) >> g.level_shift(at)
            slot = table + 8 * (number if at == tree.start else number & g.table_entries - 1)
            old = self.ram.read64(slot)
            if at == level:
                if old & 3 == 3 and level < 3:
                    return False
                self.ram.write64(slot, value)
                return True
            if old & 3 != 3:
                if old:
                    return False
                old = self.alloc(g.size) | 3 | table_bits
                self.ram.write64(slot, old)
            table = old & (1 << 48) - g.size
        raise AssertionError

    def vas(self, count: int) -> list[int]:
        rnd, hints = self.rnd, self.hints
        found = []
        for _ in range(count):
            va, shift = hints[int(rnd.random() * len(hints))]
            va += rnd.getrandbits(min(shift, 30)) & ~7
            if rnd.random() < .15:
                va ^= 1 << int(rnd.random() * 61) + 3
            found.append(va & (1 << 64) - 1)
        return found


def make(seed: int, ram: Ram, *, address_size: float = 0.0, code: bool = False, stage2: bool | None = None,
         marks: bool = True) -> Scene:
    """A regime with everything in *ram*, which starts at 0 and is cleared below TABLES_END.

    *code*: keep TTBR0 for one executable page at CODE, so that instructions can be executed at EL1. *marks*: set the
    contiguous bit here and there, although the run is none (only a TLB would notice).
    """
    rnd = random.Random(seed)
    ram.zero(TABLES, TABLES_END - TABLES)
    g0, g1 = (K4, rnd.choice((K4, K4, K16, K64))) if code else (rnd.choice((K4, K4, K16, K64)) for _ in "01")
    bits0, bits1 = 39 if code else rnd.choice(VA_BITS[g0]), rnd.choice(VA_BITS[g1])
    scene = Scene(ram, rnd, None, None, marks=marks)  # type: ignore[arg-type]
    low, high = (Tree(g, bits, g.start_level(bits), scene.alloc(g.size)) for g, bits in ((g0, bits0), (g1, bits1)))
    tcr = Tcr(t0sz=64 - bits0, t1sz=64 - bits1, tg0=g0, tg1=g1, ips=2, tbi0=rnd.getrandbits(1), tbi1=rnd.getrandbits(1),
              a1=rnd.getrandbits(1), epd0=int(not code and rnd.random() < .05), epd1=int(rnd.random() < .05))
    scene.s1 = Stage1(tcr, low.root | 3 << 48, high.root | 4 << 48, 0x44ff, wxn=rnd.random() < .2, features=NO_XNX)
    second = None
    if stage2 if stage2 is not None else rnd.random() < .85:
        second = _stage2(scene)
    outputs = [_mapping(scene, high if code or rnd.random() < .5 else low, high, second, address_size) for _ in range(24)]
    if code:
        scene.place(low, CODE, 3, CODE | AF | SH | 2 << 6 | 3)
    if second is not None:
        _fill_stage2(scene, second, [o for o in outputs if o is not None], address_size)
    return scene


def _stage2(scene: Scene) -> Tree:
    rnd = scene.rnd
    granule = rnd.choice((K4, K4, K16, K64))
    bits = rnd.choice(IPA_BITS[granule])
    start = rnd.choice(start_levels(granule, bits))
    concatenated = max(0, bits - granule.level_shift(start) - granule.stride)
    tree = Tree(granule, bits, start, scene.alloc(granule.size << concatenated))
    sl0 = {K4: (2, 1, 0), K16: (3, 2, 1, 0), K64: (3, 2, 1, 0)}[granule][start]
    scene.s2 = Stage2(Vtcr(t0sz=64 - bits, sl0=sl0, tg0=granule, ps=2, vs=0), tree.root | 7 << 48, features=NO_XNX)
    return tree


# One stage-1 leaf somewhere; where it leads and how large it is.
def _mapping(scene: Scene, tree: Tree, high: Tree, second: Tree | None, address_size: float) -> tuple[int, int] | None:
    rnd, g = scene.rnd, tree.granule
    level = rnd.choice([at for at in (3, 3, 3, 2, 2, 1) if at >= tree.start and (at == 3 or g.block_legal(at))])
    shift = g.level_shift(level)
    va = rnd.getrandbits(tree.bits) & -(1 << shift)
    if scene.hints and rnd.random() < .3:       # close to another one: tables are shared
        va = (rnd.choice(scene.hints)[0] ^ rnd.getrandbits(4) << shift) & (1 << tree.bits) - (1 << shift)
    oa = rnd.randrange(TABLES_END, RAM)
    if second is not None and rnd.random() < .2:
        oa = rnd.getrandbits(min(second.bits + 1, 40))
    if rnd.random() < address_size:
        oa |= 1 << rnd.choice((40, 45, 47))
    oa &= -(1 << shift) & (1 << 48) - 1
    value = oa | SH | (AF if rnd.random() < .94 else 0) | rnd.getrandbits(2) << 6 | rnd.getrandbits(1) << 11 \
        | rnd.choice((0, 0, 1, 2, 3)) << 53 | (scene.marks and rnd.random() < .2) << 52 | (3 if level == 3 else 1)
    if rnd.random() < .05:
        value &= ~rnd.randrange(1, 3)           # invalid, or reserved at level 3
    hierarchical = rnd.choice((0, 0, 0, 0, 1, 2, 3)) << 61 | rnd.choice((0, 0, 0, 1, 2)) << 59
    try:
        if not scene.place(tree, va, level, value, hierarchical):
            return None
    except MemoryError:
        return None
    sign = (1 << 64) - (1 << tree.bits) if tree is high else 0
    scene.hints.append((va | sign, shift))
    return oa, shift


# Stage 2: the tables of stage 1 nearly all readable, and pieces of what stage 1 leads to.
def _fill_stage2(scene: Scene, tree: Tree, outputs: list[tuple[int, int]], address_size: float) -> None:
    rnd, g = scene.rnd, tree.granule
    page = g.size
    reachable = SH | 0xf << 2 | 3
    scene.place(tree, CODE, 3, CODE & -page | reachable | AF | FULL)
    for ia in range(TABLES, scene.free + (64 << 10), page):
        if (luck := rnd.random()) < .97:
            bits = AF | FULL if luck < .94 else rnd.choice((AF, 0)) | rnd.getrandbits(2) << 6
            scene.place(tree, ia, 3, ia | reachable | bits)
    for oa, shift in outputs:
        for _ in range(3):
            ia = (oa + rnd.getrandbits(min(shift, 24))) & (1 << tree.bits) - 1
            level = rnd.choice([at for at in (3, 3, 2) if at >= tree.start and (at == 3 or g.block_legal(at))])
            size = 1 << g.level_shift(level)
            pa = rnd.randrange(RAM) & -size | (1 << rnd.choice((41, 44)) if rnd.random() < address_size else 0)
            value = pa & -size | SH | 0xf << 2 | (AF if rnd.random() < .93 else 0) | rnd.choice((3, 3, 3, 3, 1, 2, 0)) << 6 \
                | rnd.choice((0, 0, 0, 2, 1, 3)) << 53 | (scene.marks and rnd.random() < .2) << 52 | (3 if level == 3 else 1)
            try:
                scene.place(tree, ia, level, value)
            except MemoryError:
                return
