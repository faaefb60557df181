"""QEMU: which program, which machine, and how it is watched until it ends.

Without hardware virtualisation (TCG). AMD's CPU, because TCG emulates SVM and no VMX; arm64 with EL2. `-machine microvm`
hangs with the distributions' kernels, and `-cpu max` is up to five times slower.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from ctypes import CDLL
from pathlib import Path
from typing import NamedTuple

from guest_memfd.errors import HostUnavailable
from guest_memfd.kernels import packages
from guest_memfd.kernels.packages import Say


class QemuMachine(NamedTuple):
    """The program for an architecture, its machine, and the console that its kernels have."""

    program: str
    machine: tuple[str, ...]
    console: str


MACHINES = {
    "amd64": QemuMachine("qemu-system-x86_64", ("-machine", "q35", "-cpu", "EPYC-v4"), "ttyS0"),
    "arm64": QemuMachine("qemu-system-aarch64", ("-machine", "virt,virtualization=on,gic-version=3", "-cpu", "cortex-a76"),
                      "ttyAMA0"),
}
_LIBRARIES = ("libaio1", "libcapstone4", "libdaxctl1", "libfdt1", "libfuse3-3", "libibverbs1", "libndctl6", "libnl-3-200",
              "libnl-route-3-200", "libpmem1", "librdmacm1", "libslirp0", "liburing2", "libvdeplug2", "ipxe-qemu")
_PACKAGES = (*(f"{name}/bookworm-backports" for name in (
    "qemu-system-x86", "qemu-system-arm", "qemu-system-common", "qemu-system-data", "seabios")),
    *(f"{name}/bookworm" for name in _LIBRARIES))
_FILES = ("./usr/bin/qemu-system-*", "*/lib/*", "./usr/share/*")
_PDEATHSIG = 1                                      # include/uapi/linux/prctl.h
_LOOK = 0.02
"""Seconds between two looks whether it has ended."""

OLDEST = 10
"""QEMU 7.2 wipes pages of protected guests wrongly, so an older one than this is not taken from the PATH."""


class QemuEnded(NamedTuple):
    """How a machine has ended: what QEMU said if that was no success, and seconds, by the clock and of CPU."""

    problem: str
    wall: float
    cpu: float


def program(arch: str, say: Say) -> tuple[list[str], dict[str, str]]:
    """The beginning of a command line, and its environment: QEMU of the PATH, else of the distribution's packages."""
    name = MACHINES[arch].program
    if (there := shutil.which(name)) is not None and (_version(there) >= OLDEST or not shutil.which("apt-get")):
        return [there], dict(os.environ)
    if not packages.distribution().complete:
        has = f"; this one is {_version(there)}" if there is not None else ""
        raise HostUnavailable(f"{name} of version {OLDEST} or later has to be on the PATH{has}")
    root = packages.unpacked("qemu", _PACKAGES, _FILES, say)
    firmware = [root / "usr/share/qemu", root / "usr/share/seabios", root / "usr/lib/ipxe/qemu"]
    libraries = ":".join(str(root / each / f"{platform.machine()}-linux-gnu") for each in ("usr/lib", "lib"))
    return ([str(root / "usr/bin" / name), *(word for place in firmware for word in ("-L", str(place)))],
            {**os.environ, "LD_LIBRARY_PATH": libraries})


def _version(path: str) -> int:
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    number = said.partition("version ")[2].partition(".")[0]
    return int(number) if number.isdigit() else 0


# QEMU warns of what TCG does not have; why it ended comes last.
def _last(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip() and "warning:" not in line]
    return lines[-1].strip()[-300:] if lines else ""


def watched(command: Sequence[str], environment: dict[str, str], timeout: float, files: Sequence[int]) -> QemuEnded:
    """Run QEMU for *timeout* seconds at most; *files*: descriptors that it inherits.

    It ends with who started it: by the kernel (PR_SET_PDEATHSIG), and here, whatever ends the wait.
    """
    libc, began = CDLL(None), time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        try:
            machine = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
                pass_fds=files, preexec_fn=lambda: libc.prctl(_PDEATHSIG, signal.SIGKILL))
        except OSError as error:
            raise HostUnavailable(f"{command[0]} cannot be started: {error.strerror}") from None
        problem = ""
        try:
            # wait4(2), since it tells the CPU time of this child alone.
            while (done := os.wait4(machine.pid, os.WNOHANG))[0] == 0:
                if time.monotonic() > began + timeout:
                    problem = f"it has not ended after {timeout:g} s"
                    machine.kill()
                    done = os.wait4(machine.pid, 0)
                    break
                time.sleep(_LOOK)
        except BaseException:
            machine.kill()
            machine.wait()
            raise
        machine.returncode = os.waitstatus_to_exitcode(done[1])
        said.seek(0)
        if machine.returncode > 0:
            problem = f"{Path(command[0]).name}: {_last(said.read()) or f'exit status {machine.returncode}'}"
    return QemuEnded(problem, round(time.monotonic() - began, 2), round(done[2].ru_utime + done[2].ru_stime, 2))
