"""The scenes that are explored, and what each is there to see.

Rule of this file: a scene that adds nothing is removed.
"""

from __future__ import annotations

from guest_memfd.words.scene import Kernel, Scene, Slot
from guest_memfd.words.units import Gfn, Index

SCENES: dict[str, Scene] = {scene.name: scene for scene in (
    Scene(),
    Scene("crossed", "gfns are no page indexes, and one gfn has no page",
          pages=2, shared=(1,), slots=(Slot(Gfn(2), Index(0), 1), Slot(Gfn(1), Index(1), 1))),
    Scene("both-private", "a whole batch of private pages, and a frame too few",
          frames=2, shared=()),
    Scene("both-shared", "a whole batch of shared pages, allocated before anybody begins",
          shared=(0, 1), populated=True),
    Scene("unbound", "one page is bound, one is not",
          slots=(Slot(Gfn(0), Index(0), 1),)),
    Scene("nothing-yet", "the file is made and bound while others run",
          made=False),
    Scene("for-good", "the hypervisor refuses for good to give a page back",
          refusals=1, failures=0),
    Scene("no-direct-map-changes", "a kernel whose direct map cannot be changed",
          kernel=Kernel(changes_direct_map=False)),
    Scene("quiet-free", "a kernel that does not write to a page when it is freed, and merges leaves",
          kernel=Kernel(init_on_free=False, merges_leaves=True)),
    Scene("three-pages", "a shared page between two private ones",
          pages=3, shared=(1,), slots=(Slot(Gfn(0), Index(0), 3),)),
    Scene("failing-twice", "what fails, fails again, where leaves are merged and have to be split",
          pages=1, frames=2, shared=(), slots=(Slot(Gfn(0), Index(0), 1),),
          kernel=Kernel(init_on_free=False, merges_leaves=True), failures=2),
    Scene("on-demand", "a driver that can lends a page when its guest asks for it, each page bound by itself",
          shared=(0, 1), slots=(Slot(Gfn(0), Index(0), 1), Slot(Gfn(1), Index(1), 1)), refusals=1, lends=True),
    Scene("two-vms", "two VMs, each with a file of its own",
          pages=1, shared=(), slots=(Slot(Gfn(0), Index(0), 1),), files=2, vms=2, failures=0),
    Scene("large-folio", "a private folio of two pages, in leaves of that size",
          frames=4, shared=(), order=1),
    Scene("two-large-folios", "two of them in one binding",
          pages=4, frames=6, shared=(), slots=(Slot(Gfn(0), Index(0), 4),), order=1),
    Scene("large-beside-small", "a large folio, and beside it a private page and a shared one",
          pages=4, frames=4, shared=(3,), slots=(Slot(Gfn(0), Index(0), 4),), order=1),
    Scene("mixed-block", "a private page and a shared one that can become one folio, and no memory besides",
          frames=2, order=1),
    Scene("half-bound", "of a large folio that has been allocated one page is bound",
          frames=4, shared=(), slots=(Slot(Gfn(0), Index(1), 1),), order=1),
    Scene("odd-gfn", "a large folio is bound at a gfn that is no multiple of its size",
          frames=4, shared=(), slots=(Slot(Gfn(1), Index(0), 2),), order=1),
    Scene("large-for-good", "the hypervisor refuses for good to give a part of a large folio back",
          frames=4, shared=(), refusals=1, failures=0, order=1),
    Scene("larger-leaves", "folios of four pages, in leaves of four, two, and one",
          pages=4, frames=4, shared=(), slots=(Slot(Gfn(0), Index(0), 4),), order=2),
)}
