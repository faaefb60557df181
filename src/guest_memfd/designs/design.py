"""What a design is to a scenario: a library that may differ from ours, and the kernel it was posted for."""

from __future__ import annotations

from collections.abc import Mapping
from errno import EOPNOTSUPP
from typing import ClassVar

from guest_memfd.core import Library
from guest_memfd.core.gmem import Conversion
from guest_memfd.core.hypervisor import LendingDriver
from guest_memfd.words.primitives import Bound, Steps
from guest_memfd.words.scene import Scene
from guest_memfd.words.units import Index

OPERATIONS = (
    "create", "bind", "unbind", "guest_fault", "user_fault", "allocate", "punch_hole", "make_private", "make_shared", "mmap",
    "munmap", "close", "evict", "vm_teardown", "error_folio", "hibernate_prepare", "hibernate_post",
)
"""What a VMM, a guest and the kernel ask a design for."""


class Design(Library):
    """Base of all designs. A posted design overrides what it does differently, and nothing else."""

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    sea_fixup: ClassVar[bool] = False
    """Whether this design's kernel lets do_sea() consult the exception table."""
    gup: ClassVar[bool] = True
    """Whether pages the VMM has mapped may be taken by GUP at all (secretmem refuses)."""
    hypervisors: ClassVar[tuple[str, ...] | None] = None
    """Names of the hypervisors it was posted for; None: any."""
    large: ClassVar[bool] = False
    """Whether it takes the largest folios that its scene has, and splits them, if the hypervisor's operations take them."""
    converts: ClassVar[bool] = True
    """Whether it converts in place; where it does not, make_private and make_shared are -EOPNOTSUPP."""
    offers: ClassVar[tuple[str, ...]] = ()
    """Names of its own that neither it nor the library calls, but a party of the same plugin does."""
    promises: ClassVar[tuple[str, ...]] = ()
    """What it says that it keeps, of the laws that are judged of no one who does not say so (`Law.promised`)."""
    keeps: ClassVar[Mapping[str, str]] = {}
    """Of a posted design: which of OPERATIONS are our library's, and why that does it no wrong."""
    bounds: ClassVar[Mapping[str, Bound]] = {
        "fault": Bound(writes=1, flushes=1, calls=2, stalls=0, splits=3), "user_fault": Bound(writes=2, stalls=0),
        "allocate": Bound(stalls=0), "to_private": Bound(writes=1, calls=4, once=1, stalls=2, splits=2),
        "to_shared": Bound(calls=4, splits=3), "punch": Bound(writes=2, calls=4, splits=3),
        "unbind": Bound(calls=4, splits=3), "teardown": Bound(calls=4, splits=3),
    }
    """What an operation costs at most, each of its hypercalls made twice where the first fails (law bounded-cost). One that
    is not here is not bounded."""
    errnos: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    """Operation -> errno values that its documentation names on top of the library's."""
    resumes: ClassVar[tuple[str, ...]] = ()
    """Conversions that, refused, have done what lies before the page that they name, and nothing from there on: the same
    request may be made again from that page. Those that are not here are done as a whole, or not at all."""
    lender: LendingDriver | None = None
    """The driver that decides when pages are lent and taken back; None where user space does, by conversions."""
    scene: Scene = Scene()
    """The scene it is put in; parties ask it for gfns, ranges and frames."""

    @property
    def born_shared(self) -> tuple[int, ...]:
        """Pages that start out shared: what a binding's FORCE_SHARE says where there are no attributes."""
        return self.scene.shared


class NoConversion:
    """Beside `Design`: a posted design in which a page stays private or shared as it began."""

    converts: ClassVar[bool] = False

    def make_private(self, start: Index, nr: int) -> Steps[Conversion]:
        """-EOPNOTSUPP: there is no conversion by range."""
        yield from ()
        return Conversion(-EOPNOTSUPP)

    def make_shared(self, start: Index, nr: int) -> Steps[Conversion]:
        """-EOPNOTSUPP: there is no conversion by range."""
        yield from ()
        return Conversion(-EOPNOTSUPP)


class NoAttributes(NoConversion):
    """Without attributes, too: a page is lent or shared for the life of its binding."""

    def init_attributes(self, size: int, shared: tuple[int, ...]) -> Steps[int]:
        """There is no attribute tree, and so nothing to fail."""
        yield from ()
        return 0
