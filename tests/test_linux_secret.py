"""linux/secret.py against the kernel's memfd_secret(2): what it can do, and every limit that its file claims.

A touched page splits the direct map for good, so these tests touch as few as they can.
"""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Iterator
from errno import EAGAIN, EBADF, EFAULT, EINVAL, EMFILE, ENOSYS, EOPNOTSUPP
from mmap import MAP_POPULATE

import pytest
from linux_driver import errno_of, fails, in_child, limit, lowest_free

from guest_memfd.errors import HostUnavailable, Signalled, SyscallFailed
from guest_memfd.linux import syscall
from guest_memfd.linux.abi.memfd_secret import SECRETMEM_MAGIC
from guest_memfd.linux.abi.memory import Iovec, numbers
from guest_memfd.linux.guest_x86 import RESULT, SmallGuest
from guest_memfd.linux.mapping import BUS_ADRERR, PAGE, LinuxMapping
from guest_memfd.linux.secret import Secret
from guest_memfd.linux.system import System
from guest_memfd.uapi.kvm_run import Unknown
from guest_memfd.uapi.memory import FALLOC_FL_KEEP_SIZE, Advice


def why_not() -> str:
    try:
        Secret(0).close()
    except (HostUnavailable, SyscallFailed) as error:
        return str(error)
    return ""


REASON = why_not()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)


@pytest.fixture
def secret() -> Iterator[Secret]:
    with Secret(2 * PAGE) as secret:
        yield secret


def test_size_is_set_once(secret: Secret) -> None:
    assert secret.fstat().size == secret.size == 2 * PAGE
    for size in (0, PAGE, 2 * PAGE, 3 * PAGE):
        with fails(EINVAL):
            secret.truncate(size)
    assert secret.size == 2 * PAGE
    with Secret(0) as empty:
        empty.truncate(0)
        empty.truncate(PAGE + 1)
        with fails(EINVAL):
            empty.truncate(PAGE + 1)


def test_flags_and_inheritance(secret: Secret) -> None:
    assert not os.get_inheritable(secret.fileno())
    with Secret(PAGE, 0) as without:
        assert not os.get_inheritable(without.fileno()), "we close it on exec ourselves"
    for bit in (0, 2, 11, 31):
        with fails(EINVAL):
            Secret(PAGE, 1 << bit)
    assert os.readlink(f"/proc/self/fd/{secret.fileno()}") == "/secretmem (deleted)"


def test_f_type(secret: Secret) -> None:
    raw = ctypes.create_string_buffer(256)
    assert syscall.libc.fstatfs(secret.fileno(), raw) == 0
    assert int.from_bytes(raw.raw[:8], "little") == SECRETMEM_MAGIC


def test_contents_go_through_a_mapping_only(secret: Secret) -> None:
    with secret.mmap() as mapping, secret.mmap(PAGE, PAGE) as second:
        mapping.write(PAGE - 3, b"secret")
        assert mapping.read(PAGE - 3, 6) == b"secret"
        assert second.read(0, 3) == b"ret"
        into = bytearray(6)
        mapping.readinto(PAGE - 3, into)
        assert into == b"secret"
    for use in (lambda: os.read(secret.fileno(), 1), lambda: os.write(secret.fileno(), b"x")):
        with pytest.raises(OSError, match="Invalid argument"):
            use()
    with fails(EOPNOTSUPP):
        syscall.fallocate(secret.fileno(), FALLOC_FL_KEEP_SIZE, 0, PAGE)
    with fails(EINVAL):
        secret.mmap(shared=False)


def test_get_user_pages_refuses_what_our_mapping_reads(secret: Secret) -> None:
    with secret.mmap() as mapping:
        mapping.write(0, b"ours")
        ours = ctypes.create_string_buffer(4)
        local, remote = Iovec(ctypes.addressof(ours), 4), Iovec(mapping.address, 4)
        assert syscall.libc.process_vm_readv(os.getpid(), ctypes.addressof(local), 1, ctypes.addressof(remote), 1, 0) == -1
        assert ctypes.get_errno() == EFAULT
        assert ours.raw == bytes(4)
        assert mapping.read(0, 4) == b"ours"


