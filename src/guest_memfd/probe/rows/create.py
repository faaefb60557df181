"""KVM_CREATE_VM and KVM_CREATE_GUEST_MEMFD: sizes, flags, where and by whom, and what the new descriptor is."""

from __future__ import annotations

import fcntl
import os
import resource
import socket

from guest_memfd.linux.mapping import PAGE
from guest_memfd.probe.ask.calls import KEEP_SIZE, call, load, store
from guest_memfd.probe.ask.child import Unfit
from guest_memfd.probe.ask.here import SIZE, Here, create, resident
from guest_memfd.probe.ask.row import SINCE_6_1, Row, among
from guest_memfd.uapi import kvm
from guest_memfd.uapi.kvm import SHARED

_GB = 1 << 30


def vm_of_type(here: Here, kind: int) -> None:
    """KVM_CREATE_VM with *kind* as the type of the VM."""
    call("ioctl", here.kvm, kvm.CREATE_VM, kind)


def file_of(here: Here, size: int, flags: int) -> None:
    """KVM_CREATE_GUEST_MEMFD of *size* bytes, which need not be valid, nor need *flags*."""
    create(here.vm, size, flags)


def costs_nothing(here: Here, size: int) -> str:
    """Pages that a new file has."""
    return f"{resident(here.gmem(0, size))} pages"


def reserved_words(here: Here) -> None:
    """All six reserved words set."""
    argument = kvm.CreateGuestMemfd(SIZE, 0)
    argument.reserved[:] = [1 << 63] * 6
    call("ioctl", here.vm, kvm.CREATE_GUEST_MEMFD, argument)


def no_argument(here: Here) -> None:
    """KVM_CREATE_GUEST_MEMFD with a null pointer for its argument."""
    call("ioctl", here.vm, kvm.CREATE_GUEST_MEMFD, 0)


def on_the_device(here: Here) -> None:
    """KVM_CREATE_GUEST_MEMFD on /dev/kvm, where it is no ioctl."""
    create(here.kvm, SIZE, 0)


def on_a_vcpu(here: Here) -> None:
    """KVM_CREATE_GUEST_MEMFD on a vCPU, where it is no ioctl."""
    create(here.vcpu(), SIZE, 0)


def no_descriptor_left(here: Here) -> None:
    """KVM_CREATE_GUEST_MEMFD with every descriptor that RLIMIT_NOFILE allows in use."""
    vm = here.vm
    # dup(2) takes the lowest free number, so all below are in use.
    limit = os.dup(vm) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    create(vm, SIZE, 0)


def in_a_forked_child(here: Here, what: str) -> str:
    """By a process that shares the descriptors but not the address space that the VM was made in."""
    vm, vcpu, fd = here.vm, here.vcpu(), here.gmem()
    # KVM compares the caller's address space with the VM's before it looks at the call (kvm_vm_ioctl(),
    # kvm_vcpu_ioctl()): its MMU notifier is registered there. The file's own methods do not care who calls.
    return here.fork({
        "create": lambda: create(vm, SIZE, 0),
        "check-extension": lambda: call("ioctl", vm, kvm.CHECK_EXTENSION, kvm.Cap.GUEST_MEMFD),
        "run": lambda: call("ioctl", vcpu, kvm.RUN, 0),
        "allocate": lambda: call("fallocate", fd, KEEP_SIZE, 0, SIZE) or None,
        "map": lambda: load(here.map(fd)).hex(),
    }[what])


def after_the_vm(here: Here) -> str:
    """Allocate when the VM's descriptor has been closed."""
    vm = here.another_vm()
    fd = here.gmem(0, vm=vm)
    os.close(vm)
    call("fallocate", fd, KEEP_SIZE, 0, SIZE)
    return f"{resident(fd)} pages"


# -- the descriptor ----------------------------------------------------------------------------------------------------


