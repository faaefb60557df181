"""The abstract host: how a primitive is carried out on a state, all its possible ends, and who has to wait.

One method per primitive, spread over the mixins by subject; this file owns what they have in common: injected
failures, frozen tasks, code whose module is gone, and the panic that ends everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from guest_memfd.check.outcome import Outcome
from guest_memfd.errors import BadInput
from guest_memfd.hosts.abstract import state as st
from guest_memfd.hosts.abstract.base import Blocked, Panicked
from guest_memfd.hosts.abstract.locks import Locks
from guest_memfd.hosts.abstract.world import World
from guest_memfd.hosts.host import ENOMEM, Primitive

if TYPE_CHECKING:
    from guest_memfd.hypervisors.hypervisor import Hypervisor

FALLIBLE = {
    "filemap_add_folio": -ENOMEM,
    "set_direct_map_invalid_noflush": -ENOMEM,
    "xa_store": -ENOMEM,
    "xa_reserve": -ENOMEM,
    "mmap": -ENOMEM,
    "alloc_inode": -ENOMEM,
}
"""Primitives that can fail for want of memory, and what they return then."""


class AbstractHost(Locks, World):
    """A `check.explorer.Machine` with the fields of `state`, under *hypervisor*.

    sea_fixup: whether do_sea() consults the exception table (the design `fixup` changes that).
    tasks: numbers of the parties that are tasks and can be frozen.
    merges_leaves: whether this kernel makes large direct-map leaves of small ones again, so that restoring a page may
    have to split one. None does (arch/arm64/mm/mmu.c, arch/x86/mm/pat/set_memory.c), so by default restoring what was
    zapped cannot fail.
    """

    footprints = True

    def __init__(
        self, hypervisor: Hypervisor, *, sea_fixup: bool = False, tasks: frozenset[int] = frozenset(),
        merges_leaves: bool = False,
    ) -> None:
        super().__init__()
        self.hypervisor, self.sea_fixup, self.tasks = hypervisor, sea_fixup, tasks
        restore = {"set_direct_map_default_noflush": -ENOMEM} if merges_leaves else {}
        self.fallible = FALLIBLE | restore

    def initial(self, failures: int = 0) -> bytes:
        """A host with free frames, a running VM whose fd holds the module, and no file yet."""
        state = st.State()
        for frame in state.frames():
            frame.s1 = frame.s2 = 1
            frame.content = st.JUNK
        state.module = 1
        state.failures = failures
        return state.save()

    def halted(self, shared: bytes) -> bool:
        """Whether the kernel has panicked."""
        return bool(shared[st.PANIC_AT])

    def outcomes(self, shared: bytes, party: int, primitive: Primitive) -> list[Outcome]:
        """All ways *primitive*, asked for by *party*, can end; none when it has to wait."""
        perform = getattr(self, primitive.name, None)
        if perform is None:
            raise BadInput(f"the abstract host has no primitive {primitive.name!r}")
        if self._is_frozen(shared, party):
            return []
        ends = self._perform(perform, shared, party, primitive)
        errno = self._errno(primitive)
        if ends and errno and st.State(shared).failures:
            ends.append(self._fail(shared, errno))
        return ends

    # A frozen task does not run; freezing waited until it held nothing.
    def _is_frozen(self, shared: bytes, party: int) -> bool:
        return party in self.tasks and bool(st.State(shared).frozen)

    def _perform(
        self, perform: Callable[..., Any], shared: bytes, party: int, primitive: Primitive
    ) -> list[Outcome]:
        self.state, self.notes, self.who, self.caller = st.State(shared), [], party, primitive.caller
        try:
            if self.state.unloaded and primitive.caller == self.hypervisor.module:
                self.die(f"call into module {primitive.caller}, which has been unloaded ({primitive.name})")
            result = perform(*primitive.args)
        except Blocked:
            return []
        except Panicked:
            self.state.panic = 1
            result = None
        return [Outcome(result, self.state.save(), tuple(self.notes))]

    def _errno(self, primitive: Primitive) -> int:
        if primitive.name == "hypercall":
            return self.hypervisor.fallible.get(primitive.args[0], 0)
        return self.fallible.get(primitive.name, 0)

    def _fail(self, shared: bytes, errno: int) -> Outcome:
        state = st.State(shared)
        state.failures -= 1
        return Outcome(errno, state.save(), (), failed=True)