def test_a_touch_past_the_end_is_an_exception_at_the_exact_byte(secret: Secret) -> None:
    with secret.mmap(0, 4 * PAGE) as mapping:
        with pytest.raises(Signalled) as caught:
            mapping.write(PAGE + 50, b"y" * (2 * PAGE))
        assert (caught.value.signal, caught.value.address, caught.value.code) \
            == ("SIGBUS", mapping.address + 2 * PAGE, BUS_ADRERR)
        assert mapping.read(PAGE, PAGE) == bytes(50) + b"y" * (PAGE - 50)
        with pytest.raises(Signalled):
            mapping.read(3 * PAGE, 1)


# Until CVE-2026-93243 was fixed (7.2, and stable trees) a mapping was VM_LOCKED and counted at once; now its pages are.
def is_locked() -> bool:
    with Secret(PAGE) as secret, secret.mmap(), open("/proc/self/smaps") as file:
        lines = iter(file)
        flags = [next(line for line in lines if line.startswith("VmFlags:")) for line in lines if "secretmem" in line]
    return " lo" in flags[0]


def test_populate_does_nothing_and_most_advice_is_refused(secret: Secret) -> None:
    def locked() -> int:
        """kB that are there, of all mappings of the file."""
        with open("/proc/self/smaps") as file:
            lines = iter(file)
            return sum(int(next(line for line in lines if line.startswith("Rss:")).split()[1])
                       for line in lines if "secretmem" in line)

    with LinuxMapping(secret, 0, 2 * PAGE, flags=MAP_POPULATE) as mapping:
        assert locked() == 0
        mapping.write(0, b"x")
        assert locked() == PAGE // 1024
        errors = [errno_of(lambda advice=advice: mapping.advise(advice))
                  for advice in (Advice.POPULATE_READ, Advice.POPULATE_WRITE, Advice.REMOVE, Advice.DONTNEED)]
        assert errors == [EINVAL, EINVAL, *((EINVAL, EINVAL) if is_locked() else (EOPNOTSUPP, 0))]
        assert mapping.read(0, 1) == b"x"


def test_a_mapping_counts_against_what_may_be_locked(secret: Secret) -> None:
    def maps() -> int:
        limit = 4 * PAGE
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
        if os.geteuid() == 0:
            os.setresuid(65534, 65534, 65534)           # and with it CAP_IPC_LOCK goes
        with secret.mmap(0, 4 * PAGE):
            pass
        with secret.mmap(0, 2 * PAGE), secret.mmap(0, 2 * PAGE):
            codes = [errno_of(lambda nr=nr: secret.mmap(0, nr).close()) for nr in (1, PAGE, 5 * PAGE)]
        return 0 if codes == [refused] * 3 else 1

    refused = EAGAIN if is_locked() else 0
    assert in_child(maps) == 0


def test_a_child_shares_it(secret: Secret) -> None:
    with secret.mmap() as mapping:
        assert in_child(lambda: mapping.write(0, b"child") or 0) == 0
        assert mapping.read(0, 5) == b"child"


def test_no_more_descriptors() -> None:
    with limit(resource.RLIMIT_NOFILE, lowest_free()), fails(EMFILE):
        Secret(PAGE)


def test_used_after_close(secret: Secret) -> None:
    mapping = secret.mmap()
    secret.close()
    secret.close()
    mapping.write(0, b"the mapping stays")
    mapping.close()
    mapping.close()
    for use in (lambda: mapping.read(0, 1), secret.mmap, secret.fstat, lambda: secret.truncate(0)):
        with fails(EBADF):
            use()


def test_a_kernel_without_it_is_said_to_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        def syscall(self, number: ctypes.c_long, *arguments: object) -> int:
            assert number.value == numbers().memfd_secret
            ctypes.set_errno(ENOSYS)
            return -1

    monkeypatch.setattr(syscall, "libc", Libc())
    with pytest.raises(HostUnavailable, match="memfd_secret"):
        Secret(PAGE)


def test_a_guest_cannot_have_it_because_kvm_takes_pages_by_get_user_pages(secret: Secret) -> None:
    gpa = 0x100_0000
    try:
        system = System()
    except HostUnavailable as error:
        pytest.skip(str(error))
    with system, secret.mmap() as mapping, SmallGuest(system) as guest:
        mapping.write(0, b"not you!")
        guest.vm.set_user_memory_region(1, 0, gpa, 2 * PAGE, mapping.address)
        guest.start(bytes.fromhex("488b07" "488906" "ebfe"), rdi=gpa, rsi=RESULT)  # mov rax, [rdi]; mov [rsi], rax; jmp .
        assert guest.vcpu.run(5) == Unknown(0, EFAULT)