def control(here: Here, which: int | str, command: int, argument: int) -> str | None:
    """fcntl(2); what it returns, None for 0 of a command that sets something."""
    value = call("fcntl", here.file(which), command, argument)
    return hex(value) if command in (fcntl.F_GETFD, fcntl.F_GETFL) else None


def through_exec(here: Here, which: int | str) -> str:
    """Whether a program that is exec'ed has the descriptor."""
    fd = here.file(which)
    if not os.access("/bin/sh", os.X_OK):
        raise Unfit("no /bin/sh to exec")

    def become() -> None:
        os.execv("/bin/sh", ["sh", "-c", f"test -e /proc/self/fd/{fd}"])

    pid = os.fork()
    if pid == 0:
        become()
    return "there" if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 else "gone"


def sent_over_a_socket(here: Here, which: int | str) -> str:
    """SCM_RIGHTS: whether the mapping of the descriptor that arrives shows the same bytes."""
    fd = here.file(which)
    address = here.map(fd)
    store(address, b"sent")
    ours, theirs = socket.socketpair()
    socket.send_fds(ours, [b"x"], [fd])
    _, arrived, _, _ = socket.recv_fds(theirs, 1, 1)
    if not arrived:
        raise Unfit("no descriptor left to receive one with")
    return load(here.map(arrived[0]), 4).decode()


def taken_by_pidfd(here: Here) -> str:
    """pidfd_getfd(2) of our own descriptor: whether its mapping shows the same bytes."""
    fd = here.gmem()
    store(here.map(fd), b"same")
    pidfd = call("pidfd_open", os.getpid(), 0)
    return load(here.map(call("pidfd_getfd", pidfd, fd, 0)), 4).decode()


def _flag_rules(flags: int) -> tuple[tuple[str, str | None], ...]:
    wanted = [f"flag {1 << bit}" for bit in range(64) if flags >> bit & 1]
    # One flag decides both ways. Of several, each that is missing refuses, and none alone makes it succeed.
    if len(wanted) == 1:
        return ((wanted[0], "ok"), (f"no {wanted[0]}", "EINVAL"))
    return tuple((f"no {name}", "EINVAL") for name in wanted)


BAD_SIZES = {"0": 0, "1": 1, "512": 512, "below-a-page": PAGE - 1, "above-a-page": PAGE + 1, "max-signed": (1 << 63) - 1,
             "min-signed": 1 << 63, "negative-page": (1 << 64) - PAGE}
GOOD_SIZES = {"a-page": PAGE, "2M": 2 << 20, "1G-and-a-page": _GB + PAGE, "1T": 1 << 40, "largest": (1 << 63) - PAGE}

