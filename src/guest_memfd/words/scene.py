"""What a scene is: the world before the parties begin. Sizes, which page is shared, bindings, what this kernel can do.

A scene is data. What it means is the abstract host's to say; scenarios/scenes.py has those that are explored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

from guest_memfd.errors import BadInput
from guest_memfd.words.pagestate import PRIVATE_PAGE, SHARED_PAGE
from guest_memfd.words.units import FIRST_PAGE, Gfn, Index, span

MOST = {"pages": 4, "frames": 6, "files": 2, "vms": 2, "failures": 255, "refusals": 255, "order": 2}
"""Largest sizes of a scene."""

MOST_GFNS = 8


_KINDS = {"int": int, "Gfn": int, "Index": int, "bool": bool, "str": str}


# A scene may come from a file, where a number may be anything.
def _typed(thing: Slot | Kernel | Scene) -> None:
    for each in fields(thing):
        kind, value = _KINDS.get(str(each.type)), getattr(thing, each.name)
        if kind is not None and type(value) is not kind:
            whose = type(thing).__name__.lower()
            raise BadInput(f"{each.name!r} of a {whose} must be of type {kind.__name__}, not {value!r}")


@dataclass(frozen=True)
class Slot:
    """A memslot: gfns [gfn, gfn+nr) are pages [start, start+nr) of the file."""

    gfn: Gfn
    start: Index
    nr: int

    def __post_init__(self) -> None:
        _typed(self)
        if not 1 <= self.nr <= MOST["pages"]:
            raise BadInput(f"a slot has 1 to {MOST['pages']} pages, not {self.nr}")

    def index(self, gfn: Gfn) -> Index | None:
        """The page index of *gfn*, None if the slot does not have it."""
        return self.start + (gfn - self.gfn) if self.gfn <= gfn < self.gfn + self.nr else None


@dataclass(frozen=True)
class Kernel:
    """What the kernel of a scene can do.

    changes_direct_map: can_set_direct_map(). Where it is False (arm64, rodata=noalias) the setters do nothing and say 0.
    merges_leaves: makes large direct-map leaves of small ones again, so that restoring a page may have to split one.
    init_on_free: writes to a page when it is freed, through the direct map (init_on_free, page poisoning, KASAN).
    asks_mapping: readers of page-cache folios ask AS_NO_DIRECT_MAP first.
    """

    changes_direct_map: bool = True
    merges_leaves: bool = False
    init_on_free: bool = True
    asks_mapping: bool = True

    def __post_init__(self) -> None:
        _typed(self)


@dataclass(frozen=True)
class Scene:
    """The world before the parties begin.

    pages: of each file. frames: that there are for all of them. shared: pages that start out shared, in every file.
    slots: what is bound before anybody starts, in every file (file n belongs to VM n).
    failures, refusals: how many injected failures, and how many refusals for good, one run may have.
    made: whether the file exists when the parties begin; if not, someone has to create and bind it.
    populated: whether all its pages have been allocated by then.
    order: of the largest folio, and of the leaves that map memory at first: 1 stands for 2 MiB where 0 stands for 4 KiB.
    lends: whether the hypervisor's driver, if it is one that can, decides which pages are lent; user space converts none.

    Raises BadInput for a scene that cannot be.
    """

    name: str = "two-pages"
    title: str = "a private page and a shared one, gfn i bound to page i"
    pages: int = 2
    frames: int = 3
    shared: tuple[int, ...] = (1,)
    slots: tuple[Slot, ...] = (Slot(Gfn(0), Index(0), 2),)
    kernel: Kernel = field(default_factory=Kernel)
    failures: int = 1
    refusals: int = 0
    files: int = 1
    vms: int = 1
    made: bool = True
    populated: bool = False
    lends: bool = False
    order: int = 0

    def __post_init__(self) -> None:
        for what, most in MOST.items():
            number = getattr(self, what)
            least = 0 if what in ("failures", "refusals", "order") else 1
            if type(number) is not int or not least <= number <= most:
                raise BadInput(f"scene {self.name!r}: {what} must be {least} to {most}, not {number!r}")
        _typed(self)
        if self.frames % (1 << self.order):
            raise BadInput(f"scene {self.name!r}: {self.frames} frames are no whole number of folios of order {self.order}")
        if self.populated and (not self.made or self.files * self.pages > self.frames):
            raise BadInput(f"scene {self.name!r}: {self.files * self.pages} pages of files that are there have to fit "
                           f"into {self.frames} frames to be populated")
        if self.vms != self.files:
            raise BadInput(f"scene {self.name!r}: {self.vms} VMs need as many files, not {self.files}: each VM has one, and "
                           "two of one VM would be bound to the same gfns")
        for index in self.shared:
            if type(index) is not int or not 0 <= index < self.pages:
                raise BadInput(f"scene {self.name!r}: page {index!r} cannot be shared, the file has {self.pages} pages")
        bound = [index for slot in self.slots for index in span(slot.start, slot.nr)]
        if len(set(bound)) < len(bound) or any(not 0 <= index < self.pages for index in bound):
            raise BadInput(f"scene {self.name!r}: its slots bind pages {bound} of a file of {self.pages} pages")
        gfns = [gfn for slot in self.slots for gfn in span(slot.gfn, slot.nr)]
        if len(set(gfns)) < len(gfns) or any(not 0 <= gfn < MOST_GFNS - 1 for gfn in gfns):
            raise BadInput(f"scene {self.name!r}: its slots have gfns {gfns}; they must be below {MOST_GFNS - 1}, each once")

    @property
    def attributes(self) -> tuple[int, ...]:
        """The attribute that each page starts out with."""
        return tuple(SHARED_PAGE if index in self.shared else PRIVATE_PAGE for index in range(self.pages))

    @property
    def gfns(self) -> tuple[Gfn, ...]:
        """The gfns that have a page of the file, in order."""
        return tuple(sorted(gfn for slot in self.slots for gfn in span(slot.gfn, slot.nr)))

    @property
    def beyond(self) -> Gfn:
        """The first gfn above all slots: no page is bound to it."""
        return max(self.gfns, default=Gfn(-1)) + 1

    def gfn(self, index: Index) -> Gfn:
        """Where a VMM binds a range that begins with page *index*: where its slot has it, or above all slots."""
        slot = self.slot_of(index)
        return self.beyond if slot is None else slot.gfn + (index - slot.start)

    @property
    def guest_frames(self) -> int:
        """How many gfns a VM needs to have: up to the last that a VMM binds, and one that no slot has."""
        return max(self.beyond + 1, *(self.gfn(start) + nr for start, nr in self.ranges))

    def index(self, gfn: Gfn) -> Index | None:
        """The page index that *gfn* is bound to when the parties begin, None for a gfn without a slot."""
        return next((index for slot in self.slots if (index := slot.index(gfn)) is not None), None)

    def slot_of(self, index: Index) -> Slot | None:
        """The slot that binds page *index*."""
        return next((slot for slot in self.slots if slot.start <= index < slot.start + slot.nr), None)

    @property
    def ranges(self) -> tuple[tuple[Index, int], ...]:
        """Ranges that a VMM asks for: (first page, length) of the first page, the last, and all of them.

        Where two large folios are there, also of what lies between first and last page: it has a part of both.
        """
        all_of_it = [(FIRST_PAGE, 1), (FIRST_PAGE + self.pages - 1, 1), (FIRST_PAGE, self.pages)]
        if self.order and self.pages > 1 << self.order:
            all_of_it.append((FIRST_PAGE + 1, self.pages - 2))
        return tuple(dict.fromkeys(all_of_it))

    def differences(self) -> Iterator[str]:
        """In words, where it differs from the plainest scene."""
        usual = Scene()
        for name in ("pages", "frames", "shared", "slots", "failures", "refusals", "files", "vms", "made",
                     "populated", "lends", "order"):
            if getattr(self, name) != getattr(usual, name):
                yield f"{name} {getattr(self, name)}"
        for name, value in vars(self.kernel).items():
            if value != getattr(usual.kernel, name):
                yield f"{name} {value}"
