"""Modules: what they may link against, and when they may go. A symbol that is not exported to a module does not exist for
it, and a module goes only when no one refers to it (kernel/module/main.c, include/linux/export.h).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from errno import EAGAIN, EBUSY, EEXIST, EINVAL, ENOENT, EPERM
from typing import NamedTuple

EWOULDBLOCK = EAGAIN

GPL_LICENSES = ("GPL", "GPL v2", "GPL and additional rights", "Dual BSD/GPL", "Dual MIT/GPL", "Dual MPL/GPL")
"""MODULE_LICENSE() strings that license_is_gpl_compatible() accepts (include/linux/license.h)."""

_MODULE_NS = "module:"


class Export(NamedTuple):
    """One exported symbol: for GPL-compatible modules only, or for all; perhaps in a namespace."""

    name: str
    gpl: bool = True
    namespace: str | None = None


def export_symbol(name: str) -> Export:
    """EXPORT_SYMBOL(): modules of any licence may link against *name*."""
    return Export(name, gpl=False)


def export_symbol_gpl(name: str) -> Export:
    """EXPORT_SYMBOL_GPL(): only modules with a GPL-compatible licence may link against *name*."""
    return Export(name)


def export_symbol_ns_gpl(name: str, namespace: str) -> Export:
    """EXPORT_SYMBOL_NS_GPL(): GPL-compatible, and the module has to import *namespace*."""
    return Export(name, namespace=namespace)


def export_symbol_for_modules(name: str, modules: str) -> Export:
    """EXPORT_SYMBOL_FOR_MODULES(name, "a,b,kvm-*"): GPL, and only for modules of these names."""
    return Export(name, namespace=_MODULE_NS + modules)


NOT_EXPORTED = frozenset((
    "set_direct_map_invalid_noflush", "set_direct_map_default_noflush", "set_direct_map_valid_noflush",
    "can_set_direct_map", "set_memory_valid", "kernel_page_present", "split_kernel_leaf_mapping",
    "flush_tlb_kernel_range", "init_mm"))
"""In vmlinux of arm64 7.3, and for built-in code only."""

VMLINUX = (
    export_symbol_gpl("set_memory_encrypted"), export_symbol_gpl("set_memory_decrypted"),
    export_symbol_gpl("apply_to_page_range"), export_symbol_gpl("register_pm_notifier"),
    export_symbol_gpl("unregister_pm_notifier"))
"""What vmlinux exports of this business."""

DIRECT_MAP_EXPORTS = tuple(map(export_symbol_gpl, (
    "can_set_direct_map", "set_direct_map_invalid_noflush", "set_direct_map_default_noflush")))
"""What patch 19/35 of "Drivers for Gunyah hypervisor" v17 (22 Feb 2024) would add; it was refused."""


def module_matches(name: str, patterns: str) -> bool:
    """Whether module *name* is one of the comma-separated *patterns*: '-' is '_', and a trailing * takes the rest."""
    name = name.replace("-", "_")
    for pattern in patterns.replace("-", "_").split(","):
        if name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern:
            return True
    return False


class ModuleState(Enum):
    """MODULE_STATE_*, as far as someone else can see them."""

    COMING = "Loading"
    LIVE = "Live"
    GOING = "Unloading"


@dataclass(frozen=True)
class ModuleImage:
    """A .ko: what it needs, what it offers, and its init and exit functions (None: it has none).

    A module with init but without exit can never be unloaded.
    """

    name: str
    license: str = "GPL"
    imports: tuple[str, ...] = ()
    import_ns: tuple[str, ...] = ()
    exports: tuple[Export, ...] = ()
    init: Callable[[], int] | None = None
    exit: Callable[[], None] | None = None


@dataclass(eq=False)
class Module:
    """A loaded module. `refcount` counts who uses it; modules that link against it are in `users`, too."""

    image: ModuleImage
    state: ModuleState = ModuleState.COMING
    refcount: int = 0
    uses: list[Module] = field(default_factory=list)
    users: list[Module] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name as in /proc/modules: dashes become underscores."""
        return self.image.name.replace("-", "_")

    @property
    def gpl(self) -> bool:
        """Whether GPL-only symbols are there for it."""
        return self.image.license in GPL_LICENSES

    def try_get(self) -> bool:
        """try_module_get(): one more user, unless it is on its way out."""
        if self.state is ModuleState.GOING:
            return False
        self.refcount += 1
        return True

    def get(self) -> None:
        """__module_get(): by someone who holds a reference already; raises ValueError otherwise (a WARN)."""
        if not self.refcount:
            raise ValueError(f"{self.name}: __module_get() without a reference")
        self.refcount += 1

    def put(self) -> None:
        """module_put(); raises ValueError below zero (a WARN in the kernel)."""
        if not self.refcount:
            raise ValueError(f"{self.name}: module_put() without a reference")
        self.refcount -= 1


