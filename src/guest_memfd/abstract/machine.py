"""The abstract host: how a primitive is carried out on a state, all its possible ends, and who has to wait.

One method per primitive, spread over the mixins by subject; this file owns what they have in common: injected
failures, refusals for good, frozen tasks, objects whose memory and code whose module is gone, and the panic that ends
everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from errno import EAGAIN, ENOMEM
from typing import TYPE_CHECKING, Any

from guest_memfd.abstract import state as st
from guest_memfd.abstract.base import Panicked
from guest_memfd.abstract.guest import AbstractGuestSide
from guest_memfd.abstract.locks import AbstractLocks
from guest_memfd.abstract.mappings import AbstractMappings
from guest_memfd.abstract.pagecache import AbstractPageCache
from guest_memfd.abstract.world import AbstractWorld
from guest_memfd.errors import BadInput
from guest_memfd.words import facts
from guest_memfd.words.outcome import Blocked, Outcome
from guest_memfd.words.pagestate import DESTROYED, EVICTED, FAILURE, FOR_GOOD, JUNK, MANY
from guest_memfd.words.primitives import Bound, Primitive
from guest_memfd.words.units import FIRST_PAGE, span

if TYPE_CHECKING:
    from guest_memfd.core.hypervisor import Hypervisor
    from guest_memfd.words.scene import Scene

FALLIBLE = {
    "filemap_add_folio": -ENOMEM,
    "filemap_add_pages": -ENOMEM,
    "filemap_alloc_folio": -ENOMEM,
    "filemap_insert_folio": -ENOMEM,
    "split_folio": -ENOMEM,
    "split_direct_map": -ENOMEM,
    "set_direct_map_invalid_noflush": -ENOMEM,
    "tree_store": -ENOMEM,
    "tree_reserve": -ENOMEM,
    "mmap": -ENOMEM,
    "alloc_inode": -ENOMEM,
}
"""Primitives that can fail for want of memory, and what they return then."""

OF_LEAVES = frozenset({"split_direct_map", "set_direct_map_invalid_noflush", "set_direct_map_default_noflush"})
"""Those of them that take memory only where a leaf has to be split."""

OF_INODE = frozenset({
    "filemap_get_folio", "filemap_find_folio", "filemap_add_folio", "filemap_add_pages", "filemap_insert_folio",
    "filemap_remove_folio", "split_folio", "merge_folio", "unmap_mapping_pages", "vmf_insert_folio", "destroy_inode", "iput",
    "mapping_set_no_direct_map", "mapping_no_direct_map",
})
"""Primitives that work on the inode: it has to be there."""

OF_INODE_BY_NAME = frozenset({
    "down_read", "down_read_trylock", "up_read", "down_write", "up_write", "tree_load", "tree_store", "tree_store_reserved",
    "tree_reserve", "tree_release",
})
"""Primitives that work on it if the lock or the tree they name is the inode's: a driver keeps its own in its VM."""


