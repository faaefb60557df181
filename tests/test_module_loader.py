"""What a module may link against, and when it may go."""

from __future__ import annotations

from errno import EBUSY, EEXIST, EINVAL, ENODEV, ENOENT, EPERM
from typing import Any

import pytest

from guest_memfd.machine.linux.module import (
    DIRECT_MAP_EXPORTS,
    EWOULDBLOCK,
    GPL_LICENSES,
    NOT_EXPORTED,
    VMLINUX,
    Export,
    Loader,
    Module,
    ModuleImage,
    ModuleState,
    export_symbol,
    export_symbol_for_modules,
    export_symbol_gpl,
    export_symbol_ns_gpl,
    module_matches,
)


def load(loader: Loader, name: str, **options: Any) -> Module:
    module = loader.load(ModuleImage(name, **options))
    assert isinstance(module, Module), loader.log
    return module


# -- symbols -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symbol", sorted(NOT_EXPORTED))
def test_the_direct_map_is_not_for_modules(symbol: str) -> None:
    loader = Loader()
    assert loader.load(ModuleImage("gunyah", imports=(symbol,))) == -ENOENT
    assert loader.log == [f"gunyah: Unknown symbol {symbol} (err -2)"]
    assert not loader.modules


@pytest.mark.parametrize("symbol", [export.name for export in DIRECT_MAP_EXPORTS])
def test_the_refused_patch_would_export_it(symbol: str) -> None:
    loader = Loader(direct_map_exports=True)
    assert load(loader, "gunyah", imports=(symbol,)).state is ModuleState.LIVE
    assert loader.load(ModuleImage("vendor", license="Proprietary", imports=(symbol,))) == -ENOENT
    assert loader.load(ModuleImage("third", imports=("flush_tlb_kernel_range",))) == -ENOENT


@pytest.mark.parametrize("export", VMLINUX)
def test_what_vmlinux_exports(export: Export) -> None:
    load(Loader(), "any", imports=(export.name,))


@pytest.mark.parametrize(("licence", "gpl"), [*((one, True) for one in GPL_LICENSES), ("Proprietary", False), ("gpl", False),
                                              ("MIT", False)])
def test_a_gpl_symbol_does_not_exist_for_others(licence: str, gpl: bool) -> None:
    loader = Loader((export_symbol("kmalloc"), export_symbol_gpl("kvm_get_kvm")))
    load(loader, "one", license=licence, imports=("kmalloc",))
    found = loader.load(ModuleImage("two", license=licence, imports=("kmalloc", "kvm_get_kvm")))
    assert isinstance(found, Module) is gpl
    if not gpl:
        assert found == -ENOENT
        assert loader.log == ["two: Unknown symbol kvm_get_kvm (err -2)"]


# -- namespaces --------------------------------------------------------------------------------------------------


def test_a_namespace_must_be_imported() -> None:
    loader = Loader((export_symbol_ns_gpl("dma_buf_get", "DMA_BUF"),))
    assert loader.load(ModuleImage("driver", imports=("dma_buf_get",), import_ns=("OTHER",))) == -EINVAL
    assert loader.log == [
        "driver: module uses symbol (dma_buf_get) from namespace DMA_BUF, but does not import it.",
        "driver: Unknown symbol dma_buf_get (err -22)"]
    load(loader, "driver", imports=("dma_buf_get",), import_ns=("OTHER", "DMA_BUF"))


def test_missing_imports_may_be_only_a_warning() -> None:
    loader = Loader((export_symbol_ns_gpl("dma_buf_get", "DMA_BUF"),), missing_namespace_imports=True)
    load(loader, "driver", imports=("dma_buf_get",))
    assert len(loader.log) == 1


@pytest.mark.parametrize(("name", "patterns", "matches"), [
    ("kvm", "kvm", True), ("kvm", "kvm_arm", False), ("kvm_arm", "kvm", False),
    ("kvm-intel", "kvm_intel", True), ("kvm_intel", "kvm-intel", True),
    ("kvm_amd", "a,b,kvm-*", True), ("kvm", "kvm-*", False), ("kvm", "kvm*", True), ("gunyah", "*", True),
    ("gunyah", "kvm,gunyah_vm", False), ("gunyah_vm", "kvm,gunyah-vm", True), ("kvm_amd", "kvm-*d", False),
])
def test_module_name_patterns(name: str, patterns: str, matches: bool) -> None:
    assert module_matches(name, patterns) is matches