class Loader:
    """The modules of one kernel and the symbols they find. `log` is what the kernel prints."""

    def __init__(self, exports: Iterable[Export] = VMLINUX, *, direct_map_exports: bool = False,
                 missing_namespace_imports: bool = False) -> None:
        self.modules: dict[str, Module] = {}
        self.log: list[str] = []
        self.missing_namespace_imports = missing_namespace_imports
        self._vmlinux = {e.name: e for e in (*exports, *(DIRECT_MAP_EXPORTS if direct_map_exports else ()))}

    # -- loading ------------------------------------------------------------------------------------------------

    def load(self, image: ModuleImage) -> Module | int:
        """init_module(2): the live module, or a negative errno: nothing is left of it then.

        -EEXIST (loaded already), -EPERM (imports a "module:" namespace), -ENOENT (a symbol it cannot see), -EINVAL (a
        namespace it does not import), -EBUSY (a module it needs is still loading), or what its init function returned.
        """
        module = Module(image)
        if module.name in self.modules:
            return -EEXIST
        for namespace in image.import_ns:
            if namespace.startswith(_MODULE_NS):
                self.log.append(f"{module.name}: module tries to import module namespace: {namespace}")
                return -EPERM
        for symbol in image.imports:
            ret = self._resolve(module, symbol)
            if ret:
                self.log.append(f"{module.name}: Unknown symbol {symbol} (err {ret})")
                self._unlink(module)
                return ret
        self.modules[module.name] = module
        ret = image.init() if image.init else 0
        if ret < 0:
            module.state = ModuleState.GOING
            self._unlink(module)
            del self.modules[module.name]
            return ret
        module.state = ModuleState.LIVE
        return module

    # resolve_symbol(): a reference on the module that has it is kept until this one goes.
    def _resolve(self, module: Module, symbol: str) -> int:
        owner, export = self._find(symbol, module.gpl)
        if export is None:
            return -ENOENT
        ret = self._verify_namespace(module, export)
        if ret or owner is None or owner in module.uses:
            return ret
        if owner.state is ModuleState.COMING:
            return -EBUSY
        if not owner.try_get():
            return -ENOENT
        module.uses.append(owner)
        owner.users.append(module)
        return 0

    def _find(self, symbol: str, gpl: bool) -> tuple[Module | None, Export | None]:
        found = self._vmlinux.get(symbol)
        if found is not None:
            # A GPL-only symbol is not forbidden to others, it is not there:
            # the same -ENOENT as for a name that no one has.
            return None, found if gpl or not found.gpl else None
        for owner in self.modules.values():
            for export in owner.image.exports:
                if export.name == symbol and (gpl or not export.gpl):
                    return owner, export
        return None, None

    # verify_namespace_is_imported()
    def _verify_namespace(self, module: Module, export: Export) -> int:
        namespace = export.namespace
        if namespace is None or namespace in module.image.import_ns:
            return 0
        if namespace.startswith(_MODULE_NS) and module_matches(module.name, namespace.removeprefix(_MODULE_NS)):
            return 0
        self.log.append(f"{module.name}: module uses symbol ({export.name}) from namespace {namespace}, "
                        "but does not import it.")
        return 0 if self.missing_namespace_imports else -EINVAL

    @staticmethod
    def _unlink(module: Module) -> None:
        for owner in module.uses:
            owner.put()
            owner.users.remove(module)
        module.uses.clear()

    # -- unloading ----------------------------------------------------------------------------------------------

    def delete(self, name: str, *, capable: bool = True) -> int:
        """delete_module(2) without O_TRUNC: 0, and its exit function has run.

        -EPERM (no CAP_SYS_MODULE), -ENOENT, -EWOULDBLOCK (modules or references depend on it), -EBUSY (still loading, on
        its way out, or without an exit function).
        """
        if not capable:
            return -EPERM
        module = self.modules.get(name.replace("-", "_"))
        if module is None:
            return -ENOENT
        # In the kernel's order, which decides what a caller is told of a module that has several reasons to stay.
        if module.users:
            return -EWOULDBLOCK
        if module.state is not ModuleState.LIVE:
            return -EBUSY
        # Without an exit function nothing takes back what init has done; only a forced unload would go on.
        if module.image.init and not module.image.exit:
            return -EBUSY
        if module.refcount:
            return -EWOULDBLOCK
        module.state = ModuleState.GOING
        if module.image.exit:
            module.image.exit()
        self._unlink(module)
        del self.modules[module.name]
        return 0
