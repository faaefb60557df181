"""What the calls of linux cost beside the same calls in C, in one process on the same descriptors.

    python bench/linux.py                   small calls, 1 GiB calls, safe touches, 256 pages of each kind of memory
    python bench/linux.py --secret-pages N  touch N pages of memfd_secret: this splits the direct map until the next boot

Needs /dev/kvm with guest_memfd on x86, gcc, and for the 1 GiB calls 2 GiB of free memory. Every line is the best of
several rounds in which C and Python take turns; the ratio is Python's to C's.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from guest_memfd.errors import BadInput, HostUnavailable
from guest_memfd.linux.guest_x86 import RESULT, SmallGuest
from guest_memfd.linux.mapping import PAGE
from guest_memfd.linux.secret import Secret
from guest_memfd.linux.system import System
from guest_memfd.linux.touch import direct_map, memfd, timed, touched
from guest_memfd.uapi.kvm import SHARED, MemFlag
from guest_memfd.uapi.memory import FALLOC_FL_KEEP_SIZE, Advice

GIB, GPA, SIZE = 1 << 30, 0x100_0000, 16 * PAGE
STORE_FOR_EVER = bytes.fromhex("488906" "ebfb")         # mov [rsi], rax; jmp the mov

C = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec / 1e9; }

#define LOOP(...) double start = now(); for (int i = 0; i < n; i++) { __VA_ARGS__; } return (now() - start) / n
#define MUST(x) if ((x) < 0) return -1

double create(int n, int vm, uint64_t size, uint64_t flags) {
    LOOP(uint64_t arg[8] = {size, flags}; int fd = ioctl(vm, 0xC040AED4, arg); MUST(fd);
         MUST(fcntl(fd, F_SETFD, FD_CLOEXEC)); close(fd));
}
double allocate(int n, int fd, uint64_t offset, uint64_t nr) { LOOP(MUST(fallocate(fd, 1, offset, nr))); }
double punch(int n, int fd, uint64_t offset, uint64_t nr) { LOOP(MUST(fallocate(fd, 3, offset, nr))); }
double allocate_punch(int n, int fd, uint64_t offset, uint64_t nr) {
    LOOP(MUST(fallocate(fd, 1, offset, nr)); MUST(fallocate(fd, 3, offset, nr)));
}
double bind(int n, int vm, int fd, uint64_t gpa, uint64_t size) {
    struct { uint32_t slot, flags; uint64_t gpa, size, user, offset; uint32_t fd, pad; uint64_t pads[14]; } r = {0};
    LOOP(r.slot = 1; r.flags = 4; r.gpa = gpa; r.size = size; r.fd = fd; MUST(ioctl(vm, 0x40A0AE49, &r));
         r.size = 0; MUST(ioctl(vm, 0x40A0AE49, &r)));
}
double run(int n, int vcpu) { LOOP(MUST(ioctl(vcpu, 0xAE80, 0))); }
double populate(int n, void *at, uint64_t nr) { LOOP(MUST(madvise(at, nr, 23))); }
double copy(int n, void *to, void *from, uint64_t nr) { LOOP(memmove(to, from, nr); __asm__ volatile("" ::: "memory")); }
"""


@contextmanager
def compiled() -> Iterator[ctypes.CDLL]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "c.c").write_text(C)
        out = Path(folder) / "c.so"
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", out, Path(folder) / "c.c"], check=True, timeout=60)
        library = ctypes.CDLL(str(out))
        for name in ("create", "allocate", "punch", "allocate_punch", "bind", "run", "populate", "copy"):
            getattr(library, name).restype = ctypes.c_double
        yield library


def u64(*values: int) -> list[ctypes.c_uint64]:
    return [ctypes.c_uint64(value) for value in values]


def line(name: str, c: float, python: float, goal: float | None, unit: float = 1e6) -> None:
    ratio = python / c
    word = "" if goal is None else f"  goal {goal:<5g}{'met' if ratio <= goal else 'MISSED'}"
    print(f"  {name:34}{c * unit:12.2f}{python * unit:12.2f}{ratio:8.2f}{word}", flush=True)


