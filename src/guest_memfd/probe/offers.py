"""What this machine offers, and which features rows may count on.

What is missing has a reason in words, and never stops the questions that follow.
"""

from __future__ import annotations

import os
import platform
import re
import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guest_memfd.errors import GuestMemfdError
from guest_memfd.linux.mapping import PAGE
from guest_memfd.linux.system import System
from guest_memfd.probe.ask.calls import ADVICE, call, store
from guest_memfd.probe.ask.calls import attempt as tried
from guest_memfd.probe.ask.child import Slate, Unfit, perform, ptrace_works
from guest_memfd.probe.ask.guest import ProbeGuest
from guest_memfd.probe.ask.here import SIZE, Here, bind, create, resident
from guest_memfd.probe.ask.row import SETTLED, SINCE_6_1, KernelFeatures
from guest_memfd.probe.rows.files import fs_type
from guest_memfd.probe.rows.secret import under_limit
from guest_memfd.probe.rows.slots import BEYOND, GMEM, GPA, binds, two
from guest_memfd.uapi.kvm import CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES, PATH, Cap

_PARAMETERS = {
    "kvm": ("gmem_in_place_conversion", "guest_memfd_tlb_flush", "tdp_mmu", "nx_huge_pages", "mmio_caching",
            "eager_page_split", "allow_unsafe_mappings", "enable_virt_at_load"),
    "kvm_intel": ("ept", "unrestricted_guest", "nested", "tdx"), "kvm_amd": ("npt", "nested", "sev", "sev_es", "sev_snp"),
    "kvm_pvm": ("pvm_native", "pvm_emul_batch"),
}
"""Module parameters that change what guest memory does or costs."""

_MULTI_ADDRESS_SPACE = 118
_MORE_CAPS = {
    "MANUAL_DIRTY_LOG_PROTECT2": 168,
    f"GUEST_MEMFD_MEMORY_ATTRIBUTES ({CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES}, not settled)": CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES,
}
_VM_TYPES = range(6)
_CAP_IPC_LOCK, _CAP_SYS_ADMIN = 14, 21
_MEMORY = 512 << 20
GUEST_MEMFD_MAGIC = 0x474D454D
"""f_type of guest_memfd's own file system (include/uapi/linux/magic.h, 6.19)."""
SYS_MODULE = Path("/sys/module")
EMULATED = "emulated at CPL 0, native at CPL 3"
"""The kind of vCPU that kvm_pvm has."""
_TELLING = ("kvm", "vm", "gmem", "slots", "vcpu", "guest", "secretmem", "cachestat", "numa", "flag 1", "flag 2", "root",
            "ipc-lock", "unfiltered", "ptrace", "memory 512M", "enough memory", "no memory failure", SETTLED)
# Features whose absence is worth a line: something is not tried, or not judged.


@dataclass(frozen=True)
class Offers:
    """*facts*: what to show, by name, JSON values only; *features*: what rows need and expect."""

    facts: Mapping[str, Any]
    features: KernelFeatures


