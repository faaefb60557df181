"""The kernel's own guest_memfd_test, built from the distribution's source package, and what it says of a kernel.

A sub-test that fails ends the program, so each has a run of its own: the copy that is built asks an environment variable
which of them it is to make.
"""

from __future__ import annotations

import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

from guest_memfd.kernels import cache, packages

SERIES = "7.3"
"""Whose source it is built from."""
_NEEDED = ("Makefile", "Kbuild", "Kconfig", "scripts/", "include/", "arch/x86/", "tools/", "usr/", "lib/",
           "drivers/dma/ioat/", "drivers/dma/idxd/", "drivers/net/ethernet/intel/igb/")
_CHOSEN = """
#include <stdlib.h>
static int chosen(const char *test, unsigned long flags)
{
\tchar name[64];

\tsnprintf(name, sizeof(name), "%s %lx", test, flags);
\tif (getenv("LIST_SUBTESTS"))
\t\tprintf("subtest %s\\n", name);
\treturn getenv("SUBTEST") && !strcmp(getenv("SUBTEST"), name);
}
"""
ALL = r"""
import os, re, subprocess
def run(**more):
    return subprocess.run(["/guest_memfd_test"], env={**os.environ, **more}, capture_output=True, text=True)
listed = run(LIST_SUBTESTS="1")
names = re.findall("^subtest (.*)$", listed.stdout, re.M)
if not names:
    print(listed.returncode, "all of it", " ".join(listed.stdout.split()), sep="|")
for name in names:
    done = run(SUBTEST=name)
    said = " ".join((done.stderr.strip() or done.stdout.strip()).split())[:200] if done.returncode else ""
    print(done.returncode, name, said, sep="|", flush=True)
"""
"""In the guest: every sub-test with every set of flags, one line each."""


def program() -> Path:
    """The program for x86-64, from the cache or built; raises HostUnavailable where there is no such package."""
    return cache.kept_file(f"guest_memfd_test-{SERIES}", _built)


def _built() -> bytes:
    name = f"linux-source-{SERIES}"
    archive = packages.unpacked(name, [name], (f"*/{name}.tar.xz",), print)
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(next(archive.rglob("*.tar.xz")), "r:xz") as tar:
            for member in tar:
                if member.name.partition("/")[2].startswith(_NEEDED):
                    tar.extract(member, folder, filter="tar")
        tree = Path(folder, name)
        source = tree / "tools/testing/selftests/kvm/guest_memfd_test.c"
        source.write_text(one_at_a_time(source.read_text()))
        out = Path(folder, "out")
        _make(tree, "headers", "ARCH=x86")
        _make(tree / "tools/testing/selftests/kvm", "ARCH=x86", f"OUTPUT={out}", "LDFLAGS=-static",
              f"{out}/guest_memfd_test")
        return (out / "guest_memfd_test").read_bytes()


def one_at_a_time(text: str) -> str:
    """The source of a program that makes one sub-test alone."""
    text, tests = re.subn(r"test_##__test\(args\);", "if (chosen(#__test, __flags)) test_##__test(args);", text)
    text, guests = re.subn(r"\n\ttest_guest_memfd_guest\(\);", '\n\tif (chosen("guest", 0)) test_guest_memfd_guest();', text)
    text, places = re.subn(r"(?=#define ____gmem_test\()", lambda _: _CHOSEN, text)
    assert (tests, guests, places) == (1, 1, 1), "guest_memfd_test.c has changed"
    return text


def _make(tree: Path, *words: str) -> None:
    done = subprocess.run(["make", "-s", "-C", tree, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def failed(lines: Iterable[str]) -> dict[str, str]:
    """Of what ALL printed: the sub-tests that failed, and why. One that is skipped (exit status 4) has not."""
    found = [line.split("|", 2) for line in lines if line.count("|") >= 2]
    assert found, "no sub-test"
    return {name: said for code, name, said in found if code not in ("0", "4")}