def turns(name: str, c: Callable[[int], float], python: Callable[[int], float], n: int, rounds: int,
          goal: float | None, unit: float = 1e6) -> None:
    best = [float("inf")] * 2
    for _ in range(rounds):
        for i, side in enumerate((c, python)):
            took = side(n)
            if took < 0:
                raise SystemExit(f"{name}: the call fails in C")
            best[i] = min(best[i], took)
    line(name, *best, goal, unit)


def small(library: ctypes.CDLL, guest: SmallGuest, rounds: int) -> None:
    print(f"small calls{'C, us':>35}{'Python, us':>12}{'ratio':>8}")
    vm, vcpu = guest.vm, guest.vcpu
    with vm.create_guest_memfd(SIZE, SHARED) as memory:
        fd = memory.fileno()

        def bind_unbind() -> None:
            vm.set_user_memory_region2(1, MemFlag.GUEST_MEMFD, GPA, SIZE, guest_memfd=memory)
            vm.set_user_memory_region2(1, MemFlag.GUEST_MEMFD, GPA, 0, guest_memfd=memory)

        def allocate_punch() -> None:
            memory.fallocate(FALLOC_FL_KEEP_SIZE, 0, PAGE)
            memory.punch_hole(0, PAGE)

        turns("create, close", lambda n: library.create(n, vm.fileno(), *u64(SIZE, SHARED)),
              lambda n: timed(n, lambda: vm.create_guest_memfd(SIZE, SHARED).close()), 300, rounds, 3)
        memory.allocate(0, SIZE)
        turns("fallocate, a page that is there", lambda n: library.allocate(n, fd, *u64(0, PAGE)),
              lambda n: timed(n, lambda: memory.fallocate(FALLOC_FL_KEEP_SIZE, 0, PAGE)), 3000, rounds, 3)
        memory.punch_hole(0, SIZE)
        turns("punch, nothing there", lambda n: library.punch(n, fd, *u64(0, PAGE)),
              lambda n: timed(n, lambda: memory.punch_hole(0, PAGE)), 3000, rounds, 3)
        turns("fallocate and punch, a page", lambda n: library.allocate_punch(n, fd, *u64(0, PAGE)),
              lambda n: timed(n, allocate_punch), 2000, rounds, 3)
        turns("bind, unbind", lambda n: library.bind(n, vm.fileno(), fd, *u64(GPA, SIZE)),
              lambda n: timed(n, bind_unbind), 100, rounds, 3)
    guest.start(STORE_FOR_EVER, rsi=RESULT)
    turns("KVM_RUN to an MMIO exit and back", lambda n: library.run(n, vcpu.fileno()),
          lambda n: timed(n, vcpu.run), 1000, rounds, 3)
    turns("the same, with a timeout", lambda n: library.run(n, vcpu.fileno()),
          lambda n: timed(n, lambda: vcpu.run(10.0)), 1000, rounds, None)


def large(library: ctypes.CDLL, guest: SmallGuest, rounds: int) -> None:
    print(f"1 GiB{'C, ms':>41}{'Python, ms':>12}{'ratio':>8}")
    if os.sysconf("SC_AVPHYS_PAGES") * PAGE < 2 * GIB:
        print("  left out: less than 2 GiB are free")
        return
    with guest.vm.create_guest_memfd(GIB, SHARED) as memory, memory.mmap() as mapping:
        fd = memory.fileno()

        def emptied(step: Callable[[], float]) -> Callable[[int], float]:
            def once(_: int) -> float:
                memory.punch_hole(0, GIB)
                return step()
            return once

        def filled(step: Callable[[], float]) -> Callable[[int], float]:
            def once(_: int) -> float:
                memory.allocate(0, GIB)
                return step()
            return once

        address = ctypes.c_void_p(mapping.address)
        turns("fallocate", emptied(lambda: library.allocate(1, fd, *u64(0, GIB))),
              emptied(lambda: timed(1, lambda: memory.allocate(0, GIB))), 1, rounds, 1.05, 1e3)
        turns("punch", filled(lambda: library.punch(1, fd, *u64(0, GIB))),
              filled(lambda: timed(1, lambda: memory.punch_hole(0, GIB))), 1, rounds, 1.05, 1e3)
        turns("MADV_POPULATE_WRITE", emptied(lambda: library.populate(1, address, *u64(GIB))),
              emptied(lambda: timed(1, lambda: mapping.advise(Advice.POPULATE_WRITE))), 1, rounds, 1.05, 1e3)