def look(path: str = PATH, slate: Slate | None = None, *, expendable: bool = False) -> Offers:
    """Ask this machine; *path*: the device node of KVM. *expendable*: it is made for this, and may be broken."""
    slate = slate or Slate()
    has: set[str] = set()
    lacks: dict[str, str] = {}
    release = platform.release()

    def feature(name: str, why: str = "") -> bool:
        if why:
            lacks[name] = why
            has.discard(name)
        else:
            has.add(name)
        return not why

    feature("expendable", "" if expendable else "it could break this machine; gmem probe --kernel does it in QEMU")
    _about_machine(feature)
    fails = "no memory failure" not in has
    feature("memory failure", lacks["expendable"] if fails and not expendable else "" if fails else
            "this kernel is built without memory failure handling")
    _about_process(feature, slate)
    facts: dict[str, Any] = {"kernel": release, "machine": platform.machine()}
    facts["kvm"] = _kvm(path, feature)
    _about_release(release, feature, in_place=_parameter("kvm", "gmem_in_place_conversion") == "Y")

    def attempt(act: Callable[[Here], object]) -> str:
        """Why *act* does not work in a child, or nothing."""
        here = Here(slate, path, KernelFeatures(release, frozenset(has), dict(lacks)))
        outcome = perform(lambda page: act(here), slate)
        return outcome.unfit or ("" if outcome.result == "ok" else str(outcome.result))

    def depends(name: str, on: str, why: Callable[[], str], words: str = "") -> bool:
        if on not in has:
            return feature(name, lacks[on])
        reason = why()
        return feature(name, f"{words}: {reason}" if reason and words else reason)

    depends("vm", "kvm", lambda: attempt(_vm_works))
    depends("gmem", "vm", lambda: attempt(_file_works), "a default VM has no guest_memfd here, as all have from 6.18 on")
    depends("slots", "gmem", lambda: attempt(_slot_works), "a default VM takes no slot with a guest_memfd")
    depends("unmappable slots", "slots", lambda: attempt(_unmappable_slot_works))
    depends("binding offsets unsigned", "slots", lambda: attempt(_refuses_overflow))
    depends("overlap is EEXIST", "slots", lambda: attempt(_overlap_is_told))
    depends("inodes of its own", "gmem", lambda: attempt(_own_inodes))
    depends("vcpu", "vm", lambda: attempt(_vcpu_works))
    depends("guest", "vcpu", lambda: lacks.get("x86-64", "") or attempt(_guest_works))
    secret = attempt(_secret_works)
    feature("secretmem", secret)
    if "memfd_secret" in secret and "ENOSYS" in secret:
        lacks["secretmem"] = ("memfd_secret: ENOSYS: not in this kernel, switched off (secretmem.enable=0), or the direct "
                              "map cannot be changed")
    depends("secret counted per user", "secretmem", lambda: attempt(_counted_when_touched))
    feature("no guard regions", "" if attempt(_guards) else "there are guard regions")
    feature("cachestat", attempt(_cachestat_works))
    feature("numa", attempt(_numa_works))

    facts["vcpu"] = _vcpu_kind(slate, path, KernelFeatures(release, frozenset(has), lacks))
    feature("cpl 0 emulated", "" if facts["vcpu"]["kind"] == EMULATED
            else "this KVM does not emulate a guest's kernel, or it is not known")
    facts |= {
        "memfd_secret": lacks.get("secretmem", "present"),
        "page_sizes": _page_sizes(),
        "limits": {name: _limit(number) for name, number in (
            ("RLIMIT_MEMLOCK", resource.RLIMIT_MEMLOCK), ("RLIMIT_NOFILE", resource.RLIMIT_NOFILE))},
        "module_parameters": {f"{module}.{name}": value for module, names in _PARAMETERS.items() for name in names
                              if (value := _parameter(module, name)) is not None},
        "direct_map_kb": direct_map(),
        "hibernation": _read("/sys/power/disk") or "not built in",
        "transparent_hugepages": {name: _chosen(f"/sys/kernel/mm/transparent_hugepage/{name}")
                                  for name in ("enabled", "shmem_enabled", "defrag")},
        "not_here": {name: lacks[name] for name in _TELLING if name in lacks},
    }
    return Offers(facts, KernelFeatures(release, frozenset(has), lacks))


# -- questions to /dev/kvm ---------------------------------------------------------------------------------------------


def _kvm(path: str, feature: Callable[..., bool]) -> dict[str, Any]:
    try:
        with System(path) as system:
            caps = {cap.name: system.check_extension(cap) for cap in Cap}
            caps |= {name: system.check_extension(number) for name, number in _MORE_CAPS.items()}
            spaces = system.check_extension(_MULTI_ADDRESS_SPACE)
            version = system.get_api_version()
    except (GuestMemfdError, OSError) as error:
        feature("kvm", str(error))
        caps, spaces, version = {}, 0, 0
    else:
        feature("kvm")
    flags, types = caps.get("GUEST_MEMFD_FLAGS", 0), caps.get("VM_TYPES", 0)
    for bit in range(64):
        offered = caps and flags >> bit & 1
        words = f"KVM_CAP_GUEST_MEMFD_FLAGS does not have flag {1 << bit}" if caps else "no KVM"
        feature(f"flag {1 << bit}", "" if offered else words)
        if caps and not offered:
            # A feature of its own: that KVM lacks the flag is something to
            # expect by. Without KVM neither of the two holds.
            feature(f"no flag {1 << bit}")
    for kind in _VM_TYPES:
        # Without the capability, which is newer than type 0, there is type 0 alone.
        offered = (types or 1) >> kind & 1
        feature(f"vm type {kind}", "" if caps and offered else f"VM type {kind} is not offered" if caps else "no KVM")
    feature("attributes", "" if caps.get("MEMORY_ATTRIBUTES") else "KVM_CAP_MEMORY_ATTRIBUTES is 0")
    feature("pre-fault", "" if caps.get("PRE_FAULT_MEMORY") else "KVM_CAP_PRE_FAULT_MEMORY is 0")
    feature("one address space", f"this KVM has {spaces} address spaces" if spaces > 1 else "")
    if not caps:
        return {"path": path, "usable": False}
    return {"path": path, "usable": True, "api_version": version, "capabilities": caps,
            "guest_memfd_flags": [1 << bit for bit in range(64) if flags >> bit & 1],
            "vm_types": [kind for kind in range(64) if types >> kind & 1], "max_slots": caps["NR_MEMSLOTS"]}


