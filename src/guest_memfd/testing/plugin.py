"""The pytest plugin: a fixture `gmem_host`, a marker `gmem`, two options.

Rule of this file: a skip says why, and a host that was asked for by name is never skipped. pytest loads this in every run
where the package is installed: nothing but pytest is imported before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from guest_memfd.testing.hosts import Host

HOSTS = {
    "kvm": ("emulated:arm64/kvm", "emulated:arm64/pkvm", "kvm"),
    "gunyah": ("emulated:arm64/gunyah", "gunyah"),
}
"""Names of the hosts that have a device."""

_MARKER = ("gmem(*needs, device='kvm', ram=64 << 20): what a test with the fixture gmem_host needs of its host: vcpu, mmap, "
           "convert, protected, fail; which device, 'kvm' or 'gunyah'; bytes of RAM of an emulated machine")
_failed = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options, in a group of their own."""
    group = parser.getgroup("guest_memfd")
    every = ", ".join(name for names in HOSTS.values() for name in names)
    group.addoption("--gmem-host", action="append", metavar="NAME", default=[],
                    help=f"hosts for the fixture gmem_host, which must be there (repeat): {every}; default: all that are")
    group.addoption("--gmem-design", metavar="NAME", default="library",
                    help="which design serves the files of emulated hosts (gmem list designs; library)")


def pytest_configure(config: pytest.Config) -> None:
    """Announce the marker, and refuse hosts that there are not."""
    config.addinivalue_line("markers", _MARKER)
    every = [name for names in HOSTS.values() for name in names]
    for name in config.getoption("--gmem-host"):
        if name not in every:
            raise pytest.UsageError(f"--gmem-host {name}: there is no such host; known: {', '.join(every)}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each host that has the device."""
    if "gmem_host" not in metafunc.fixturenames:
        return
    device, _, _ = _asked(metafunc.definition)
    wanted = metafunc.config.getoption("--gmem-host")
    names = [name for name in HOSTS[device] if not wanted or name in wanted]
    metafunc.parametrize("gmem_host", names, indirect=True)


@pytest.fixture
def gmem_host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """A host to test a VMM on (`guest_memfd.testing.hosts.Host`).

    Skips where the host is not there, or lacks what the marker wants. After a test that passed, whatever it left open and
    every law it broke is an error.
    """
    host = _made(request)
    try:
        yield host
    finally:
        host.end()
    if not request.node.stash.get(_failed, False) and (left := host.left()):
        pytest.fail(f"{host.name}: {'; '.join(left)}", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Remember a failure: what a failed test leaves behind is nobody's fault."""
    report = yield
    if report.when == "call" and report.failed:
        item.stash[_failed] = True
    return report


# -- what was asked for ----------------------------------------------------------------------------------------------


# (device, needs, RAM) of the marker nearest to the test.
def _asked(node: Any) -> tuple[str, tuple[str, ...], int]:
    marker = node.get_closest_marker("gmem")
    if marker is None:
        return "kvm", (), 64 << 20
    more = dict(marker.kwargs)
    device, ram = more.pop("device", "kvm"), more.pop("ram", 64 << 20)
    if more or device not in HOSTS:
        what = f"argument {next(iter(more))!r}" if more else f"device {device!r}"
        raise pytest.UsageError(f"{node.nodeid}: no {what}; {_MARKER}")
    return device, marker.args, ram


def _made(request: pytest.FixtureRequest) -> Host:
    from guest_memfd.errors import BadInput, HostUnavailable, SyscallFailed
    from guest_memfd.testing.hosts import NEEDS, Emulated, LinuxGunyah, LinuxKvm

    _, needs, ram = _asked(request.node)
    if unknown := [need for need in needs if need not in NEEDS]:
        pytest.fail(f"marker gmem: no need is called {unknown[0]!r}; known: {', '.join(NEEDS)}", pytrace=False)
    name: str = request.param
    try:
        host: Host = {"kvm": LinuxKvm, "gunyah": LinuxGunyah}[name]() if ":" not in name else Emulated(
            name.rpartition("/")[2], request.config.getoption("--gmem-design"), ram)
        host.open().close()
    except (HostUnavailable, SyscallFailed) as error:
        if name in request.config.getoption("--gmem-host"):
            pytest.fail(f"--gmem-host {name}: {error}", pytrace=False)
        pytest.skip(f"{name}: {error}")
    except BadInput as error:
        pytest.fail(str(error), pytrace=False)
    for need in needs:
        if why := host.lacks(need):
            pytest.skip(f"{name} cannot do what the test needs, {need}: {why}")
    return host