def touches(library: ctypes.CDLL, guest: SmallGuest, rounds: int) -> None:
    print(f"safe touches beside memmove(){'C, us':>17}{'Python, us':>12}{'ratio':>8}")
    top = 64 << 20
    ours = bytes(top)
    there = ctypes.c_void_p(ctypes.cast(ctypes.c_char_p(ours), ctypes.c_void_p).value)
    buffer = bytearray(top)
    here = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(buffer)))
    with guest.vm.create_guest_memfd(top, SHARED) as memory, memory.mmap() as mapping:
        mapping.advise(Advice.POPULATE_WRITE)
        address = ctypes.c_void_p(mapping.address)
        for name, size, n in (("8 bytes", 8, 3000), ("4 KiB", 4096, 3000), ("1 MiB", 1 << 20, 30), ("64 MiB", top, 2)):
            data, into = ours[:size], memoryview(buffer)[:size]
            turns(f"read {name}", lambda n, size=size: library.copy(n, here, address, *u64(size)),
                  lambda n, size=size: timed(n, lambda: mapping.read(0, size)), n, rounds, None)
            turns(f"readinto {name}", lambda n, size=size: library.copy(n, here, address, *u64(size)),
                  lambda n, into=into: timed(n, lambda: mapping.readinto(0, into)), n, rounds, None)
            turns(f"write {name}", lambda n, size=size: library.copy(n, address, there, *u64(size)),
                  lambda n, data=data: timed(n, lambda: mapping.write(0, data)), n, rounds, None)
            into.release()


def kinds(guest: SmallGuest, pages: int, rounds: int) -> None:
    print(f"first touch, {pages} pages{'touch, us/page':>26}{'free, us/page':>18}   direct map, kB")
    size = pages * PAGE

    base = 0.0
    for name, make, times in (("memfd", lambda: memfd(size), rounds),
                              ("guest_memfd", lambda: guest.vm.create_guest_memfd(size, SHARED), rounds),
                              ("memfd_secret", lambda: Secret(size), 1)):
        before = direct_map()
        try:
            seen = [touched(make(), size) for _ in range(times)]
        except HostUnavailable as error:
            print(f"  {name}: {error}")
            continue
        cost = min(one.fault(pages) for one in seen)
        base = base or cost
        free = min(one.freed(pages) for one in seen)
        moved = [f"{key[9:]} {value - before[key]:+}" for key, value in direct_map().items() if value != before[key]]
        print(f"  {name:22}{cost:10.2f} ({cost / base:5.1f}x){free:18.2f}   {', '.join(moved) or 'unchanged'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--secret-pages", type=int, default=256, metavar="N", help="pages of each kind of memory (256)")
    parser.add_argument("--rounds", type=int, default=7, help="in which C and Python take turns (7)")
    parser.add_argument("--quick", action="store_true", help="no 1 GiB calls")
    options = parser.parse_args()
    with ExitStack() as stack:
        try:
            guest = stack.enter_context(SmallGuest(stack.enter_context(System())))
        except (HostUnavailable, BadInput) as error:
            print(error, file=sys.stderr)
            sys.exit(error.exit_code)
        library = stack.enter_context(compiled())
        small(library, guest, options.rounds)
        if not options.quick:
            large(library, guest, options.rounds)
        touches(library, guest, options.rounds)
        kinds(guest, options.secret_pages, options.rounds)


if __name__ == "__main__":
    main()
