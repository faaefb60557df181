"""What a guest_memfd and a memfd_secret answer to the calls of a file: stat, read, seek, truncate, splice, reopen and so on.

`OPERATIONS` is done to guest_memfd with every combination of flags, and to memfd_secret; there is a column of results for
each.
"""

from __future__ import annotations

import ctypes
import os
import select
import stat as modes
import struct
import time
from collections.abc import Callable

from guest_memfd.linux.abi.memfd_secret import SECRETMEM_MAGIC
from guest_memfd.linux.abi.memory import Iovec
from guest_memfd.linux.mapping import PAGE
from guest_memfd.probe.ask.calls import AT_EMPTY_PATH, AT_FDCWD, KEEP_SIZE, call
from guest_memfd.probe.ask.here import SECRET, SIZE, Here, resident
from guest_memfd.probe.ask.row import Row, among
from guest_memfd.uapi import kvm

ANON_INODE_FS_MAGIC = 0x09041934
"""f_type of anon_inode (include/uapi/linux/magic.h)."""

_FIONREAD, _FIGETBSZ, _FIOCLEX, _GETFLAGS, _FICLONE = 0x541B, 2, 0x5451, 0x80086601, 0x40049409


def _buffer() -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(PAGE)


def _iovec(data: ctypes.Array[ctypes.c_char]) -> Iovec:
    return Iovec(ctypes.addressof(data), len(data))


def _pipe(full: bool = False) -> tuple[int, int]:
    ends = os.pipe()
    if full:
        os.write(ends[1], b"p" * PAGE)
    return ends


def _path(fd: int) -> bytes:
    return f"/proc/self/fd/{fd}".encode()


def _vector(name: str, fd: int, *more: int) -> int:
    data = _buffer()
    return call(name, fd, _iovec(data), 1, *more)


def _handle(fd: int) -> int:
    handle = ctypes.create_string_buffer(struct.pack("<Ii", 128, 0), 256)
    return call("name_to_handle_at", fd, b"", handle, ctypes.c_int(), AT_EMPTY_PATH)


def _epoll(fd: int) -> int:
    with select.epoll() as epoll:
        return call("epoll_ctl", epoll.fileno(), 1, fd, ctypes.create_string_buffer(struct.pack("<Iq", 1, 0)))


def _poll(fd: int) -> str:
    poll = select.poll()
    poll.register(fd, select.POLLIN | select.POLLOUT | select.POLLERR)
    ready = dict(poll.poll(0)).get(fd, 0)
    return "+".join(name for name in ("POLLIN", "POLLOUT", "POLLERR") if ready & getattr(select, name)) or "not ready"


def _reopen(fd: int, flags: int) -> None:
    os.close(os.open(_path(fd), flags))


def _link(fd: int) -> int:
    return call("linkat", AT_FDCWD, _path(fd), AT_FDCWD, f"/tmp/gmem-probe-{os.getpid()}".encode(), 0x400)


