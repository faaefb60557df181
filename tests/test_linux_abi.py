"""Structures and numbers of uapi and linux/abi against a C program made from this machine's headers, and recorded ones."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from guest_memfd.errors import EHWPOISON, BadInput
from guest_memfd.linux.abi import kvm, kvm_x86, memfd_secret, memory
from guest_memfd.uapi import gunyah, kvm_arm64, kvm_run
from guest_memfd.uapi import kvm as uapi
from guest_memfd.uapi.memory import Advice

KNOWN = platform.machine() in ("x86_64", "aarch64")
# Each with the number that the header has, read off by hand: include/uapi/linux/kvm.h (7.3) on x86-64, and
# include/uapi/linux/gunyah.h (series v17). Sizes of arguments are in them.
COMMANDS = {
    "KVM_GET_API_VERSION": (uapi.GET_API_VERSION, 0xAE00), "KVM_CREATE_VM": (uapi.CREATE_VM, 0xAE01),
    "KVM_CHECK_EXTENSION": (uapi.CHECK_EXTENSION, 0xAE03), "KVM_GET_VCPU_MMAP_SIZE": (uapi.GET_VCPU_MMAP_SIZE, 0xAE04),
    "KVM_CREATE_VCPU": (uapi.CREATE_VCPU, 0xAE41), "KVM_RUN": (uapi.RUN, 0xAE80),
    "KVM_SET_USER_MEMORY_REGION": (uapi.SET_USER_MEMORY_REGION, 0x4020AE46),
    "KVM_SET_USER_MEMORY_REGION2": (uapi.SET_USER_MEMORY_REGION2, 0x40A0AE49),
    "KVM_GET_DIRTY_LOG": (uapi.GET_DIRTY_LOG, 0x4010AE42),
    "KVM_SET_MEMORY_ATTRIBUTES": (uapi.SET_MEMORY_ATTRIBUTES, 0x4020AED2),
    "KVM_SET_MEMORY_ATTRIBUTES2": (uapi.SET_MEMORY_ATTRIBUTES2, 0xC080AED2),
    "KVM_CREATE_GUEST_MEMFD": (uapi.CREATE_GUEST_MEMFD, 0xC040AED4),
    "KVM_PRE_FAULT_MEMORY": (uapi.PRE_FAULT_MEMORY, 0xC040AED5), "KVM_GET_REGS": (kvm_x86.GET_REGS, 0x8090AE81),
    "KVM_SET_REGS": (kvm_x86.SET_REGS, 0x4090AE82), "KVM_GET_SREGS": (kvm_x86.GET_SREGS, 0x8138AE83),
    "KVM_SET_SREGS": (kvm_x86.SET_SREGS, 0x4138AE84), "KVM_SET_CPUID2": (kvm_x86.SET_CPUID2, 0x4008AE90),
    "KVM_SET_SIGNAL_MASK": (kvm.SET_SIGNAL_MASK, 0x4004AE8B), "KVM_GET_STATS_FD": (kvm.GET_STATS_FD, 0xAECE),
    "KVM_GET_ONE_REG": (uapi.GET_ONE_REG, 0x4010AEAB), "KVM_SET_ONE_REG": (uapi.SET_ONE_REG, 0x4010AEAC),
    "KVM_ARM_PREFERRED_TARGET": (kvm_arm64.PREFERRED_TARGET, 0x8020AEAF),
    "KVM_ARM_VCPU_INIT": (kvm_arm64.VCPU_INIT, 0x4020AEAE), "KVM_GET_VCPU_EVENTS": (kvm_arm64.GET_VCPU_EVENTS, 0x8040AE9F),
    "KVM_SET_VCPU_EVENTS": (kvm_arm64.SET_VCPU_EVENTS, 0x4040AEA0), "GUNYAH_CREATE_VM": (gunyah.Ioctl.CREATE_VM, 0x4700),
    "GUNYAH_CREATE_GUEST_MEM": (gunyah.Ioctl.CREATE_GUEST_MEM, 0x40404708),
    "GUNYAH_VM_SET_DTB_CONFIG": (gunyah.Ioctl.SET_DTB_CONFIG, 0x40104702), "GUNYAH_VM_START": (gunyah.Ioctl.START, 0x4703),
    "GUNYAH_VM_ADD_FUNCTION": (gunyah.Ioctl.ADD_FUNCTION, 0x40104704),
    "GUNYAH_VM_REMOVE_FUNCTION": (gunyah.Ioctl.REMOVE_FUNCTION, 0x40104707),
    "GUNYAH_VM_MAP_MEM": (gunyah.Ioctl.MAP_MEM, 0x40204709),
    "GUNYAH_VM_SET_BOOT_CONTEXT": (gunyah.Ioctl.SET_BOOT_CONTEXT, 0x4010470A),
    "GUNYAH_VCPU_RUN": (gunyah.Ioctl.VCPU_RUN, 0x4705), "GUNYAH_VCPU_MMAP_SIZE": (gunyah.Ioctl.VCPU_MMAP_SIZE, 0x4706),
}

# struct: (size, {field: offset}), for those that no installed header may have.
LAYOUTS = {
    uapi.CreateGuestMemfd: (64, {"size": 0, "flags": 8, "reserved": 16}),
    uapi.UserspaceMemoryRegion2: (160, {"slot": 0, "flags": 4, "guest_phys_addr": 8, "memory_size": 16, "userspace_addr": 24,
                                       "guest_memfd_offset": 32, "guest_memfd": 40, "pad1": 44, "pad2": 48}),
    uapi.MemoryAttributes: (32, {"address": 0, "size": 8, "attributes": 16, "flags": 24}),
    uapi.MemoryAttributes2: (128, {"offset": 0, "size": 8, "attributes": 16, "flags": 24, "error_offset": 32,
                                  "reserved": 40}),
    uapi.PreFaultMemory: (64, {"gpa": 0, "size": 8, "flags": 16, "padding": 24}),
    kvm_run.RunMmio: (24, {"phys_addr": 0, "data": 8, "len": 16, "is_write": 20}),
    kvm_run.RunMemoryFault: (24, {"flags": 0, "gpa": 8, "size": 16}),
    kvm_run.KvmRun: (2352, {"immediate_exit": 1, "exit_reason": 8, "exit": 32}),
    gunyah.CreateMemArgs: (64, {"flags": 0, "size": 8, "reserved": 16}),
    gunyah.MapMemArgs: (32, {"guest_addr": 0, "flags": 8, "guest_mem_fd": 12, "offset": 16, "size": 24}),
    gunyah.VmDtbConfig: (16, {"guest_phys_addr": 0, "size": 8}),
    gunyah.FnDesc: (16, {"type": 0, "arg_size": 4, "arg": 8}),
    gunyah.VmBootContext: (16, {"reg": 0, "reserved": 4, "value": 8}),
    gunyah.FnVcpuArg: (4, {"id": 0}),
    gunyah.FnIrqfdArg: (16, {"fd": 0, "label": 4, "flags": 8, "padding": 12}),
    gunyah.FnIoeventfdArg: (32, {"datamatch": 0, "addr": 8, "len": 16, "fd": 20, "flags": 24, "padding": 28}),
    gunyah.VcpuRun: (40, {"immediate_exit": 0, "exit_reason": 8, "says": 16}),
    gunyah.VcpuRunMmio: (24, {"phys_addr": 0, "data": 8, "len": 16, "is_write": 20, "resume_action": 21}),
    gunyah.VcpuRunStatus: (20, {"status": 0, "type": 4, "padding": 6, "reason_size": 8, "reason": 12}),
    gunyah.VcpuRunPageFault: (16, {"phys_addr": 0, "attempt": 8, "resume_action": 12}),
    kvm_arm64.VcpuInit: (32, {"target": 0, "features": 4}),
    kvm_arm64.VcpuEvents: (64, {"serror_pending": 0, "serror_has_esr": 1, "ext_dabt_pending": 2, "pad": 3, "serror_esr": 8,
                                "reserved": 16}),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_number_is_the_recorded_one(name: str) -> None:
    ours, recorded = COMMANDS[name]
    assert ours == recorded


@pytest.mark.parametrize("struct", LAYOUTS, ids=lambda struct: struct.__name__)
def test_recorded_layout(struct: type[ctypes.Structure]) -> None:
    size, offsets = LAYOUTS[struct]
    assert ctypes.sizeof(struct) == size
    assert {name: getattr(struct, name).offset for name in offsets} == offsets
    named = sum(field.size for field in (getattr(struct, name) for name, *_ in struct._fields_))
    if struct not in _WITH_TAIL:
        assert named == size, "every byte has a name"


# C pads these at the end, and kvm_run and gunyah_vcpu_run before their unions.
_WITH_TAIL = {kvm_run.RunMmio, gunyah.VcpuRunMmio, gunyah.VcpuRunPageFault, gunyah.VcpuRun}


# A field that does not fit is refused, not cut; ctypes alone would store what is left of it.
@pytest.mark.parametrize(("values", "named", "told"), [
    ((1 << 64,), {}, "VmBootContext.reg: 0x10000000000000000 does not fit 32 bits"),
    ((), {"reg": 1 << 32}, "reg: 0x100000000 does not fit 32 bits"),
    ((0, 0, -(1 << 63) - 1), {}, "value: -0x8000000000000001 does not fit 64 bits"),
    ((), {"register": 1}, "has no field 'register'; there are reg, reserved, value")])
def test_what_does_not_fit_is_refused(values: tuple[int, ...], named: dict[str, int], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        gunyah.VmBootContext(*values, **named)


def test_a_negative_number_wraps_as_in_c() -> None:
    assert gunyah.MapMemArgs(0, 0, -1).guest_mem_fd == 0xFFFF_FFFF
    assert gunyah.FnIoeventfdArg(0, 0, 4, 0xFFFF_FFFF).fd == -1


# -- against this machine's headers ------------------------------------------------------------------------------------

# struct: the C name, the macro that the header has if it has the struct ("" if it always has), fields called otherwise in C.
KVM_STRUCTS = {
    uapi.CreateGuestMemfd: ("struct kvm_create_guest_memfd", "KVM_CREATE_GUEST_MEMFD", {}),
    uapi.UserspaceMemoryRegion: ("struct kvm_userspace_memory_region", "", {}),
    uapi.UserspaceMemoryRegion2: ("struct kvm_userspace_memory_region2", "KVM_SET_USER_MEMORY_REGION2", {}),
    uapi.MemoryAttributes: ("struct kvm_memory_attributes", "KVM_SET_MEMORY_ATTRIBUTES", {}),
    uapi.MemoryAttributes2: ("struct kvm_memory_attributes2", "KVM_SET_MEMORY_ATTRIBUTES2", {}),
    uapi.PreFaultMemory: ("struct kvm_pre_fault_memory", "KVM_PRE_FAULT_MEMORY", {}),
    uapi.DirtyLog: ("struct kvm_dirty_log", "", {}),
    uapi.OneReg: ("struct kvm_one_reg", "", {}),
    kvm.StatsHeader: ("struct kvm_stats_header", "KVM_GET_STATS_FD", {}),
    kvm.StatsDesc: ("struct kvm_stats_desc", "KVM_GET_STATS_FD", {}),
    kvm_run.KvmRun: ("struct kvm_run", "", {"exit": "padding", "sync_regs": "s"}),
    kvm_x86.Regs: ("struct kvm_regs", "__x86_64__", {}),
    kvm_x86.Segment: ("struct kvm_segment", "__x86_64__", {}),
    kvm_x86.Dtable: ("struct kvm_dtable", "__x86_64__", {}),
    kvm_x86.Sregs: ("struct kvm_sregs", "__x86_64__", {}),
    kvm_x86.CpuidEntry2: ("struct kvm_cpuid_entry2", "__x86_64__", {}),
    kvm_arm64.VcpuInit: ("struct kvm_vcpu_init", "__aarch64__", {}),
}
MEMORY_STRUCTS = {
    memory.CachestatRange: ("struct cachestat_range", "SYS_cachestat", {}),
    memory.Cachestat: ("struct cachestat", "SYS_cachestat", {}),
    memory.Iovec: ("struct iovec", "", {"base": "iov_base", "len": "iov_len"}),
    memory.Itimerspec: ("struct itimerspec", "", {
        "interval_sec": "it_interval.tv_sec", "interval_nsec": "it_interval.tv_nsec",
        "sec": "it_value.tv_sec", "nsec": "it_value.tv_nsec"}),
    memory.Sigevent: ("struct sigevent", "", {"value": "sigev_value", "signo": "sigev_signo", "notify": "sigev_notify",
                                              "tid": "_sigev_un._tid", "pad": "_sigev_un._pad[1]"}),
}
STRUCTS = KVM_STRUCTS | MEMORY_STRUCTS
# Members of the run page's union: offsets from its beginning.
UNION = {
    kvm_run.RunMmio: ("mmio", {}), kvm_run.RunIo: ("io", {}), kvm_run.RunHypercall: ("hypercall", {"flags": "longmode"}),
    kvm_run.RunEmulationFailure: ("emulation_failure", {}),
    kvm_run.RunFailEntry: ("fail_entry", {}), kvm_run.RunSystemEvent: ("system_event", {}),
    kvm_run.RunMemoryFault: ("memory_fault", {}),
}
GUARDS = {kvm_run.RunMemoryFault: "KVM_EXIT_MEMORY_FAULT",
          kvm_run.RunEmulationFailure: "KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES"}
NAMES = {
    **{name: number for name, (number, _) in COMMANDS.items() if "GUNYAH" not in name and "ARM" not in name},
    **{f"KVM_CAP_{cap.name}": int(cap) for cap in uapi.Cap},
    **{f"KVM_MEM_{flag.name}": int(flag) for flag in uapi.MemFlag},
    **{f"GUEST_MEMFD_FLAG_{flag.name}": int(flag) for flag in uapi.GuestMemfdFlag},
    **{f"KVM_STATS_TYPE_{kind.name}": int(kind) for kind in kvm.StatsType},
    "KVM_MEMORY_ATTRIBUTE_PRIVATE": uapi.PRIVATE, "KVM_MEMORY_EXIT_FLAG_PRIVATE": uapi.PRIVATE,
    "KVM_EXIT_MMIO": 6, "KVM_EXIT_INTR": 10, "KVM_EXIT_MEMORY_FAULT": 39, "EHWPOISON": EHWPOISON,
    **{f"MADV_{advice.name}": int(advice) for advice in Advice},
    **{f"SYS_{name}": number for name, number in (memory.numbers()._asdict().items() if KNOWN else ())},
    "SECRETMEM_MAGIC": memfd_secret.SECRETMEM_MAGIC, "O_CLOEXEC": int(memfd_secret.SecretFlag.CLOEXEC),
    "SIGEV_THREAD_ID": memory.SIGEV_THREAD_ID,
}
KVM_HEADER, GCC = Path("/usr/include/linux/kvm.h"), shutil.which("gcc")


def _source() -> str:
    lines = ["#define _GNU_SOURCE", "#include <stddef.h>", "#include <stdio.h>", "#include <errno.h>", "#include <fcntl.h>",
             "#include <signal.h>", "#include <time.h>", "#include <sys/mman.h>", "#include <sys/syscall.h>",
             "#include <sys/uio.h>", "#include <sys/ioctl.h>", "#include <linux/mman.h>", "#include <linux/magic.h>",
             "#include <linux/kvm.h>", "int main(void) {"]

    def row(key: str, value: str, guard: str) -> None:
        lines.extend([f"#ifdef {guard}"] * bool(guard))
        lines.append(f'printf("{key} %llu\\n", (unsigned long long)({value}));')
        lines.extend(["#endif"] * bool(guard))

    for struct, (c_name, guard, other) in STRUCTS.items():
        row(struct.__name__, f"sizeof({c_name})", guard)
        for name, *_ in struct._fields_:
            field = other.get(name, name)
            row(f"{struct.__name__}.{name}", f"offsetof({c_name}, {field})", guard)
    for struct, (member, other) in UNION.items():
        guard = GUARDS.get(struct, "")
        for name, *_ in struct._fields_:
            row(f"{struct.__name__}.{name}", f"offsetof(struct kvm_run, {member}.{other.get(name, name)})", guard)
    row("SignalMask.sigset", "offsetof(struct kvm_signal_mask, sigset)", "")
    row("Cpuid2.entries", "offsetof(struct kvm_cpuid2, entries)", "__x86_64__")
    for name in NAMES:
        row(name, name, name)
    return "\n".join([*lines, "}"])


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    if GCC is None or not KVM_HEADER.exists():
        pytest.skip("needs gcc" if GCC is None else f"needs {KVM_HEADER}")
    folder = tmp_path_factory.mktemp("abi")
    (folder / "rows.c").write_text(_source())
    subprocess.run([GCC, "-o", folder / "rows", folder / "rows.c"], check=True, timeout=600)
    out = subprocess.run([folder / "rows"], check=True, capture_output=True, text=True, timeout=600).stdout
    return {name: int(value) for name, value in (line.split() for line in out.splitlines())}


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_layout_is_the_header_s(header: dict[str, int], struct: type[ctypes.Structure]) -> None:
    if struct.__name__ not in header:
        pytest.skip(f"{STRUCTS[struct][0]} is not in this machine's headers, which lack {STRUCTS[struct][1]}")
    assert ctypes.sizeof(struct) == header[struct.__name__]
    assert all(getattr(struct, name).offset == header[f"{struct.__name__}.{name}"] for name, *_ in struct._fields_)


@pytest.mark.parametrize("struct", UNION, ids=lambda struct: struct.__name__)
def test_exits_lie_where_the_header_has_them(header: dict[str, int], struct: type[ctypes.Structure]) -> None:
    names = [f"{struct.__name__}.{name}" for name, *_ in struct._fields_]
    if names[0] not in header:
        pytest.skip(f"kvm_run.{UNION[struct][0]} is not in this machine's headers")
    assert [kvm_run.KvmRun.exit.offset + getattr(struct, name.split(".")[1]).offset for name in names] == [
        header[n] for n in names]


def test_a_signal_mask_follows_its_length_at_once(header: dict[str, int]) -> None:
    assert kvm.SignalMask.sigset.offset == header["SignalMask.sigset"]


def test_cpuid_entries_follow_their_number_at_once(header: dict[str, int]) -> None:
    if "Cpuid2.entries" in header:
        assert kvm_x86.Cpuid2.entries.offset == header["Cpuid2.entries"]


@pytest.mark.parametrize("name", NAMES)
def test_constant_is_the_header_s(header: dict[str, int], name: str) -> None:
    if name not in header:
        pytest.skip(f"{name} is not in this machine's headers")
    assert NAMES[name] == header[name]