CREATE = [
    *(Row(f"create.size-{name}", f"a size of {size:#x} is no positive multiple of a page, and is refused", file_of,
          (size, 0), "EINVAL") for name, size in BAD_SIZES.items()),
    *(Row(f"create.size-{name}", f"a file of {size:#x} bytes can be made, whatever memory there is", file_of, (size, 0),
          "ok")
      for name, size in GOOD_SIZES.items()),
    Row("create.costs-nothing", "a new file of 1 TiB has no page", costs_nothing, (1 << 40,), "0 pages"),
    Row("create.flags-0", "a file without flags can be made", file_of, (SIZE, 0)),
    *(Row(f"create.flags-{flags}", f"flags {flags} are accepted iff KVM_CAP_GUEST_MEMFD_FLAGS has them", file_of,
          (SIZE, flags), "ok", rules=_flag_rules(flags)) for flags in (1, 2, 3)),
    *(Row(f"create.flag-{flag:#x}", f"flag {flag:#x} is refused unless KVM_CAP_GUEST_MEMFD_FLAGS has it", file_of,
          (SIZE, flag), "EINVAL", rules=_flag_rules(flag)) for flag in (4, 8, 16, 1 << 31, 1 << 32, 1 << 63)),
    Row("create.flags-all", "all flags at once are refused", file_of, (SIZE, (1 << 64) - 1), "EINVAL"),
    Row("create.reserved", "the six reserved words of the argument are not looked at", reserved_words),
    Row("create.null", "a null argument is a fault", no_argument, (), "EFAULT"),
    Row("create.on-device", "a guest_memfd is made by a VM, not by /dev/kvm", on_the_device, (), "EINVAL"),
    Row("create.on-vcpu", "a guest_memfd is made by a VM, not by a vCPU", on_a_vcpu, (), "EINVAL", ("vcpu",)),
    Row("create.emfile", "without a free descriptor no file is made", no_descriptor_left, (), "EMFILE"),
    Row("create.outlives-vm", "a guest_memfd serves fallocate(2) when its VM's descriptor is closed", after_the_vm, (),
        "4 pages"),
    *(Row(f"fork.{what}", says, in_a_forked_child, (what,), expect, ("vcpu", "flag 1", "flag 2")) for what, says, expect in (
        ("create", "a forked child, in another address space, cannot make a guest_memfd of its parent's VM", "EIO"),
        ("check-extension", "not even KVM_CHECK_EXTENSION of a VM works in a forked child", "EIO"),
        ("run", "a forked child cannot run its parent's vCPU", "EIO"),
        ("allocate", "the guest_memfd itself goes on working in a forked child: fallocate(2)", "ok"),
        ("map", "the guest_memfd itself goes on working in a forked child: mmap(2) and a load", "00"))),
]

DESCRIPTOR = [
    Row("fd.cloexec", "a new guest_memfd has no FD_CLOEXEC", control, (0, fcntl.F_GETFD, 0), "0x0"),
    Row("fd.exec", "a guest_memfd survives exec", through_exec, (0,), "there"),
    # O_LARGEFILE is another bit on arm64 than on x86.
    Row("fd.getfl", "a guest_memfd is open for reading and writing", control, (0, fcntl.F_GETFL, 0), "0x8002",
        rules=(("arm64", "0x20002"),)),
    Row("fd.get-seals", "a guest_memfd has no seals", control, (0, fcntl.F_GET_SEALS, 0), "EINVAL"),
    Row("fd.add-seals", "a guest_memfd takes no seals", control, (0, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE), "EINVAL"),
    Row("fd.append", "O_APPEND can be set, and means nothing", control, (0, fcntl.F_SETFL, os.O_APPEND)),
    Row("fd.nonblock", "O_NONBLOCK can be set, and means nothing", control, (0, fcntl.F_SETFL, os.O_NONBLOCK)),
    Row("fd.direct", "O_DIRECT cannot be set", control, (0, fcntl.F_SETFL, os.O_DIRECT), "EINVAL"),
    Row("fd.pipe-size", "a guest_memfd is no pipe", control, (0, fcntl.F_GETPIPE_SZ, 0), "EBADF"),
    Row("fd.scm-rights", "a guest_memfd that arrives over a socket maps the same memory", sent_over_a_socket, (SHARED,),
        "sent"),
    Row("fd.pidfd-getfd", "a guest_memfd taken by pidfd_getfd(2) maps the same memory", taken_by_pidfd, (), "same"),
]

VM_TYPES = [
    Row(f"vm.type-{name}", f"VM type {name} is accepted iff KVM_CAP_VM_TYPES has it", vm_of_type, (kind,), expect,
        rules=((f"vm type {kind}", "ok"), ("x86-64", "EINVAL")) if kind < 6 else (), needs=("kvm", "x86-64"),
        settled=SINCE_6_1)
    for name, kind, expect in (("0", 0, "ok"), ("1", 1, "EINVAL"), ("6", 6, "EINVAL"), ("8", 8, "EINVAL"),
                               ("256", 256, "EINVAL"),
                               ("2-to-31", 1 << 31, "EINVAL"), ("2-to-40", 1 << 40, "EINVAL"))
]

ROWS = [*VM_TYPES, *among(("gmem",), [*CREATE, *DESCRIPTOR])]
