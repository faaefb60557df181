"""The way of one lend: from the VMM's ioctl to the guest that goes on, file by file."""

from __future__ import annotations

import sys
from functools import cache
from types import FrameType
from typing import Any, NamedTuple

from guest_memfd import Config, Machine, assemble
from guest_memfd.uapi.gunyah import MapFlag, RegisterSet, boot_register
from house.graph import SOURCE

PAGE, BASE = 4096, 0x8000_0000
OFF = "_start: ldr x0, =0x84000008\n hvc #0"


class Way(NamedTuple):
    """How many files it passes, and how often it goes from one to another."""

    files: int
    changes: int


@cache
def lend() -> Way:
    """A guest of Gunyah fetches from a page that it has never touched; the VMM's run() lends it, and the guest turns off."""
    machine = Machine("gunyah", Config(ram=32 << 20))
    device = machine.open("/dev/gunyah")
    vm, file = device.create_vm(), device.create_guest_mem(16 * PAGE)
    with file.mmap() as mapping:
        mapping.write(0, assemble(OFF, BASE, "way").data)
    vm.map_mem(file, BASE, 0, 16 * PAGE, MapFlag.FORCE_LEND | MapFlag.ALLOW_RWX)
    vm.set_dtb_config(BASE + PAGE, PAGE)
    vm.set_boot_context(boot_register(RegisterSet.PC, 0), BASE)
    vcpu = vm.add_vcpu(0)
    vm.start()
    return _followed(lambda: vcpu.run())


def _followed(call: Any) -> Way:
    passed: list[str] = []

    def follow(frame: FrameType, event: str, _argument: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(str(SOURCE)) and (not passed or passed[-1] != file):
            passed.append(file)

    sys.setprofile(follow)
    try:
        call()
    finally:
        sys.setprofile(None)
    return Way(len(set(passed)), len(passed) - 1)
