"""Other kernels in QEMU, with programs in the place of apt and QEMU: what is fetched, booted, and said when it fails.

Real ones are booted where GMEM_KERNELS names them, as in GMEM_KERNELS=7.3,6.18: they are fetched for that.
"""

from __future__ import annotations

import base64
import json
import lzma
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from guest_memfd.cli.main import main
from guest_memfd.errors import BadInput, HostUnavailable
from guest_memfd.kernels import cache, find, guest, packages, userland
from guest_memfd.kernels import qemu as qemu_module
from guest_memfd.kernels.cpio import Cpio
from guest_memfd.probe.matrix import SurveyOf, as_tables

REAL = [name for name in os.environ.get("GMEM_KERNELS", "").split(",") if name]


def quiet(line: str) -> None:
    pass


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GMEM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable} -IS\n{text}")
    path.chmod(0o755)


# -- the archive -------------------------------------------------------------------------------------------------------


def entries(archive: bytes) -> Iterator[tuple[str, int, bytes]]:
    """Name, mode and contents, read as Documentation/driver-api/early-userspace/buffer-format.rst says."""
    at = 0
    while True:
        head = archive[at:at + 110]
        assert head[:6] == b"070701"
        mode, size, length = (int(head[i:i + 8], 16) for i in (14, 54, 94))
        name = archive[at + 110:at + 110 + length - 1].decode()
        at = at + 110 + length
        at += -at % 4
        if name == "TRAILER!!!":
            return
        yield name, mode, archive[at:at + size]
        at += size
        at += -at % 4


def test_an_archive_holds_what_was_put_into_it(tmp_path: Path) -> None:
    (tmp_path / "a" / "__pycache__").mkdir(parents=True)
    (tmp_path / "a" / "one.py").write_text("x = 1\n")
    (tmp_path / "a" / "two.txt").write_bytes(b"odd")
    (tmp_path / "a" / "skipped.pyc").write_bytes(b"")
    image = Cpio()
    image.put("/init", "first", 0o755)
    image.put("init", "second")
    image.link("bin/sh", "dash")
    image.add(tmp_path / "a", "/lib/a", ("*.pyc",))
    image.console()
    found = {name: (mode, data) for name, mode, data in entries(image.done())}
    assert found["init"] == (stat.S_IFREG | 0o755, b"first")
    assert found["bin/sh"] == (stat.S_IFLNK | 0o777, b"dash")
    assert found["bin"][0] == stat.S_IFDIR | 0o755
    assert found["lib/a/two.txt"][1] == b"odd"
    assert stat.S_ISCHR(found["dev/console"][0])
    compiled = f"lib/a/__pycache__/one.{sys.implementation.cache_tag}.pyc"
    assert {name for name in found if name.startswith("lib/a/")} == {
        "lib/a/one.py", "lib/a/two.txt", "lib/a/__pycache__", compiled}
    assert len(image.done()) % 512 == 0


