"""Boot a kernel, run one command in it, bring back the answer."""

from __future__ import annotations

import base64
import json
import os
import re
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import BinaryIO

from guest_memfd.errors import HostUnavailable
from guest_memfd.kernels import guest, qemu, userland
from guest_memfd.kernels.cpio import Cpio
from guest_memfd.kernels.find import BootedKernel
from guest_memfd.kernels.packages import Say

PACKAGE = "/gmem"
"""Where this package is in the guest."""

BOOT = 240
"""Seconds for all that is not the command, on a busy machine."""

STEADY = 8
"""How much longer everything may take when time is counted in instructions."""

_OURS = Path(__file__).resolve().parents[1]
_GMEM = "#!/usr/bin/python3\nimport sys\nfrom guest_memfd.cli.main import main\nsys.exit(main())\n"
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1",
                "PYTHONPATH": PACKAGE}


@dataclass(frozen=True)
class Job:
    """What is run: *argv* as *user* (a number; None: root), for *timeout* seconds at most.

    files: (path here, path there). cpus, memory (MiB), nodes (of memory), append (to the kernel's command line): of the
    machine. steady: time goes by instructions and not by the clock, so that a busy host does not change what is seen.
    """

    argv: tuple[str, ...]
    timeout: float = 300
    user: int | None = None
    files: tuple[tuple[Path, str], ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    cpus: int = 1
    memory: int = 1024
    nodes: int = 1
    append: str = ""
    steady: bool = False


@dataclass(frozen=True)
class KernelAnswer:
    """What came back: the exit status of the command, what it wrote, and the kernel's log.

    Seconds: until the command began and of the command, by the guest's clock; of it all, by ours; and of QEMU's CPU.
    """

    kernel: str
    release: str
    code: int
    out: str
    err: str
    log: str
    modules: Mapping[str, str]
    boot: float
    command: float
    wall: float
    cpu: float


def run(booted: BootedKernel, job: Job, say: Say) -> KernelAnswer:
    """Boot *booted* and do *job* there.

    Raises HostUnavailable: there is no QEMU, the kernel does not boot, panics or gives no answer, or the command takes too
    long.
    """
    if not sys.platform.startswith("linux"):
        raise HostUnavailable("kernels are booted on Linux only")
    machine = qemu.MACHINES[booted.arch]
    start, environment = qemu.program(booted.arch, say)
    base = userland.archive(booted.arch, say).read_bytes()
    with ExitStack() as stack:
        initrd, answer, second, console = (_nameless(stack, name) for name in ("initrd", "answer", "second", "console"))
        for part in (base, _package(), _image(booted, job)):
            initrd.write(part)
        initrd.flush()
        command = [
            *start, *machine.machine, "-accel", "tcg", "-smp", str(job.cpus), "-m", str(job.memory), "-nodefaults",
            "-no-user-config", "-display", "none", "-no-reboot", "-serial", f"file:{_path(console)}",
            "-device", "virtio-serial-pci", "-chardev", f"file,id=answer,path={_path(answer)}",
            "-device", f"virtserialport,chardev=answer,name={guest.PORT}",
            "-kernel", str(booted.image), "-initrd", _path(initrd),
            # panic=-1 and -no-reboot: a kernel that panics ends QEMU at once, and is not waited for. Mitigations cost
            # time under emulation, and there is nothing to keep apart.
            "-append", f"console={machine.console} quiet panic=-1 rdinit=/init mitigations=off {job.append}",
        ]
        if job.nodes > 1:
            command += _nodes(job)
        if booted.arch == "amd64":
            command += ["-serial", f"file:{_path(second)}"]
        if job.steady:
            command += ["-icount", "shift=0,sleep=off"]
        limit = (job.timeout + BOOT) * (STEADY if job.steady else 1)
        ended = qemu.watched(command, environment, limit, [file.fileno() for file in (initrd, answer, second, console)])
        log = _text(console)
        said = _text(answer) + _text(second)
    return _answer(booted, job, ended, said, log)


# The memory in equal parts, and all CPUs on the first node.
def _nodes(job: Job) -> Iterator[str]:
    for node in range(job.nodes):
        # The last gets what is left over: QEMU refuses nodes that do not add up to its -m.
        size = job.memory // job.nodes + (job.memory % job.nodes if node == job.nodes - 1 else 0)
        yield from ("-object", f"memory-backend-ram,id=ram{node},size={size}M",
                    "-numa", f"node,nodeid={node},memdev=ram{node}{f',cpus=0-{job.cpus - 1}' if not node else ''}")


# Compiled once, however many kernels are booted.
@cache
def _package() -> bytes:
    image = Cpio()
    image.add(_OURS, f"{PACKAGE}/guest_memfd")
    return image.done()


def _image(booted: BootedKernel, job: Job) -> bytes:
    image, modules = Cpio(), booted.load_order()
    image.put("init", b"#!/usr/bin/python3 -IB\n" + Path(guest.__file__).read_bytes(), 0o755)
    for name, data in modules.items():
        image.put(f"{guest.FOLDER}/{name}.ko", data)
    for source, path in job.files:
        image.add(source, path)
    image.put("usr/bin/gmem", _GMEM, 0o755)
    if booted.config:
        image.add(booted.config, f"boot/{booted.config.name}")
    image.put(f"{guest.FOLDER}/job.json", json.dumps({
        "argv": job.argv, "cwd": "/", "timeout": job.timeout, "modules": [*modules], "user": job.user,
        "env": {**_ENVIRONMENT, **job.environment}}))
    return image.done()


def _answer(booted: BootedKernel, job: Job, ended: qemu.QemuEnded, said: str, log: str) -> KernelAnswer:
    # On the console, where the kernel has neither the port nor a second serial line.
    found = re.search(rf"{guest.BEGIN} (\S+) {guest.END}", said + log)
    if not found:
        panic = re.search(r"Kernel panic.*|---\[ end Kernel.*", log)
        last = " ".join(log.split())[-200:]
        why = ended.problem or (panic[0].strip() if panic else f"it gave no answer; its console ends {last!r}")
        raise HostUnavailable(f"kernel {booted.name}: {why}")
    told = json.loads(zlib.decompress(base64.b64decode(found[1])))
    if told.get("failed"):
        raise HostUnavailable(f"kernel {booted.name}: the command cannot be run: {told['failed'].strip().splitlines()[-1]}")
    if told["timed_out"]:
        raise HostUnavailable(f"kernel {booted.name}: the command has not ended after {job.timeout:g} s (--timeout S)")
    return KernelAnswer(
        booted.name, told["release"], told["code"], told["out"], told["err"], told["log"], told["modules"], told["booted"],
        told["seconds"], ended.wall, ended.cpu)


# Files without a name: whatever ends this process, nothing is left of them.
def _nameless(stack: ExitStack, name: str) -> BinaryIO:
    return stack.enter_context(open(os.memfd_create(f"gmem-{name}"), "w+b"))


def _path(file: BinaryIO) -> str:
    return f"/proc/self/fd/{file.fileno()}"


def _text(file: BinaryIO) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")