def test_symbols_for_named_modules_only() -> None:
    exports = (export_symbol_for_modules("folio_zap_direct_map", "kvm,kvm-*"),)
    load(Loader(exports), "kvm", imports=("folio_zap_direct_map",))
    load(Loader(exports), "kvm-arm", imports=("folio_zap_direct_map",))
    loader = Loader(exports)
    assert loader.load(ModuleImage("gunyah", imports=("folio_zap_direct_map",))) == -EINVAL
    assert loader.log[0] == ("gunyah: module uses symbol (folio_zap_direct_map) from namespace module:kvm,kvm-*, "
                             "but does not import it.")
    assert loader.load(ModuleImage("kvm", license="Proprietary", imports=("folio_zap_direct_map",))) == -ENOENT


def test_a_module_namespace_cannot_be_imported() -> None:
    loader = Loader((export_symbol_for_modules("folio_zap_direct_map", "kvm"),))
    for name in ("gunyah", "kvm"):
        assert loader.load(ModuleImage(name, import_ns=("module:kvm",))) == -EPERM
    assert loader.log[0] == "gunyah: module tries to import module namespace: module:kvm"


# -- references --------------------------------------------------------------------------------------------------


def gone() -> None:
    """An exit function with nothing to do."""


def test_a_module_is_loaded_once_whatever_the_dash() -> None:
    loader = Loader()
    assert load(loader, "kvm-arm").name == "kvm_arm"
    assert loader.load(ModuleImage("kvm_arm")) == -EEXIST
    assert loader.delete("kvm-arm") == 0
    assert loader.delete("kvm-arm") == -ENOENT


def test_references_keep_a_module() -> None:
    loader = Loader()
    module = load(loader, "gunyah", exit=gone)
    assert module.try_get()
    module.get()
    assert loader.delete("gunyah") == -EWOULDBLOCK
    module.put()
    assert loader.delete("gunyah") == -EWOULDBLOCK
    module.put()
    assert loader.delete("gunyah", capable=False) == -EPERM
    assert loader.delete("gunyah") == 0
    assert not module.try_get()


@pytest.mark.parametrize("operation", [Module.put, Module.get])
def test_references_are_counted_strictly(operation: Any) -> None:
    with pytest.raises(ValueError, match="without a reference"):
        operation(Module(ModuleImage("gunyah")))


def test_a_user_of_symbols_keeps_a_module() -> None:
    loader = Loader(())
    base = load(loader, "base", exports=(export_symbol_gpl("base_a"), export_symbol_gpl("base_b")))
    user = load(loader, "user", imports=("base_a", "base_b"))
    assert (base.refcount, base.users, user.uses) == (1, [user], [base])
    assert loader.delete("base") == -EWOULDBLOCK
    assert loader.delete("user") == 0
    assert (base.refcount, base.users) == (0, [])
    assert loader.delete("base") == 0
    assert loader.load(ModuleImage("user", imports=("base_a",))) == -ENOENT


def test_a_load_that_fails_leaves_no_reference() -> None:
    loader = Loader(())
    base = load(loader, "base", exports=(export_symbol_gpl("base_a"),))
    assert loader.load(ModuleImage("user", imports=("base_a", "set_direct_map_invalid_noflush"))) == -ENOENT
    assert loader.load(ModuleImage("user", imports=("base_a",), init=lambda: -ENODEV)) == -ENODEV
    assert (base.refcount, base.users, list(loader.modules)) == (0, [], ["base"])


def test_a_module_that_is_loading_or_leaving() -> None:
    loader = Loader(())
    seen: list[object] = []

    def init() -> int:
        seen.append(loader.load(ModuleImage("user", imports=("base_a",))))
        seen.append(loader.delete("base"))
        seen.append(loader.load(ModuleImage("base")))
        return 0

    def leave() -> None:
        seen.append(loader.modules["base"].try_get())
        seen.append(loader.delete("base"))
        seen.append(loader.load(ModuleImage("user", imports=("base_a",))))

    load(loader, "base", exports=(export_symbol_gpl("base_a"),), init=init, exit=leave)
    assert seen == [-EBUSY, -EBUSY, -EEXIST]
    assert loader.delete("base") == 0
    assert seen[3:] == [False, -EBUSY, -ENOENT]


@pytest.mark.parametrize(("init", "leave", "result"), [
    (lambda: 0, None, -EBUSY), (lambda: 0, gone, 0), (None, None, 0), (None, gone, 0)])
def test_a_module_with_init_needs_exit(init: Any, leave: Any, result: int) -> None:
    loader = Loader()
    load(loader, "one", init=init, exit=leave)
    assert loader.delete("one") == result