def test_python_of_a_guest_is_not_compiled_there(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("x = 1\n")
    image = Cpio()
    image.add(tmp_path / "one.py", "/lib/one.py", sources=False)
    (tmp_path / "out").mkdir()
    data = {name: data for name, _, data in entries(image.done())}["lib/one.pyc"]
    (tmp_path / "out" / "one.pyc").write_bytes(data)
    script = f"import sys; sys.path[:0] = [{str(tmp_path / 'out')!r}]; import one; print(one.x)"
    said = subprocess.run([sys.executable, "-ISc", script], capture_output=True, text=True, check=True)
    assert said.stdout == "1\n"


# -- the cache ---------------------------------------------------------------------------------------------------------


def test_a_folder_of_the_cache_is_there_whole_or_not_at_all(empty_cache: Path) -> None:
    def breaks(tree: Path, work: Path) -> None:
        (tree / "half").write_text("")
        raise HostUnavailable("the network is gone")

    with pytest.raises(HostUnavailable, match="network"):
        cache.kept_folder("thing", breaks)
    assert list(empty_cache.iterdir()) == []
    made = cache.kept_folder("thing", lambda tree, work: (tree / "all").write_text("x") and None)
    assert (made / "all").read_text() == "x"
    assert cache.kept_folder("thing", breaks) == made
    assert cache.kept_file("one", lambda: b"1").read_bytes() == b"1"
    assert cache.kept_file("one", lambda: b"2").read_bytes() == b"1"


def test_of_two_that_fill_it_at_once_the_first_stays(empty_cache: Path) -> None:
    def slower(tree: Path, work: Path) -> None:
        (tree / "who").write_text("second")
        cache.kept_folder("thing", lambda tree, work: (tree / "who").write_text("first") and None)

    assert (cache.kept_folder("thing", slower) / "who").read_text() == "first"


def test_a_cache_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GMEM_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(HostUnavailable, match="cannot be written: Not a directory; GMEM_CACHE names another place"):
        cache.folder()


# -- packages and kernels ----------------------------------------------------------------------------------------------

NAMES = ("linux-image-6.18.9+deb13-cloud-amd64 linux-image-6.18.15+deb13-cloud-amd64 linux-image-6.18.15+deb13-amd64 "
         "linux-image-6.18.15+deb13-rt-amd64 linux-image-7.3.4+deb13-amd64 linux-image-7.3.4+deb13-arm64:arm64 "
         "linux-image-7.3.4+deb13-amd64-dbg linux-image-amd64 gcc")


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A client that knows NAMES, and packages whose only file is a kernel with the package's name in it."""
    tools = tmp_path / "tools"
    program(tools / "apt-cache", f"print({NAMES!r}.replace(' ', chr(10)))")
    program(tools / "apt-get", "import sys\nfor name in sys.argv[1:]:\n"
            "    if name.startswith('linux-image') and 'download' in sys.argv:\n"
            "        open(name.replace(':', '_') + '.deb', 'w').write(name)\n")
    program(tools / "dpkg-deb", "import io, sys, tarfile\nname = open(sys.argv[-1]).read()\n"
            "out = tarfile.open(fileobj=sys.stdout.buffer, mode='w|')\n"
            "for path in ('./boot/vmlinuz-1', './boot/config-1', './usr/share/doc/x'):\n"
            "    one = tarfile.TarInfo(path)\n    one.size = len(name)\n    out.addfile(one, io.BytesIO(name.encode()))\n"
            "out.close()\n")
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setattr(packages, "_mirror", lambda: ("http://nowhere.invalid/debian", packages.DEBIAN))
    return tools


@pytest.mark.parametrize(("given", "arch", "name"), [
    ("6.18", "amd64", "6.18.15+deb13-cloud-amd64"), ("6.18.9", "amd64", "6.18.9+deb13-cloud-amd64"),
    ("7.3", "amd64", "7.3.4+deb13-amd64"), ("7.3", "arm64", "7.3.4+deb13-arm64"),
    ("linux-image-6.18.15+deb13-rt-amd64", "amd64", "6.18.15+deb13-rt-amd64"),
    ("6.18.15+deb13-cloud-amd64", "amd64", "6.18.15+deb13-cloud-amd64"),
])
def test_which_kernel_is_meant(apt: Path, given: str, arch: str, name: str) -> None:
    told: list[str] = []
    found = find.find(given, arch, told.append)
    assert found.name == name
    assert found.image.read_text() == f"linux-image-{name}{'' if arch == 'amd64' else ':arm64'}"
    assert found.config is not None
    assert not list(found.image.parents[1].rglob("x"))          # what is not wanted is not kept
    assert told == [f"fetching kernel-{name}"]
    find.find(given, arch, told.append)
    assert len(told) == 1                                       # once


UBUNTU = ("linux-image-unsigned-6.14.0-33-generic linux-image-6.14.0-33-generic linux-modules-6.14.0-33-generic "
          "linux-image-unsigned-6.17.0-5-generic linux-modules-6.17.0-5-generic linux-image-6.8.0-85-generic "
          "linux-modules-6.8.0-85-generic linux-image-unsigned-6.17.0-1003-aws linux-image-generic "
          "linux-modules-extra-6.17.0-5-generic")


@pytest.fixture
def ubuntu(apt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The client of a machine with Ubuntu, which notes what it is asked for."""
    program(apt / "apt-cache", f"print({UBUNTU!r}.replace(' ', chr(10)))")
    monkeypatch.undo()
    monkeypatch.setenv("GMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{apt}:{os.environ['PATH']}")
    monkeypatch.setattr(packages, "APT", tmp_path / "apt")
    monkeypatch.setattr(packages, "_codename", lambda: "noble")
    (tmp_path / "apt" / "sources.list.d").mkdir(parents=True)
    (tmp_path / "apt" / "sources.list.d" / "ubuntu.sources").write_text("Types: deb\nURIs: http://nowhere.invalid/ubuntu/\n")
    return apt


@pytest.mark.parametrize(("given", "name", "wanted"), [
    ("6.17", "6.17.0-5-generic", ["linux-image-unsigned-6.17.0-5-generic", "linux-modules-6.17.0-5-generic"]),
    ("6.14.0", "6.14.0-33-generic", ["linux-image-unsigned-6.14.0-33-generic", "linux-modules-6.14.0-33-generic"]),
    ("linux-image-6.8.0-85-generic", "6.8.0-85-generic", ["linux-image-6.8.0-85-generic", "linux-modules-6.8.0-85-generic"]),
])
def test_kernels_of_ubuntu(ubuntu: Path, given: str, name: str, wanted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    unpacked = packages.unpacked

    def noting(folder: str, names: list[str], *rest: Any) -> Path:
        asked.append(names)
        return unpacked(folder, names, *rest)

    monkeypatch.setattr(packages, "unpacked", noting)
    assert find.find(given, "amd64", quiet).name == name
    assert asked == [wanted]
    assert find.releases("amd64") == ["6.8.0-85-generic", "6.14.0-33-generic", "6.17.0-5-generic"]


def test_sources_of_ubuntu(ubuntu: Path, empty_cache: Path) -> None:
    find.releases("amd64")
    text = next((empty_cache / "apt" / "sources").iterdir()).read_text()
    assert "URIs: http://nowhere.invalid/ubuntu\nSuites: noble noble-updates noble-security\nComponents: main\n" in text
    assert "ubuntu-archive-keyring.gpg\nArchitectures: amd64\n" in text


def test_qemu_of_ubuntu_is_the_one_on_the_path(ubuntu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(ubuntu / "qemu-system-x86_64", "print('QEMU emulator version 8.2.2')")
    with pytest.raises(HostUnavailable, match="x86_64 of version 10 or later has to be on the PATH; this one is 8"):
        qemu_module.program("amd64", quiet)
    program(ubuntu / "qemu-system-x86_64", "print('QEMU emulator version 10.1.0')")
    assert qemu_module.program("amd64", quiet)[0] == [str(ubuntu / "qemu-system-x86_64")]
    monkeypatch.setattr(userland, "NATIVE", "amd64")
    with pytest.raises(HostUnavailable, match="a guest of another architecture"):
        userland.archive("arm64", quiet)


def test_what_kernels_there_are(apt: Path) -> None:
    assert find.releases("amd64") == ["6.18.15+deb13-cloud-amd64", "7.3.4+deb13-amd64"]
    assert find.releases("arm64") == ["7.3.4+deb13-arm64"]


@pytest.mark.parametrize(("given", "error", "words"), [
    ("9.9", HostUnavailable, "no kernel '9.9' for amd64 can be had; there are 6.18, 7.3, or an image's path"),
    ("./nowhere", BadInput, "no kernel is at ./nowhere: name an image, a release as in 7.3, or a package"),
])
def test_a_kernel_that_there_is_not(apt: Path, given: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as told:
        find.find(given, "amd64", quiet)
    assert str(told.value) == words


def test_without_a_package_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(packages, "_mirror", lambda: ("http://nowhere.invalid/debian", packages.DEBIAN))
    with pytest.raises(HostUnavailable, match="apt-get is not here; give the path of a kernel's image"):
        find.find("7.3", "amd64", quiet)


@pytest.mark.parametrize(("text", "words"), [
    ("import sys\nsys.stderr.write('E: no space left\\n'); sys.exit(100)", "apt-get update: E: no space left; give"),
])
def test_a_package_client_that_fails(apt: Path, text: str, words: str) -> None:
    program(apt / "apt-get", text)
    with pytest.raises(HostUnavailable, match=words):
        find.find("7.3", "amd64", quiet)


def test_a_disk_without_room(apt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 << 20))
    with pytest.raises(HostUnavailable, match="has 3 MiB free, and what is fetched takes up to 512; GMEM_CACHE"):
        find.find("7.3", "amd64", quiet)


def test_a_package_client_that_hangs(apt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(apt / "apt-get", "import time; time.sleep(60)")
    monkeypatch.setattr(packages, "LONGEST", 0.2)
    with pytest.raises(HostUnavailable, match=r"apt-get update: nothing after 0.2 s; give the path"):
        find.find("7.3", "amd64", quiet)


def test_a_package_that_is_broken(apt: Path, empty_cache: Path) -> None:
    program(apt / "dpkg-deb", "print('no archive')")
    with pytest.raises(HostUnavailable, match=r"linux-image-7.3.4\+deb13-amd64.deb is broken: .*; run it again"):
        find.find("7.3", "amd64", quiet)
    assert not list(empty_cache.glob("kernel-*"))


@pytest.mark.parametrize(("head", "arch", "other"), [
    (bytes(514) + b"HdrS", "arm64", "amd64"), (bytes(56) + b"ARM\x64", "amd64", "arm64"),
])
def test_an_image_of_another_architecture(head: bytes, arch: str, other: str, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(head)
    with pytest.raises(BadInput, match=f"image is a kernel for {other}, and {arch} is asked for"):
        find.find(str(image), arch, quiet)
    assert find.find(str(image), other, quiet).image == image


def module(*depends: str) -> bytes:
    return b"\x7fELF..\0depends=" + ",".join(depends).encode() + b"\0rest"


def test_modules_are_loaded_after_those_they_need(tmp_path: Path) -> None:
    for name, depends in {"kvm": ["irqbypass"], "irqbypass": [], "kvm-amd": ["kvm", "ccp"], "ccp": [], "unused": []}.items():
        (tmp_path / f"{name}.ko.xz").write_bytes(lzma.compress(module(*depends)))
    (tmp_path / "Image").write_bytes(b"kernel")
    found = find.find(str(tmp_path / "Image"), "arm64", quiet, tmp_path)
    assert [*found.load_order()] == ["irqbypass", "kvm", "ccp", "kvm_amd"]


# -- the machine -------------------------------------------------------------------------------------------------------

ANSWER = {"release": "7.3.4-test", "code": 3, "timed_out": False, "seconds": 1.5, "out": "out\n", "err": "err\n", "log": "",
          "modules": {}, "booted": 2.5}


def qemu(tools: Path, monkeypatch: pytest.MonkeyPatch, *, answer: object = None, console: str = "", more: str = "") -> None:
    """A QEMU that writes *answer* to the port and *console* to the first serial line."""
    packed = base64.b64encode(zlib.compress(json.dumps(answer).encode())).decode() if answer is not None else ""
    text = f"{guest.BEGIN} {packed} {guest.END}" if packed else ""
    program(tools / "qemu-system-x86_64", "import sys, time\nif '--version' in sys.argv:\n"
            "    print('QEMU emulator version 10.0.2'); sys.exit()\n"
            f"{more}\nwhere = next(w for w in sys.argv if w.startswith('file,id=answer')).partition('path=')[2]\n"
            "line = [w for w in sys.argv if w.startswith('file:')][0][5:]\n"
            f"open(line, 'w').write({console!r})\nopen(where, 'w').write({text!r})\n")
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setattr(userland, "archive", lambda arch, say: tools / "python.cpio")
    (tools / "python.cpio").write_bytes(b"")
    (tools / "bzImage").write_bytes(b"kernel")


def test_a_probed_kernel_has_two_nodes_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qemu(tmp_path, monkeypatch, answer=ANSWER, more=f"open({str(tmp_path / 'argv')!r}, 'w').write(' '.join(sys.argv))")
    assert main(["probe", "--kernel", str(tmp_path / "bzImage"), "--arch", "amd64", "--cpus", "3"]) == 3
    asked = (tmp_path / "argv").read_text()
    assert "-object memory-backend-ram,id=ram0,size=512M -numa node,nodeid=0,memdev=ram0,cpus=0-2" in asked
    assert "-object memory-backend-ram,id=ram1,size=512M -numa node,nodeid=1,memdev=ram1 " in f"{asked} "
    assert main(["probe", "--kernel", str(tmp_path / "bzImage"), "--arch", "amd64", "--memory", "1025"]) == 3
    assert [word for word in (tmp_path / "argv").read_text().split() if "size=" in word] == [
        "memory-backend-ram,id=ram0,size=512M", "memory-backend-ram,id=ram1,size=513M"]
    assert kernel_run(tmp_path) == 3
    assert "-numa" not in (tmp_path / "argv").read_text()


def kernel_run(tools: Path, *more: str) -> int:
    return main(["kernel", "run", "--arch", "amd64", *more[:-1], str(tools / "bzImage"), "--", more[-1] if more else "true"])


def test_the_answer_of_a_kernel_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    qemu(tmp_path, monkeypatch, answer=ANSWER)
    assert kernel_run(tmp_path) == 3
    out, err = capsys.readouterr()
    assert out == "out\n"
    assert err.startswith("err\ngmem: bzImage: exit code 3; boot 2.5 s, command 1.5 s")


@pytest.mark.parametrize(("how", "words"), [
    ({"console": "[ 1.0] Kernel panic - not syncing: VFS\n"}, "kernel bzImage: Kernel panic - not syncing: VFS"),
    ({"console": "booting\n"}, "kernel bzImage: it gave no answer; its console ends 'booting'"),
    ({"more": "sys.stderr.write('q: warning: no xsaves\\nno such machine\\n\\n'); sys.exit(1)"},
     "kernel bzImage: qemu-system-x86_64: no such machine"),
    ({"answer": {**ANSWER, "timed_out": True}}, "kernel bzImage: the command has not ended after 600 s (--timeout S)"),
    ({"answer": {"release": "7", "failed": "Traceback\nFileNotFoundError: no x"}},
     "kernel bzImage: the command cannot be run: FileNotFoundError: no x"),
])
def test_a_kernel_that_gives_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: dict[str, object], words: str,
) -> None:
    qemu(tmp_path, monkeypatch, **how)      # type: ignore[arg-type]
    assert kernel_run(tmp_path) == 5
    assert capsys.readouterr().err == f"gmem: {words}\n"


def test_a_kernel_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qemu(tmp_path, monkeypatch, more="time.sleep(1000)")
    monkeypatch.setattr("guest_memfd.kernels.run.BOOT", 0.1)
    assert kernel_run(tmp_path, "--timeout", "0.2", "true") == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(tmp_path: Path, number: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        qemu(tmp_path, patch, more="open(sys.argv[0] + '.up', 'w').close()\ntime.sleep(1000)")
    script = ("import sys; from pathlib import Path; from guest_memfd.kernels import userland; "
              "from guest_memfd.cli.main import main; "
              f"userland.archive = lambda arch, say: Path({str(tmp_path / 'python.cpio')!r}); "
              f"sys.exit(main(['kernel', 'run', '--arch', 'amd64', {str(tmp_path / 'bzImage')!r}, '--', 'true']))")
    # Who starts the tests may have it ignored.
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE,
                          preexec_fn=lambda: signal.signal(number, signal.SIG_DFL) and None,
                          env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}) as process:
        up = tmp_path / "qemu-system-x86_64.up"
        while not up.exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait() == 128 + number
    assert subprocess.run(["pgrep", "-f", str(tmp_path / "qemu-system")], capture_output=True, check=False).stdout == b""


@pytest.mark.parametrize(("argv", "words"), [
    (["go"], "argument run|list: invalid choice: 'go' (choose from 'run', 'list'); see gmem kernel --help"),
    (["run"], "the following arguments are required: KERNEL; see gmem kernel run --help"),
    (["run", "7.3", "7.4"], "unexpected argument '7.4'; see gmem kernel --help"),
    (["run", "--arch", "mips", "7.3"], "--arch mips: there are amd64 and arm64"),
    (["run", "--cpus", "0", "7.3"], "--cpus 0: 1 at least"),
    (["run", "--memory", "1", "7.3"], "--memory 1: 256 at least"),
    (["run", "--timeout", "-1", "7.3"], "--timeout -1: a number of seconds above 0"),
    (["run", "--add", "nothing", "7.3"],
     "--add nothing: the path of a file or folder here, a colon, and an absolute path there"),
])
def test_what_is_refused(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernel", *argv]) == 4
    assert capsys.readouterr().err == f"gmem: {words}\n"


@pytest.mark.parametrize(("argv", "words"), [
    (["--table"], "--table is for --kernel and --saved"), (["--kernel", "7.3,7.2"], "several kernels need --table"),
    (["--kernel", "7.3", "--table", "--json"], "--table excludes --json, --ktap and --against"),
    (["--kernel", "7.3", "--kvm", "/dev/kvm"], "--kvm is for this machine, and --kernel for another"),
    (["--patience", "0"], "--patience 0: a number above 0, 1000 at most"),
])
def test_what_probe_refuses(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", *argv]) == 4
    assert capsys.readouterr().err == f"gmem: {words}\n"


def test_only_a_kernel_takes_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--", "true"]) == 4
    assert capsys.readouterr().err == "gmem: unexpected argument '--'; see gmem list --help\n"


# -- tables ------------------------------------------------------------------------------------------------------------


def survey(**rows: tuple[str, str, str]) -> dict[str, object]:
    return {"behaviour": [{"id": name, "result": result, "verdict": verdict, "expected": "x", "why": why}
                          for name, (result, verdict, why) in rows.items()],
            "known_bugs": [{"id": "leak", "verdict": "present" if "old" in rows else "fixed"},
                           {"id": "never", "verdict": "not tested"}]}


def test_tables_show_what_is_not_the_same() -> None:
    lines = list(as_tables([
        SurveyOf("6.18", survey(old=("EINVAL", "expected", ""), same=("ok", "expected", "")), "", 12.0),
        SurveyOf("7.3", survey(same=("ok", "expected", ""), odd=("EPERM", "differs", ""), off=("", "skipped", "no node")),
                 "", 9.4),
        SurveyOf("7.4", None, "it does not boot")]))
    assert lines[:5] == [
        "| kernel | expected | differs | unknown | skipped | seconds |", "|---|---|---|---|---|---|",
        "| 6.18 | 2 | 0 | 0 | 0 | 12 |", "| 7.3 | 1 | 1 | 0 | 1 | 9 |", "| 7.4 | it does not boot |"]
    text = "\n".join(lines)
    assert "| leak | PRESENT | fixed |" in text
    assert "never" not in text
    assert "- odd (EPERM, expected x)" in text
    assert "- 1 skipped: no node" in text
    assert "| same |" not in text


# -- real ones ---------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.skipif(not REAL, reason="GMEM_KERNELS names no kernel")
@pytest.mark.parametrize("name", REAL)
def test_a_real_kernel_answers(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("GMEM_CACHE")
    script = "import os; print(os.uname().release); raise SystemExit(7)"
    assert main(["kernel", "run", name, "--", "python3", "-c", script]) == 7
    assert capsys.readouterr().out.startswith(name)


# What the tests of the bindings need in the guest; Python itself is there, and so is this package.
SITE = Path(pytest.__file__).parents[1]
NEEDED = ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "py.py")
BINDINGS = ("test_linux_kvm.py", "test_linux_secret.py", "test_linux_guests.py", "test_run_kvm.py",
            "test_run_kvm_own.py")
THERE = """
import sys
sys.path[:0] = ["/site", "/repository/tests"]
import pytest
# The package has no metadata there, by which pytest would find our plugin.
raise SystemExit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "guest_memfd.testing.plugin", "-m", "not long",
                              "-c", "/repository/pyproject.toml", *(f"/repository/{name}" for name in sys.argv[1:])]))