def _vm_works(here: Here) -> None:
    os.fstat(here.vm)


def _file_works(here: Here) -> None:
    create(here.vm, PAGE, 0)


def _slot_works(here: Here) -> None:
    binds(here)


# arm64's kvm_arch_prepare_memory_region() wants a file that can be mapped: private memory is not supported there.
def _unmappable_slot_works(here: Here) -> None:
    binds(here, file=0)


# "KVM: guest_memfd: Treat memslot binding offsets as unsigned", in 7.2 and in stable trees.
def _refuses_overflow(here: Here) -> None:
    if (said := tried(lambda: binds(here, offset=BEYOND))) == "ok":
        raise Unfit("a slot may begin near 2^63 of its file")
    if said != "EINVAL":
        raise Unfit(f"such a slot is refused with {said}")


# 7ea987a90585, in 7.2.
def _overlap_is_told(here: Here) -> None:
    if (said := tried(lambda: two(here, 2 * GPA, 0, 2 * PAGE))) != "EEXIST":
        raise Unfit(f"pages that are bound already are refused with {said}")


# Since 6.19 the files are on a file system of their own, and not on anon_inode.
def _own_inodes(here: Here) -> None:
    if fs_type(here, 0) != hex(GUEST_MEMFD_MAGIC):
        raise Unfit("a guest_memfd is on anon_inode, as before 6.19")


# CVE-2026-93243, "mm/secretmem: properly account locked pages": counted per user, and when a page is touched.
def _counted_when_touched(here: Here) -> None:
    if (said := tried(lambda: under_limit(here, 0, 1))) != "mapped":
        raise Unfit(f"a mapping above RLIMIT_MEMLOCK is refused: {said}")


def _guards(here: Here) -> None:
    call("madvise", here.memory(), PAGE, ADVICE["GUARD_INSTALL"])


def _vcpu_works(here: Here) -> None:
    here.vcpu()


def _secret_works(here: Here) -> None:
    here.secret()


def _guest_works(here: Here) -> None:
    guest = ProbeGuest(here)
    memory = here.memory()
    store(memory, b"works")
    bind(here.vm, 1, 0, GPA, SIZE, memory)
    said = guest.load(GPA)
    if said != "works":
        raise Unfit(f"a small guest does not run: {said}")


def _numa_works(here: Here) -> None:
    # It wants nothing, and so succeeds for everyone; without CONFIG_NUMA it is ENOSYS.
    call("get_mempolicy", None, None, 0, 0, 0)


def _cachestat_works(here: Here) -> None:
    # Any file that is in the page cache will do, and this one is there without KVM.
    fd = os.open("/proc/self/exe", os.O_RDONLY)
    resident(fd)


# A slot with a guest_memfd and other memory behind userspace_addr: whose byte does a load at CPL 0 read?
def _cpl_0(here: Here) -> str:
    guest, memory = ProbeGuest(here), here.memory()
    store(memory, b"user")
    bind(here.vm, 1, GMEM, GPA, SIZE, memory, here.gmem())
    return guest.at_cpl_0(GPA)


def _vcpu_kind(slate: Slate, path: str, features: KernelFeatures) -> dict[str, str]:
    modules = ", ".join(sorted(entry.name for entry in _entries(SYS_MODULE, "kvm_*"))) or "none visible"
    told = f"modules: {modules}"
    if "guest" not in features or "slots" not in features:
        why = features.why("guest" if "guest" not in features else "slots")
        return {"kind": "unknown", "told_by": f"{told}; no guest was run: {why}"}
    seen = perform(lambda page: _cpl_0(Here(page, path, features)), slate)
    if seen.result == "user":
        kind = EMULATED
        told += "; a load at CPL 0 read userspace_addr of a slot with a guest_memfd, as only an emulator does"
    elif seen.result == "zero":
        kind = "native"
        told += "; a load at CPL 0 read the guest_memfd, not userspace_addr"
    else:
        kind = "unknown at CPL 0, native at CPL 3"
        told += f"; a load at CPL 0: {seen.result or seen.unfit}"
    return {"kind": kind, "told_by": told}


