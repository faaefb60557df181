"""Lives of a VMM on an emulated machine: calls in any order, right and wrong arguments, on what is open and what is not.

After each life everything is closed, the laws have been kept, and the audit of the machine finds nothing that is left.
"""

from __future__ import annotations

import errno
import random
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

from fuzz.kind import Kind
from guest_memfd.asm.arm64.asm import assemble
from guest_memfd.errors import BadInput, Signalled, SyscallFailed
from guest_memfd.testing.hosts import Emulated
from guest_memfd.uapi.gunyah import FnType, FnVcpuArg, MapFlag
from guest_memfd.uapi.kvm import PRIVATE, SHARED, MemoryAttributes2

PAGE, RAM, PAGES, CALLS = 4096, 0x8000_0000, 6, 24
SLICE = 0.002
"""Seconds for which a guest may run."""

ODD = (-1, 1, 7, PAGE - 1, PAGE + 1, 1 << 31, 1 << 32, 1 << 52, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 1 << 70)

EHWPOISON = 133
DOCUMENTED = {
    errno.EAGAIN, errno.EBADF, errno.EBUSY, errno.EEXIST, errno.EFAULT, errno.EFBIG, errno.EINTR, errno.EINVAL, errno.EIO,
    errno.ENODEV, errno.ENOENT, errno.ENOMEM, errno.ENOTTY, errno.EOPNOTSUPP, errno.EOVERFLOW, errno.EPERM, EHWPOISON,
}
"""errno values that a call may return at all."""

GUEST = """
        str     x0, [x1]
        ldr     x3, [x1]
        str     x3, [x2]
        hvc     #0
        b       .
"""


class Lives(Kind):
    """Lives on one of the hypervisors."""

    hypervisor: str

    def __init__(self) -> None:
        self.host: Emulated | None = None
        self.code = assemble(GUEST, RAM).data

    def try_one(self, choose: random.Random, said: list[str]) -> str | None:
        """Calls, each of which returns, fails with an errno that calls have, or is a signal."""
        if self.host is None:
            self.host = Emulated(self.hypervisor, ram=64 << 20)
        try:
            wrong = self._live(self.host, choose, said)
        except BaseException:
            self.host = None
            raise
        left = self.host.left()
        if wrong or left:
            self.host = None                            # the next life starts on a new machine
        return wrong or (f"left behind: {left}" if left else None)

    def _live(self, host: Emulated, choose: random.Random, said: list[str]) -> str | None:
        held: dict[str, list[Any]] = {"device": [host.machine.open(host.device, host.design)]}
        wrong = None
        for _ in range(choose.randrange(1, CALLS)):
            try:
                name, call = self.call(choose, held)
            except BadInput as error:                   # a structure of the UAPI, and a number that it has no room for
                said.append(str(error))
                continue
            said.append(name)
            try:
                call()
            except SyscallFailed as error:
                said[-1] += f" = -{errno.errorcode.get(error.errno, error.errno)}"
                if error.errno not in DOCUMENTED:
                    wrong = f"{name}: errno {error.errno}"
                    break
            except (Signalled, BadInput) as error:
                said[-1] += f": {error}"
        everything = [thing for things in held.values() for thing in things]
        choose.shuffle(everything)
        for thing in everything:
            thing.close()
        return wrong

    @abstractmethod
    def call(self, choose: random.Random, held: dict[str, list[Any]]) -> tuple[str, Callable[[], Any]]:
        """A call in words, and how to make it; what it opens is held."""


def number(choose: random.Random, *usual: int) -> int:
    """A right argument most of the time."""
    return choose.choice(ODD) if choose.random() < 0.15 else choose.choice(usual)


def pages(choose: random.Random) -> int:
    """Bytes, page by page."""
    return number(choose, *(n * PAGE for n in range(PAGES + 1)))


# Calls *method* of something of *kind*, and holds what it returns as *more*.
def _on(
    choose: random.Random, held: dict[str, list[Any]], kind: str, method: str, *args: Any, more: str = "", **named: Any,
) -> tuple[str, Callable[[], Any]]:
    thing = choose.choice(held[kind])

    def made() -> None:
        result = getattr(thing, method)(*args, **named)
        if more and result is not None:
            held.setdefault(more, []).append(result)

    shown = ", ".join([*map(_short, args), *(f"{key}={_short(value)}" for key, value in named.items())])
    return f"{kind} {held[kind].index(thing)}.{method}({shown})", made


def _short(value: Any) -> str:
    return f"{value:#x}" if type(value) is int else type(value).__name__ if hasattr(value, "close") else repr(value)[:60]


def of_file(choose: random.Random, held: dict[str, list[Any]]) -> list[Callable[[], tuple[str, Callable[[], Any]]]]:
    """What can be done with a file and its mappings."""
    on = partial(_on, choose, held)
    mode = number(choose, 1, 3, 0, 2, 0x10)
    return [
        *([lambda: on("file", "fallocate", mode, pages(choose), pages(choose)),
           lambda: on("file", "punch_hole", pages(choose), pages(choose)),
           lambda: on("file", "mmap", pages(choose), pages(choose), shared=choose.random() < 0.9, more="mapping"),
           lambda: on("file", "mmap", more="mapping"), lambda: on("file", "fstat"), lambda: on("file", "close")]
          if "file" in held else []),
        *([lambda: on("mapping", "read", pages(choose), number(choose, 8, PAGE, 3 * PAGE)),
           lambda: on("mapping", "write", pages(choose), b"data" * choose.choice((1, 2, 1024))),
           lambda: on("mapping", "close")] if "mapping" in held else []),
    ]