"""


def there(kernel: str, *names: str, options: tuple[str, ...] = ()) -> int:
    """pytest's exit code for files of the repository, in a guest with *kernel*."""
    repository = Path(__file__).parents[1]
    added = [(SITE / each, f"/site/{each}") for each in NEEDED]
    added += [(repository / each, f"/repository/{each}") for each in ("tests", "docs", "README.md", "pyproject.toml")]
    adding = [word for here, there in added for word in ("--add", f"{here}:{there}")]
    return main(["kernel", "run", kernel, "--memory", "2048", "--timeout", "1800", *adding, *options, "--",
                 "python3", "-c", THERE, *names])


@pytest.mark.long
@pytest.mark.skipif(not REAL, reason="GMEM_KERNELS names no kernel")
@pytest.mark.parametrize("name", REAL)
def test_the_tests_of_the_bindings_pass_there(name: str, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("GMEM_CACHE")
    assert there(name, *(f"tests/{each}" for each in BINDINGS)) == 0, capsys.readouterr().out


@pytest.mark.long
@pytest.mark.skipif(not REAL, reason="GMEM_KERNELS names no kernel")
def test_an_arm64_guest_on_a_real_kvm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("GMEM_CACHE")
    assert main(["kernel", "run", "7.3", "--arch", "arm64", "--", "gmem", "run", "hello", "--on", "kvm"]) == 0
    assert capsys.readouterr().out == "hello from a guest\nsecret written\n"
    example = there("7.3", "docs/examples/test_tiny_vmm.py", options=("--arch", "arm64"))
    assert (example, "3 passed" in (said := capsys.readouterr().out)) == (0, True), said


@pytest.mark.long
@pytest.mark.skipif(not REAL, reason="GMEM_KERNELS names no kernel")
@pytest.mark.parametrize("name", REAL)
def test_the_emulated_kvm_is_as_that_kernel_has_it(name: str, monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("unicorn")
    monkeypatch.delenv("GMEM_CACHE")
    assert main(["conform", "--kernel", name, "--no-tables", "--operations", "2000"]) == 0
    assert "0 unexplained" in capsys.readouterr().out
