"""Who takes pages of a mapping by get_user_pages(), and who only copies through it; userfaultfd.

`USERS` is done to shared pages, to private ones, and to memfd_secret; there is a column of results for each.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable

from guest_memfd.linux.abi.memory import Iovec
from guest_memfd.linux.mapping import PAGE
from guest_memfd.probe.ask.calls import FAILED, attempt, call, load, store
from guest_memfd.probe.ask.child import Unfit
from guest_memfd.probe.ask.here import SECRET, SIZE, Here, punch
from guest_memfd.probe.ask.row import Row, among
from guest_memfd.uapi.kvm import SHARED

_TEXT = b"pinned page"
_FUTEX_WAIT, _FUTEX_PRIVATE = 0, 128


def _vm_copy(name: str, address: int) -> str:
    data = ctypes.create_string_buffer(len(_TEXT))
    # The remote side is what get_user_pages_remote() takes. The local one is only copied, and would tell nothing.
    local, remote = Iovec(ctypes.addressof(data), len(_TEXT)), Iovec(address, len(_TEXT))
    return f"{call(name, os.getpid(), local, 1, remote, 1, 0)} bytes"


def _proc_mem(here: Here, address: int, write: bool) -> str:
    fd = here.open("/proc/self/mem")
    return f"{os.pwrite(fd, _TEXT, address) if write else len(os.pread(fd, len(_TEXT), address))} bytes"


def _direct(here: Here, address: int, write: bool) -> str:
    fd = here.direct()
    done = attempt(lambda: call("pwrite64" if write else "pread64", fd, address, PAGE, 0))
    # The file system refuses O_DIRECT itself, so the answer says nothing about the pages.
    if done == "EINVAL":
        raise Unfit("O_DIRECT does not work in the folder for temporary files")
    return f"{done} bytes" if done.isdigit() else done


def _vmsplice(address: int) -> tuple[int, int]:
    ours, theirs = os.pipe()
    return ours, call("vmsplice", theirs, Iovec(address, PAGE), 1, 0)


def _ring() -> int:
    try:
        return call("io_uring_setup", 2, ctypes.create_string_buffer(120))
    except FAILED as error:
        # Forbidden or not built in: the question could not be put, which is no answer.
        raise Unfit(f"io_uring_setup: {error}") from error


def _register(address: int, nr: int = PAGE) -> None:
    ring = _ring()
    call("io_uring_register", ring, 0, Iovec(address, nr), 1)


# The value does not match, so a wait that could look at the word is EAGAIN.
def _futex(address: int, flags: int) -> None:
    call("futex", address, _FUTEX_WAIT | flags, 0x7FFFFFFF, None, None, 0)


def _read_into(address: int) -> str:
    ours, theirs = os.pipe()
    os.write(theirs, bytes(PAGE))
    return f"{call('read', ours, address, PAGE)} bytes"


def _write_from(address: int) -> str:
    _, theirs = os.pipe()
    return f"{call('write', theirs, address, PAGE)} bytes"


_COPIED = f"{len(_TEXT)} bytes"
_WHOLE = f"{PAGE} bytes"

# name: (in words, what is done to an address, result on shared pages, on private ones, on memfd_secret).
USERS: dict[str, tuple[str, Callable[[Here, int], object], str, str | None, str | None]] = {
    "process-vm-readv": ("process_vm_readv(2)", lambda _, at: _vm_copy("process_vm_readv", at), _COPIED, "EFAULT", "EFAULT"),
    "process-vm-writev": ("process_vm_writev(2)", lambda _, at: _vm_copy("process_vm_writev", at), _COPIED, "EFAULT",
                          "EFAULT"),
    # EIO and not EFAULT: access_remote_vm() came to no byte, and mem_rw() knows no more than that.
    "proc-mem-read": ("read of /proc/self/mem", lambda here, at: _proc_mem(here, at, False), _COPIED, "EIO", "EIO"),
    "proc-mem-write": ("write to /proc/self/mem", lambda here, at: _proc_mem(here, at, True), _COPIED, "EIO", "EIO"),
    "direct-write": ("write(2) from it with O_DIRECT", lambda here, at: _direct(here, at, True), _WHOLE, "EFAULT", "EFAULT"),
    "direct-read": ("read(2) into it with O_DIRECT", lambda here, at: _direct(here, at, False), _WHOLE, "EFAULT", "EFAULT"),
    "vmsplice": ("vmsplice(2)", lambda _, at: f"{_vmsplice(at)[1]} bytes", _WHOLE, "EFAULT", "EFAULT"),
    "io-uring": ("IORING_REGISTER_BUFFERS, a long-term pin", lambda _, at: _register(at), "ok", "EFAULT", "EFAULT"),
    # A shared futex is known by its page, and get_futex_key() takes that; a private one by its address alone.
    "futex": ("a shared futex", lambda _, at: _futex(at, 0), "EAGAIN", "EFAULT", "EFAULT"),
    "private-futex": ("a private futex", lambda _, at: _futex(at, _FUTEX_PRIVATE), "EAGAIN", None, "EAGAIN"),
    "read": ("read(2) into it", lambda _, at: _read_into(at), _WHOLE, "EFAULT", _WHOLE),
    "write": ("write(2) from it", lambda _, at: _write_from(at), _WHOLE, "EFAULT", _WHOLE),
}


def uses(here: Here, which: int | str, user: str) -> object:
    """One of `USERS`, of a mapping that has been stored to where it can be."""
    address = here.map(here.file(which))
    # A store to private pages would be SIGBUS, and nothing of the row would run.
    if which != 1:
        store(address, _TEXT)
    return USERS[user][1](here, address)


def punched_while_spliced(here: Here) -> str:
    """What pipe and mapping show of a page that is punched between vmsplice(2) and the read of the pipe."""
    fd = here.gmem()
    address = here.map(fd)
    store(address, _TEXT)
    pipe, _ = _vmsplice(address)
    punch(fd, 0, SIZE)
    return f"pipe {'old' if os.read(pipe, PAGE).startswith(_TEXT) else 'new'}, mapping {_shown(address)}"


def punched_while_registered(here: Here) -> str:
    """What a punch of a page registered with io_uring returns, and what the mapping shows."""
    fd = here.gmem()
    address = here.map(fd)
    store(address, _TEXT)
    ring = _ring()
    call("io_uring_register", ring, 0, Iovec(address, PAGE), 1)
    return f"{attempt(lambda: punch(fd, 0, SIZE))}, mapping {_shown(address)}"


def _shown(address: int) -> str:
    return "zero" if load(address, len(_TEXT)) == bytes(len(_TEXT)) else "old"


UFFD_MODES = {"missing": 1, "wp": 2, "minor": 4}
"""UFFDIO_REGISTER_MODE_*."""


def registers(here: Here, which: int | str, mode: str) -> None:
    """UFFDIO_REGISTER of a mapping of the file for one mode of userfaultfd."""
    try:
        # 1: UFFD_USER_MODE_ONLY, which takes no privileges. Whether a mapping can be registered does not depend on it.
        uffd = call("userfaultfd", 1 | os.O_CLOEXEC)
        call("ioctl", uffd, 0xC018AA3F, ctypes.create_string_buffer(struct.pack("<QQQ", 0xAA, 0, 0)))
    except FAILED as error:
        raise Unfit(f"userfaultfd: {error}") from error
    address = here.map(here.file(which))
    call("ioctl", uffd, 0xC020AA00, ctypes.create_string_buffer(struct.pack("<QQQQ", address, SIZE, UFFD_MODES[mode], 0)))


def _rows(prefix: str, which: int | str, what: str, column: int) -> list[Row]:
    rows = []
    for name, user in USERS.items():
        expect = (None, None, *user[2:])[column]
        if expect is not None:
            rows.append(Row(f"{prefix}.{name}", f"{user[0]} of {what}: {expect}", uses, (which, name), expect))
    return rows


ROWS = [
    *among(("gmem", "flag 1", "flag 2"), [
        *_rows("gup.shared", SHARED, "shared pages", 2),
        Row("gup.punch-spliced", "punching does not wait for a pin: the pipe keeps the old page, the mapping gets a new one",
            punched_while_spliced, (), "pipe old, mapping zero"),
        Row("gup.punch-registered", "punching does not wait for a long-term pin either", punched_while_registered, (),
            "ok, mapping zero"),
        *(Row(f"uffd.{mode}", f"userfaultfd cannot be registered, mode {mode}", registers, (SHARED, mode), "EINVAL")
          for mode in UFFD_MODES),
    ]),
    *among(("gmem", "flag 1"), _rows("gup.private", 1, "private pages", 3)),
]

SECRET_ROWS = among(("secretmem",), [
    *_rows("secret.gup", SECRET, "a memfd_secret", 4),
    *(Row(f"secret.uffd-{mode}", f"userfaultfd cannot be registered on memfd_secret, mode {mode}", registers, (SECRET, mode),
          "EINVAL")
      for mode in UFFD_MODES),
])
