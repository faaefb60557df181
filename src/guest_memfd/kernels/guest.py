"""The first process of a guest: mount, load modules, run one command with a time limit, send what came of it, power off.

It runs in the guest with nothing but the standard library, and no shell. Whatever happens an answer is sent and the machine
goes off: a guest that only panics has no words for it.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import signal
import subprocess
import time
import traceback
import zlib
from typing import Any

FOLDER = "/job"
"""Where the job and the modules are."""

PORT, BEGIN, END = "gmem", "GMEM", "END"
"""The virtio-serial port by which the answer goes, and what stands around it."""

_MOUNTS = (("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/dev/shm"), ("devpts", "/dev/pts"),
           ("tmpfs", "/tmp"), ("debugfs", "/sys/kernel/debug"))
_FINIT_MODULE = {"x86_64": 313, "aarch64": 273}
_POWER_OFF = 0x4321FEDC
_READ_ALL, _SIZE_BUFFER = 3, 10
_libc = ctypes.CDLL(None, use_errno=True)


def _mount() -> None:
    for kind, target in _MOUNTS:
        os.makedirs(target, exist_ok=True)
        _libc.mount(kind.encode(), target.encode(), kind.encode(), 0, None)     # a kernel may lack one
    for folder in ("/tmp", "/dev/shm", "/var/tmp"):
        os.chmod(folder, 0o1777)


def _load(order: list[str]) -> dict[str, str]:
    said = {}
    for name in order:
        fd = os.open(f"{FOLDER}/{name}.ko", os.O_RDONLY)
        wrong = _libc.syscall(_FINIT_MODULE[os.uname().machine], fd, b"", 0)
        said[name] = os.strerror(ctypes.get_errno()) if wrong else "ok"
        os.close(fd)
    return said


def _run(job: dict[str, Any]) -> dict[str, Any]:
    began = time.monotonic()
    with open("/tmp/.out", "w+b") as out, open("/tmp/.err", "w+b") as err:
        child = subprocess.Popen(
            job["argv"], cwd=job["cwd"], env=job["env"], stdin=subprocess.DEVNULL, stdout=out, stderr=err,
            start_new_session=True, user=job["user"], group=job["user"], extra_groups=[] if job["user"] else None)
        timed_out = False
        try:
            code = child.wait(job["timeout"])
        except subprocess.TimeoutExpired:
            timed_out = True
            os.killpg(child.pid, signal.SIGKILL)
            code = child.wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    return {"code": code, "timed_out": timed_out, "seconds": round(time.monotonic() - began, 3), "out": texts[0],
            "err": texts[1]}


# The named port of virtio-serial where the kernel has that, else the second serial line (x86), else the console.
def _channel() -> str:
    ports = "/sys/class/virtio-ports"
    # The port is there a moment after its module has been loaded.
    for _attempt in range(40):
        for port in os.listdir(ports) if os.path.isdir(ports) else ():
            with open(f"{ports}/{port}/name") as name:
                if name.read().strip() == PORT:
                    return f"/dev/{port}"
        time.sleep(0.05)
    return "/dev/ttyS1" if os.path.exists("/dev/ttyS1") else "/dev/console"


def _send(answer: dict[str, Any]) -> None:
    data = f"\n{BEGIN} {base64.b64encode(zlib.compress(json.dumps(answer).encode())).decode()} {END}\n".encode()
    fd = os.open(_channel(), os.O_WRONLY | os.O_NOCTTY)
    while data:
        data = data[os.write(fd, data):]
    os.close(fd)


def _kernel_log() -> str:
    buffer = ctypes.create_string_buffer(max(_libc.klogctl(_SIZE_BUFFER, None, 0), 1 << 16))
    return buffer.raw[:max(_libc.klogctl(_READ_ALL, buffer, len(buffer)), 0)].decode("utf-8", "replace")


def main() -> None:
    """Do the job, answer, power off; it does not return."""
    answer: dict[str, Any] = {"release": os.uname().release}
    try:
        _mount()
        with open(f"{FOLDER}/job.json") as file:
            job = json.load(file)
        answer["modules"] = _load(job["modules"])
        if job["user"] and os.path.exists("/dev/kvm"):
            os.chmod("/dev/kvm", 0o666)
        answer["booted"] = round(time.clock_gettime(time.CLOCK_BOOTTIME), 3)
        answer |= _run(job)
        answer["log"] = _kernel_log()
    except BaseException:
        answer["failed"] = traceback.format_exc()
    try:
        _send(answer)
    except BaseException:
        traceback.print_exc()
    os.sync()
    _libc.reboot(_POWER_OFF)


if __name__ == "__main__":
    main()
