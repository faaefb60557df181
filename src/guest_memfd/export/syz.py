"""The system calls of a trace as a program of syzkaller.

Syntax: syzkaller, docs/program_syntax.md; the calls are those of its descriptions of KVM (sys/linux/dev_kvm.txt). A touch of
the mapping is a getrandom(2) into it, because a program there can only make system calls.
"""

from __future__ import annotations

from collections.abc import Iterator

from guest_memfd.export.c import about
from guest_memfd.export.calls import TracedCall, calls
from guest_memfd.report.counterexample import Counterexample
from guest_memfd.uapi import kvm
from guest_memfd.uapi.memory import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from guest_memfd.words.scene import Scene
from guest_memfd.words.units import PAGE

_DATA, _WINDOW, _MAPPED = 0x7F0000000000, 0x7F0000400000, 0x7F0000800000
"""Where arguments lie, what slots name as the VMM's memory, and where the file is mapped."""
_STRIDE = 0x100
_AT_FDCWD = -100


def syz_program(example: Counterexample) -> Iterator[str]:
    """The lines; raises BadInput where the trace is not made of system calls."""
    made = calls(example)
    yield from (f"# {' '.join(line.split())}" for line in about(example))
    yield from _Program(example.scene).lines(made)


class _Program:
    # Every argument that is passed by reference gets a place of its own.

    def __init__(self, scene: Scene) -> None:
        self.scene, self._at = scene, _DATA
        self._slots: list[tuple[int, int, int]] = [(slot.gfn, slot.start, slot.nr) for slot in scene.slots]

    def lines(self, made: list[TracedCall]) -> Iterator[str]:
        size = self.scene.pages * PAGE
        yield f"r0 = openat$kvm({_hex(_AT_FDCWD)}, &({_hex(self._place())})='/dev/kvm\\x00', 0x2, 0x0)"
        yield f"r1 = ioctl$KVM_CREATE_VM(r0, {_hex(kvm.CREATE_VM)}, 0x0)"
        yield (f"r2 = ioctl$KVM_CREATE_GUEST_MEMFD(r1, {_hex(kvm.CREATE_GUEST_MEMFD)}, "
               f"{self._struct(_hex(size), _hex(kvm.SHARED))})")
        for number, slot in enumerate(self._slots):
            yield self._region(number, *slot)
        if any(call.what == "run" for call in made):
            yield f"r3 = ioctl$KVM_CREATE_VCPU(r1, {_hex(kvm.CREATE_VCPU)}, 0x0)"
        for call in made:
            yield f"# step {call.step}, {call.party}: {call.what}"
            yield from self._call(call)

    def _call(self, call: TracedCall) -> Iterator[str]:
        start, size = call.start * PAGE, call.nr * PAGE
        if call.what in ("allocate", "punch"):
            mode = FALLOC_FL_KEEP_SIZE | (FALLOC_FL_PUNCH_HOLE if call.what == "punch" else 0)
            yield f"fallocate(r2, {_hex(mode)}, {_hex(start)}, {_hex(size)})"
        elif call.what in ("to_private", "to_shared"):
            wanted = kvm.PRIVATE if call.what == "to_private" else 0
            yield (f"ioctl$KVM_SET_MEMORY_ATTRIBUTES(r1, {_hex(kvm.SET_MEMORY_ATTRIBUTES)}, "
                   f"{self._struct(_hex(call.gfn * PAGE), _hex(size), _hex(wanted), '0x0')})")
        elif call.what == "bind":
            self._slots.append((call.gfn, call.start, call.nr))
            yield self._region(len(self._slots) - 1, *self._slots[-1])
        elif call.what == "unbind":
            yield from (self._region(number, gfn, first, 0) for number, (gfn, first, nr) in enumerate(self._slots)
                        if (first, nr) == (call.start, call.nr))
        elif call.what in ("map", "unmap"):
            where = f"&({_hex(_MAPPED)}/{_hex(size)})=nil, {_hex(size)}"
            yield f"mmap({where}, 0x3, 0x11, r2, 0x0)" if call.what == "map" else f"munmap({where})"
        elif call.what == "touch":
            yield f'getrandom(&({_hex(_MAPPED + start)})="00", 0x1, 0x0)'
        else:
            yield "close(r2)" if call.what == "close" else f"ioctl$KVM_RUN(r3, {_hex(kvm.RUN)}, 0x0)"

    def _region(self, number: int, gfn: int, start: int, nr: int) -> str:
        # No pages: a slot that is deleted. A vma argument has one page at least.
        window = f"&({_hex(_WINDOW + start * PAGE)}/{_hex(max(nr, 1) * PAGE)})=nil"
        return (f"ioctl$KVM_SET_USER_MEMORY_REGION2(r1, {_hex(kvm.SET_USER_MEMORY_REGION2)}, "
                + self._struct(_hex(number), _hex(kvm.MemFlag.GUEST_MEMFD), _hex(gfn * PAGE), _hex(nr * PAGE), window,
                               _hex(start * PAGE), "r2") + ")")

    def _struct(self, *members: str) -> str:
        return f"&({_hex(self._place())})={{{', '.join(members)}}}"

    def _place(self) -> int:
        self._at += _STRIDE
        return self._at - _STRIDE


# As an unsigned number of 64 bits, which a negative one is there.
def _hex(number: int) -> str:
    return f"{number & (1 << 64) - 1:#x}"