# name: (what it is in words, the call, result on guest_memfd, result on memfd_secret). A call takes (descriptor, Here).
OPERATIONS: dict[str, tuple[str, Callable[[int, Here], object], str | None, str | None]] = {
    # A file that no open(2) has made has no FMODE_PREAD, FMODE_PWRITE or FMODE_LSEEK: ESPIPE, before anyone looks for a
    # method. read(2) and write(2) get as far as the method that is missing: EINVAL, of 0 bytes, too.
    "read": ("read(2)", lambda fd, _: call("read", fd, _buffer(), PAGE), "EINVAL", "EINVAL"),
    "read-0": ("read(2) of 0 bytes", lambda fd, _: call("read", fd, _buffer(), 0), "EINVAL", None),
    "readv": ("readv(2)", lambda fd, _: _vector("readv", fd), "EINVAL", None),
    "write": ("write(2)", lambda fd, _: call("write", fd, b"w" * PAGE, PAGE), "EINVAL", "EINVAL"),
    "pread": ("pread(2)", lambda fd, _: call("pread64", fd, _buffer(), PAGE, 0), "ESPIPE", "ESPIPE"),
    "preadv": ("preadv(2)", lambda fd, _: _vector("preadv", fd, 0, 0), "ESPIPE", None),
    "pwrite": ("pwrite(2)", lambda fd, _: call("pwrite64", fd, b"w" * PAGE, PAGE, 0), "ESPIPE", "ESPIPE"),
    "pwrite-0": ("pwrite(2) of 0 bytes", lambda fd, _: call("pwrite64", fd, b"w", 0, 0), "ESPIPE", None),
    "pwritev": ("pwritev(2)", lambda fd, _: _vector("pwritev", fd, 0, 0), "ESPIPE", None),
    "seek-set": ("lseek(2) SEEK_SET", lambda fd, _: call("lseek", fd, 0, 0), "ESPIPE", "ESPIPE"),
    "seek-cur": ("lseek(2) SEEK_CUR", lambda fd, _: call("lseek", fd, 0, 1), "ESPIPE", None),
    "seek-end": ("lseek(2) SEEK_END", lambda fd, _: call("lseek", fd, 0, 2), "ESPIPE", None),
    "seek-data": ("lseek(2) SEEK_DATA", lambda fd, _: call("lseek", fd, 0, 3), "ESPIPE", None),
    "seek-hole": ("lseek(2) SEEK_HOLE", lambda fd, _: call("lseek", fd, 0, 4), "ESPIPE", None),
    # Size, mode, owner and times are all changed by way of setattr, and kvm_gmem_setattr() refuses whatever it is.
    "ftruncate-grow": ("ftruncate(2) to twice the size", lambda fd, _: call("ftruncate", fd, 2 * SIZE), "EINVAL", "EINVAL"),
    "ftruncate-shrink": ("ftruncate(2) to one page", lambda fd, _: call("ftruncate", fd, PAGE), "EINVAL", "EINVAL"),
    "ftruncate-same": ("ftruncate(2) to the size it has", lambda fd, _: call("ftruncate", fd, SIZE), "EINVAL", "EINVAL"),
    "ftruncate-0": ("ftruncate(2) to 0", lambda fd, _: call("ftruncate", fd, 0), "EINVAL", "EINVAL"),
    "fchmod": ("fchmod(2)", lambda fd, _: call("fchmod", fd, 0o644), "EINVAL", "ok"),
    "fchown": ("fchown(2) to the owner it has", lambda fd, _: call("fchown", fd, os.getuid(), os.getgid()), "EINVAL", None),
    "utime": ("futimens(2)", lambda fd, _: call("utimensat", fd, None, None, 0), "EINVAL", None),
    "setxattr": ("fsetxattr(2)", lambda fd, _: call("fsetxattr", fd, b"user.x", b"1", 1, 0), "EOPNOTSUPP", None),
    "getxattr": ("fgetxattr(2)", lambda fd, _: call("fgetxattr", fd, b"user.x", _buffer(), 9), "EOPNOTSUPP", None),
    "listxattr": ("flistxattr(2)", lambda fd, _: f"{call('flistxattr', fd, _buffer(), 99)} bytes", "0 bytes", None),
    "ioctl-unknown": ("an ioctl that no one knows", lambda fd, _: call("ioctl", fd, 0xDEAD, 0), "ENOTTY", "ENOTTY"),
    "fionread": ("FIONREAD", lambda fd, _: call("ioctl", fd, _FIONREAD, ctypes.c_int()), "ENOTTY", None),
    "getflags": ("FS_IOC_GETFLAGS", lambda fd, _: call("ioctl", fd, _GETFLAGS, ctypes.c_long()), "ENOTTY", None),
    "ioctl-kvm": ("KVM_GET_API_VERSION", lambda fd, _: call("ioctl", fd, kvm.GET_API_VERSION, 0), "ENOTTY", None),
    "attributes2": ("KVM_SET_MEMORY_ATTRIBUTES2",
                    lambda fd, _: call("ioctl", fd, kvm.SET_MEMORY_ATTRIBUTES2, kvm.MemoryAttributes2(size=PAGE)), "ENOTTY",
                    None),
    "figetbsz": ("FIGETBSZ", lambda fd, _: call("ioctl", fd, _FIGETBSZ, ctypes.c_int()), "ok", None),
    "fioclex": ("FIOCLEX", lambda fd, _: call("ioctl", fd, _FIOCLEX, 0), "ok", None),
    "fallocate-0": ("fallocate(2) of mode 0", lambda fd, _: call("fallocate", fd, 0, 0, PAGE), "EOPNOTSUPP", "EOPNOTSUPP"),
    "splice-out": ("splice(2) into a pipe", lambda fd, _: call("splice", fd, None, _pipe()[1], None, PAGE, 0), "EINVAL",
                   "EINVAL"),
    "splice-in": ("splice(2) from a pipe", lambda fd, _: call("splice", _pipe(True)[0], None, fd, None, PAGE, 0), "EINVAL",
                  "EINVAL"),
    # With an offset it is as pread(2); without one it would be refused by the missing method.
    "sendfile-from": ("sendfile(2) from it, with an offset",
                      lambda fd, here: call("sendfile", here.temporary(), fd, ctypes.c_int64(), PAGE), "ESPIPE", "ESPIPE"),
    "sendfile-to": ("sendfile(2) to it", lambda fd, here: call("sendfile", fd, _rewound(here), None, PAGE), "EINVAL", None),
    "copy-from": ("copy_file_range(2) to an ordinary file",
                  lambda fd, here: call("copy_file_range", fd, None, here.temporary(), None, PAGE, 0), "EXDEV", "EXDEV"),
    "copy-to": ("copy_file_range(2) from an ordinary file",
                lambda fd, here: call("copy_file_range", _rewound(here), None, fd, None, PAGE, 0), "EXDEV", "EXDEV"),
    "ficlone": ("FICLONE of an ordinary file", lambda fd, here: call("ioctl", fd, _FICLONE, here.temporary()), "EXDEV",
                None),
    # The file has no poll method. To poll(2) it is always ready (DEFAULT_POLLMASK); epoll takes none.
    "epoll": ("EPOLL_CTL_ADD", lambda fd, _: _epoll(fd), "EPERM", None),
    "poll": ("poll(2)", lambda fd, _: _poll(fd), "POLLIN+POLLOUT", None),
    # The inode has no open method but no_open(), which says ENXIO (fs/inode.c). O_PATH never calls it.
    "reopen-rw": ("open(2) of /proc/self/fd/N", lambda fd, _: _reopen(fd, os.O_RDWR), "ENXIO", "ENXIO"),
    "reopen-ro": ("open(2) of /proc/self/fd/N for reading", lambda fd, _: _reopen(fd, os.O_RDONLY), "ENXIO", "ENXIO"),
    "reopen-path": ("open(2) of /proc/self/fd/N with O_PATH", lambda fd, _: _reopen(fd, os.O_PATH), "ok", None),
    "linkat": ("linkat(2)", lambda fd, _: _link(fd), "EXDEV", None),
    "truncate": ("truncate(2) of /proc/self/fd/N", lambda fd, _: call("truncate", _path(fd), PAGE), "EINVAL", None),
    "execveat": ("execveat(2)",
                 lambda fd, _: call("execveat", fd, b"", ctypes.c_void_p(), ctypes.c_void_p(), AT_EMPTY_PATH), "EACCES",
                 None),
    "handle": ("name_to_handle_at(2)", lambda fd, _: _handle(fd), "EOPNOTSUPP", None),
    "fsync": ("fsync(2)", lambda fd, _: call("fsync", fd), None, "EINVAL"),
}