class KvmLives(Lives):
    """Of /dev/kvm."""

    name, hypervisor = "kvm", "kvm"

    def call(self, choose: random.Random, held: dict[str, list[Any]]) -> tuple[str, Callable[[], Any]]:
        """As said."""
        on = partial(_on, choose, held)
        does = [lambda: on("device", "create_vm", number(choose, 0, 0, 0, 1 << 31), more="vm"),
                lambda: on("device", "check_extension", number(choose, *range(250)))]
        if "vm" in held:
            flags = number(choose, SHARED, 0, 1, 3)
            file = choose.choice([*held.get("file", []), *held["vm"]])
            does += [
                lambda: on("vm", "create_guest_memfd", pages(choose), flags, more="file"),
                lambda: on("vm", "create_vcpu", number(choose, 0, 1), more="vcpu"),
                lambda: on("vm", "set_user_memory_region2", number(choose, 0, 1, 2), number(choose, 4, 4, 4, 0, 1, 2),
                           RAM + pages(choose), pages(choose), guest_memfd=file, guest_memfd_offset=pages(choose),
                           userspace_addr=number(choose, 0, *(m.address for m in held.get("mapping", []) if not m.closed))),
                lambda: on("vm", "set_memory_attributes", RAM + pages(choose), pages(choose), number(choose, 0, 8)),
                lambda: on("vm", "close"),
            ]
        if "file" in held:
            does += [lambda: on("file", "set_memory_attributes2", MemoryAttributes2(
                pages(choose), pages(choose), number(choose, PRIVATE, SHARED)))] * 2
        if "vcpu" in held:
            does += [
                lambda: on("vcpu", "run", SLICE), lambda: on("vcpu", "run", SLICE),
                lambda: on("vcpu", "set_one_reg", number(choose, *self._registers()), number(choose, RAM, RAM + PAGE, 0)),
                lambda: on("vcpu", "get_one_reg", number(choose, *self._registers())),
                lambda: on("vcpu", "answer", bytes(choose.randrange(10))), lambda: on("vcpu", "close"),
            ]
            if "mapping" in held:
                code = choose.choice((self.code, choose.randbytes(64)))
                does.append(lambda: on("mapping", "write", 0, code))
        return choose.choice([*does, *of_file(choose, held)])()

    @staticmethod
    def _registers() -> tuple[int, ...]:
        from guest_memfd.uapi import kvm_arm64

        return (kvm_arm64.PC, *list(kvm_arm64.X)[:4], kvm_arm64.VBAR_EL1)


class PkvmLives(KvmLives):
    """Of /dev/kvm in protected mode."""

    name, hypervisor = "pkvm", "pkvm"


class GunyahLives(Lives):
    """Of /dev/gunyah."""

    name, hypervisor = "gunyah", "gunyah"

    def call(self, choose: random.Random, held: dict[str, list[Any]]) -> tuple[str, Callable[[], Any]]:
        """As said."""
        on = partial(_on, choose, held)
        does = [lambda: on("device", "create_vm", number(choose, 0), more="vm"),
                lambda: on("device", "create_guest_mem", pages(choose), number(choose, 0, 1), more="file")]
        if "vm" in held:
            file = choose.choice([*held.get("file", []), *held["vm"]])
            flags = number(choose, *(int(flag) for flag in (
                MapFlag.ALLOW_RWX, MapFlag.ALLOW_RWX | MapFlag.UNMAP, MapFlag.FORCE_LEND, MapFlag.FORCE_SHARE)))
            odd = choose.randbytes(choose.randrange(300))
            arg = bytes(FnVcpuArg(choose.choice((0, 1, 7, 1 << 31)))) if choose.random() < 0.8 else odd
            kind = number(choose, *(int(kind) for kind in FnType))
            does += [
                *[lambda: on("vm", "map_mem", file, RAM + pages(choose), pages(choose), pages(choose), flags)] * 3,
                lambda: on("vm", "set_dtb_config", RAM + pages(choose), pages(choose)),
                lambda: on("vm", "set_boot_context", number(choose, *range(4)), RAM),
                lambda: on("vm", "start"), lambda: on("vm", "start"),
                lambda: on("vm", "add_vcpu", number(choose, 0, 1), more="vcpu"),
                lambda: on("vm", "add_function", kind, arg, more="vcpu" if kind == FnType.VCPU else "function"),
                lambda: on("vm", "remove_function", kind, arg),
                lambda: on("vm", "close"),
            ]
        if "vcpu" in held:
            does += [lambda: on("vcpu", "run"), lambda: on("vcpu", "close")]
        return choose.choice([*does, *of_file(choose, held)])()