class AbstractHost(AbstractLocks, AbstractMappings, AbstractPageCache, AbstractGuestSide, AbstractWorld):
    """A `explore.engine.program.ExploredHost` with the fields of `state`: the host of *scene* under *hypervisor*.

    parties: how many party numbers there are. tasks: those of parties that are tasks and can be frozen.
    sea_fixup: whether do_sea() consults the exception table (the design `fixup` changes that).
    bounds, errnos: operation -> what the design says that it costs at most, and may return. resumes: operations that it
    says can be resumed.
    """

    footprints = True
    foreign = ""
    """Whose hypervisor it is, in words, if any of its code is a third party's."""

    def __init__(
        self, hypervisor: Hypervisor, scene: Scene, parties: int, *, sea_fixup: bool = False,
        tasks: frozenset[int] = frozenset(), bounds: Mapping[str, Bound] | None = None,
        errnos: Mapping[str, tuple[int, ...]] | None = None, resumes: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.hypervisor, self.scene, self.kernel = hypervisor, scene, scene.kernel
        self.sea_fixup, self.tasks = sea_fixup, tasks
        self.bounds, self.errnos, self.resumes = bounds or {}, errnos or {}, resumes
        self.sizes = st.Sizes(scene.frames, scene.pages, scene.guest_frames, scene.files, scene.vms, parties,
                              scene.order)
        self.indexes = span(FIRST_PAGE, scene.pages)
        # Where there are large leaves it can be seen whether an entry is part of one; else it may be.
        unseen = scene.kernel.merges_leaves or scene.order
        restore = {"set_direct_map_default_noflush": -ENOMEM} if unseen else {}
        self.fallible = FALLIBLE | restore if scene.kernel.changes_direct_map else {
            name: errno for name, errno in FALLIBLE.items() if not name.startswith("set_direct_map")}

    def initial(self, failures: int = 0, refusals: int = 0) -> bytes:
        """A host with free frames, running VMs that hold the module, and no file yet."""
        state = st.State.empty(self.sizes)
        for frame in state.frames():
            frame.s1 = frame.s2 = 1
            frame.content = JUNK
        for folio in state.folios():
            folio.s1_leaf = folio.s2_leaf = self.sizes.order
        state.module = self.sizes.vms
        state.failures, state.given, state.refusals = failures, failures, refusals
        return state.save()

    def halted(self, shared: bytes) -> bool:
        """Whether the kernel has panicked."""
        return bool(shared[st.PANIC_AT])

    def spared(self, shared: bytes) -> int:
        """Failures and refusals for good that have not been injected yet."""
        state = st.State(shared)
        return int(state.failures) + int(state.refusals)

    def outcomes(self, shared: bytes, party: int, primitive: Primitive) -> list[Outcome]:
        """All ways *primitive*, asked for by *party*, can end; none when it has to wait."""
        perform = getattr(self, primitive.name, None)
        if perform is None:
            raise BadInput(f"the abstract host has no primitive {primitive.name!r}")
        # No outcome: the party waits. So a deadlock with a frozen task can be found.
        if self._is_frozen(shared, party):
            return []
        # A primitive of the abstract host has one end; the injected failure below is the second.
        ends = self._perform(perform, shared, party, primitive)
        errno = self._errno(primitive)
        # Only if the primitive can go on at all. A failure of something that has to wait would be a failure out of
        # nothing.
        if ends and errno and st.State(shared).failures:
            ends += self._fail(shared, party, primitive, errno)
        if ends and primitive.name == "hyp_call" and primitive.args[0] in self.hypervisor.final:
            ends += self._refuse_for_good(shared, party, primitive, ends[0])
        return ends

    # A frozen task does not run; freezing waited until it held nothing.
    def _is_frozen(self, shared: bytes, party: int) -> bool:
        return party in self.tasks and bool(st.State(shared).frozen)

    def _look_at(self, shared: bytes, party: int, primitive: Primitive) -> None:
        self.state, self.notes, self.who, self.caller = st.State(shared), [], party, primitive.caller
        self.file = self.state.file(primitive.file)
        self.vm = self.state.vm(primitive.file)       # file n belongs to VM n

    def _perform(
        self, perform: Callable[..., Any], shared: bytes, party: int, primitive: Primitive
    ) -> list[Outcome]:
        self._look_at(shared, party, primitive)
        try:
            # Before the primitive itself: code that is gone cannot even begin.
            self._must_be_there(primitive)
            result = perform(*primitive.args)
        except Blocked:
            return []
        except Panicked:
            # The state at that moment is kept, so the trace shows what the kernel died of.
            self.state.panic = 1
            result = None
        except ValueError as error:                     # of a bytearray; and a hypercall may be someone else's
            # A counter that ran over its byte: some design takes references without end. Any other ValueError is a
            # mistake of ours.
            if primitive.name == "hyp_call" or not str(error).startswith("byte must be in range"):
                raise
            self.notes.append(facts.Broken(f"{primitive} takes more than {MANY} references, and puts none"))
            self.state.panic = 1
            result = None
        return [Outcome(result, self.state.save(), tuple(self.notes))]

    # The module whose code runs, and the inode it works on.
    def _must_be_there(self, primitive: Primitive) -> None:
        if primitive.caller == self.hypervisor.module and self.state.unloaded:
            self.die(f"call into module {primitive.caller}, which has been unloaded ({primitive.name})")
        if primitive.name in OF_INODE or (primitive.name in OF_INODE_BY_NAME and self._is_the_inodes(primitive)):
            life = self.file.inode
            if life == DESTROYED or (life == EVICTED and self.file.evictor != self.who + 1 and not self._keeps_a_folio()):
                self.gone(f"the inode, in {primitive.name}")

    # truncate_inode_pages_final() waits for the folio lock, so who has a folio of the file locked has the inode, too.
    def _keeps_a_folio(self) -> bool:
        return any(self.ours(part) is not None for frame in self.state.frames() if frame.lock == self.who + 1
                   for part in self.state.parts(frame))

    def _is_the_inodes(self, primitive: Primitive) -> bool:
        what = primitive.args[0]
        return what in ("invalidate", "attributes") or (what == "bindings" and primitive.name.startswith("tree_")
                                                        and primitive.caller == "library")

    def _errno(self, primitive: Primitive) -> int:
        if primitive.name == "hyp_call":
            return self.hypervisor.fallible.get(primitive.args[0], 0)
        return self.fallible.get(primitive.name, 0)

    def _fail(self, shared: bytes, party: int, primitive: Primitive, errno: int) -> list[Outcome]:
        self._look_at(shared, party, primitive)
        if primitive.name in OF_LEAVES:
            folio = primitive.args[0]
            if not self.may_fail(folio, 0 if primitive.name == "split_direct_map" else folio.order):
                return []
        self.state.failures -= 1
        if primitive.name == "hyp_call":
            self.count("calls")
        self.against(FAILURE, self._frame_of(primitive) if errno == -EAGAIN else None)
        return [Outcome(errno, self.state.save(), (), failed=True)]

    # The hypervisor says no where it might have said yes, and will say so ever after.
    def _refuse_for_good(self, shared: bytes, party: int, primitive: Primitive, done: Outcome) -> list[Outcome]:
        self._look_at(shared, party, primitive)
        frame = self._frame_of(primitive)
        if not self.state.refusals or done.result != 0 or frame is None or frame.stuck:
            return []
        self.state.refusals -= 1
        # The last page of what was asked for: who looks at the first alone does not see it.
        self.state.parts(frame)[-1].stuck = 1
        self.count("calls")
        self.against(FOR_GOOD, frame)
        return [Outcome(self.hypervisor.final[primitive.args[0]], self.state.save(), (), failed=True)]

    def _frame_of(self, primitive: Primitive) -> st.Frame | None:
        return self.subject(primitive.args) if primitive.name == "hyp_call" else None