def _rewound(here: Here) -> int:
    fd = here.temporary()
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def operation(here: Here, which: int | str, name: str) -> object:
    """One of `OPERATIONS`, on a file of that kind; None for what returns 0."""
    result = OPERATIONS[name][1](here.file(which), here)
    return None if result == 0 else result


def copy_between(here: Here, flags: int) -> int:
    """copy_file_range(2) from one guest_memfd to another of the same VM."""
    return call("copy_file_range", here.gmem(flags), None, here.gmem(flags), None, PAGE, 0)


# -- what stat says ----------------------------------------------------------------------------------------------------

STAT: dict[str, tuple[str, Callable[[os.stat_result], object]]] = {
    "mode": ("the mode, in octal", lambda st: oct(st.st_mode)),
    "size": ("the size", lambda st: st.st_size),
    "block-size": ("the block size", lambda st: st.st_blksize),
    "blocks": ("the number of blocks, with every page allocated", lambda st: st.st_blocks),
    "links": ("the number of links", lambda st: st.st_nlink),
    "owner": ("the owner", lambda st: "creator" if (st.st_uid, st.st_gid) == (os.geteuid(), os.getegid()) else st.st_uid),
    "regular": ("the type", lambda st: "regular" if modes.S_ISREG(st.st_mode) else oct(modes.S_IFMT(st.st_mode))),
}