# -- questions to the kernel and about ourselves -----------------------------------------------------------------------


def _about_process(feature: Callable[..., bool], slate: Slate) -> None:
    status = _read("/proc/self/status") or ""
    found = re.search(r"^CapEff:\s+(\w+)", status, re.M)
    capabilities = int(found[1], 16) if found else 0
    filtered = re.search(r"^Seccomp:\s+([12])", status, re.M)
    root = bool(capabilities >> _CAP_SYS_ADMIN & 1)
    feature("root", "" if root else "not privileged (no CAP_SYS_ADMIN)")
    feature("ipc-lock", "" if capabilities >> _CAP_IPC_LOCK & 1 else "no CAP_IPC_LOCK")
    feature("unfiltered", "a seccomp filter is in force" if filtered else "" if root else "not privileged")
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    # Then ENOMEM of a mapping may be the limit's answer, and says nothing about the kernel (ask/row.py).
    if soft != resource.RLIM_INFINITY:
        feature("enough memory", f"RLIMIT_AS is {soft}")
    feature("ptrace", "" if ptrace_works(slate) else "a child cannot be traced here")


def _about_machine(feature: Callable[..., bool]) -> None:
    machine = platform.machine()
    feature("x86-64", "" if machine == "x86_64" else f"for x86-64 only, this is {machine}")
    feature("arm64", "" if machine == "aarch64" else f"for arm64 only, this is {machine}")
    meminfo = _read("/proc/meminfo") or ""
    # The line is there with CONFIG_MEMORY_FAILURE alone (fs/proc/meminfo.c), and it costs no page to look.
    handled = "HardwareCorrupted" in meminfo
    feature("no memory failure", "this kernel handles broken memory: poison.* is about that" if handled else "")
    available = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.M)
    free = int(available[1]) << 10 if available else 0
    feature("memory 512M", "" if free >= _MEMORY else f"only {free >> 20} MiB of memory are available")
    if free >= _MEMORY:
        feature("enough memory")
    nodes = len(_entries(Path("/sys/devices/system/node"), "node[0-9]*")) or 1
    feature("two nodes", "" if nodes == 2 else f"it takes a machine with two nodes, and this has {nodes}")
    feature("fewer than 64 nodes", "" if nodes < 64 else f"this machine has {nodes} nodes")


def version_of(release: str) -> tuple[int, int]:
    """``6.18.44-x`` as (6, 18); (0, 0) for what is no release."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def patch_of(release: str) -> int:
    """``6.18.44-x`` as 44; 0 for what has no third number."""
    found = re.match(r"\d+\.\d+\.(\d+)", release)
    return int(found[1]) if found else 0


def _about_release(release: str, feature: Callable[..., bool], in_place: bool) -> None:
    version = version_of(release)
    settled = (6, 18) <= version < (7, 4) and not in_place
    feature(SETTLED, "" if settled else f"not of releases {SETTLED}: {release}{', in-place conversion' if in_place else ''}")
    feature(SINCE_6_1, "" if (6, 1) <= version < (7, 4) else f"not of releases {SINCE_6_1}: {release}")
    for since in ((6, 19), (7, 0)):
        name = f"{since[0]}.{since[1]} on"
        feature(name, "" if version >= since else f"older than {since[0]}.{since[1]}")
    feature("in-place", "" if in_place else "no in-place conversion (kvm.gmem_in_place_conversion)")


def direct_map() -> dict[str, int]:
    """Kilobytes of the direct map by size of leaf; empty where the kernel does not say."""
    return {size: int(kb) for size, kb in re.findall(r"^DirectMap(\w+):\s+(\d+) kB", _read("/proc/meminfo") or "", re.M)}


def _page_sizes() -> list[int]:
    huge = [int(entry.name.removeprefix("hugepages-").removesuffix("kB")) << 10
            for entry in _entries(Path("/sys/kernel/mm/hugepages"), "hugepages-*kB")]
    return sorted([PAGE, *huge])


def _limit(number: int) -> list[int | str]:
    return ["unlimited" if value == resource.RLIM_INFINITY else value for value in resource.getrlimit(number)]


def _parameter(module: str, name: str) -> str | None:
    return _read(f"{SYS_MODULE}/{module}/parameters/{name}")


def _chosen(path: str) -> str:
    text = _read(path) or ""
    found = re.search(r"\[(\S+)\]", text)
    return found[1] if found else text or "not built in"


def _entries(folder: Path, pattern: str) -> list[Path]:
    try:
        return [*folder.glob(pattern)]
    except OSError:
        return []


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