def status(here: Here, which: int | str, field: str) -> object:
    """A field of fstat(2), of a guest_memfd after all pages have been allocated."""
    fd = here.file(which)
    if which != SECRET:
        call("fallocate", fd, KEEP_SIZE, 0, SIZE)
    return STAT[field][1](os.fstat(fd))


def times_moved(here: Here) -> str:
    """Which times fallocate(2) moves; the clock of file systems goes by ticks, so some of them are waited for."""
    fd = here.gmem(0)
    before = os.fstat(fd)
    time.sleep(0.03)
    call("fallocate", fd, KEEP_SIZE, 0, SIZE)
    after = os.fstat(fd)
    names = ("atime", "mtime", "ctime")
    return " ".join(n for n in names if getattr(before, f"st_{n}_ns") != getattr(after, f"st_{n}_ns")) or "none"


def own_inode(here: Here) -> str:
    """Whether two files have two inodes."""
    return "two" if os.fstat(here.gmem(0)).st_ino != os.fstat(here.gmem(0)).st_ino else "one"


def fs_type(here: Here, which: int | str) -> str:
    """f_type of fstatfs(2) in hexadecimal: which file system the file says it is on."""
    found = ctypes.create_string_buffer(256)
    call("fstatfs", here.file(which), found)
    return hex(struct.unpack_from("<Q", found.raw)[0])


def link_text(here: Here, which: int | str) -> str:
    """Where the link /proc/self/fd/N points: the name that the kernel gave the file."""
    return os.readlink(_path(here.file(which))).decode()


def counted(here: Here) -> str:
    """Pages that cachestat(2) counts, after three have been allocated and one of them punched."""
    fd = here.gmem(0)
    call("fallocate", fd, KEEP_SIZE, 0, 3 * PAGE)
    call("fallocate", fd, KEEP_SIZE | 2, PAGE, PAGE)
    return f"{resident(fd)} pages"


_NOTHING = {"ok": "succeeds", "POLLIN+POLLOUT": "says ready", "0 bytes": "is empty"}

GMEM = [
    *(Row(f"file.{name}.flags-{flags}", f"{words} of a guest_memfd with flags {flags} "
          f"{_NOTHING.get(expect, 'is refused')}", operation, (flags, name), expect,
          tuple(f"flag {bit}" for bit in (1, 2) if flags & bit))
      for name, (words, _, expect, _) in OPERATIONS.items() if expect is not None for flags in range(4)),
    Row("file.copy-between", "copy_file_range(2) between two guest_memfd is refused", copy_between, (0,), "EINVAL"),
    *(Row(f"stat.{field}", f"fstat(2) of a guest_memfd: {STAT[field][0]}", status, (0, field), expect) for field, expect in (
        ("mode", "0o100600"), ("size", str(SIZE)), ("block-size", str(PAGE)), ("blocks", "0"), ("links", "1"),
        ("owner", "creator"), ("regular", "regular"))),
    Row("stat.times", "fallocate(2) moves mtime and ctime: it ends in file_modified()", times_moved, (), "mtime ctime"),
    Row("stat.inode", "every guest_memfd has an inode of its own", own_inode, (), "two"),
    Row("stat.filesystem", "fstatfs(2): anon_inode before 6.19, a file system of its own since", fs_type, (0,),
        hex(ANON_INODE_FS_MAGIC), rules=(("inodes of its own", "0x474d454d"),)),
    Row("stat.link", "/proc/self/fd/N of a guest_memfd", link_text, (0,), "anon_inode:[kvm-gmem]",
        rules=(("inodes of its own", "/[kvm-gmem] (deleted)"),)),
    Row("stat.cachestat", "cachestat(2) counts the pages of a guest_memfd exactly", counted, (), "2 pages"),
]

_SECRET = [
    *(Row(f"secret.{name}", f"{words} of a memfd_secret {_NOTHING.get(expect, 'is refused')}", operation, (SECRET, name),
          expect)
      for name, (words, _, _, expect) in OPERATIONS.items() if expect is not None),
    Row("secret.mode", "fstat(2) of a memfd_secret: the mode, in octal", status, (SECRET, "mode"), "0o100600"),
    Row("secret.filesystem", "fstatfs(2) of a memfd_secret", fs_type, (SECRET,), hex(SECRETMEM_MAGIC)),
    Row("secret.link", "/proc/self/fd/N of a memfd_secret", link_text, (SECRET,), "/secretmem (deleted)"),
]

ROWS = among(("gmem",), GMEM)
SECRET_ROWS = among(("secretmem",), _SECRET)
