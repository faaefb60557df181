"""The pytest plugin: a fixture `gmem_host`, a marker `gmem`, two options.

Rule of this file: a skip says why, and a host that was asked for by name is never skipped for being absent
(tests/test_plugin.py holds it).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from guest_memfd.testing.hosts import GmemHost

HOSTS = {
    "kvm": ("emulated:arm64/kvm", "emulated:arm64/pkvm", "kvm"),
    "gunyah": ("emulated:arm64/gunyah", "gunyah"),
}
"""Names of the hosts that have a device."""

_DESIGN = "library"
_MARKER = ("gmem(*needs, device='kvm', ram=64 << 20): what a test with the fixture gmem_host needs of its host: vcpu, mmap, "
           "convert, protected, fail; which device, 'kvm' or 'gunyah'; bytes of RAM of an emulated machine")
_LEAST_RAM = 16 << 20
_unfinished = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options, in a group of their own."""
    group = parser.getgroup("guest_memfd")
    every = ", ".join(name for names in HOSTS.values() for name in names)
    group.addoption("--gmem-host", action="append", metavar="NAME", default=[],
                    help=f"hosts for the fixture gmem_host, which must be there (repeat): {every}; default: all that are")
    group.addoption("--gmem-design", metavar="NAME", default=_DESIGN,
                    help="which design serves the files of emulated hosts (gmem list designs; library)")


def pytest_configure(config: pytest.Config) -> None:
    """Announce the marker, and refuse hosts that there are not."""
    config.addinivalue_line("markers", _MARKER)
    every = [name for names in HOSTS.values() for name in names]
    for name in config.getoption("--gmem-host"):
        if name not in every:
            raise pytest.UsageError(f"--gmem-host {name}: there is no such host; known: {', '.join(every)}")
    if (design := config.getoption("--gmem-design")) != _DESIGN:
        from guest_memfd.designs import DESIGNS
        from guest_memfd.errors import BadInput

        try:
            DESIGNS[design]
        except BadInput as error:
            raise pytest.UsageError(f"--gmem-design: {error}") from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each host that has the device, unless the test chooses hosts by itself."""
    chosen = any("gmem_host" in mark.args[:1] for mark in metafunc.definition.iter_markers("parametrize"))
    if "gmem_host" not in metafunc.fixturenames or chosen:
        return
    device = _asked(metafunc.definition).device
    wanted = metafunc.config.getoption("--gmem-host")
    names: list[Any] = [name for name in HOSTS[device] if not wanted or name in wanted]
    if not names:
        why = f"--gmem-host {', '.join(wanted)}: this test is for /dev/{device}, which {', '.join(HOSTS[device])} have"
        names = [pytest.param("", id="none", marks=pytest.mark.skip(reason=why))]
    metafunc.parametrize("gmem_host", names, indirect=True)


@pytest.fixture
def gmem_host(request: pytest.FixtureRequest) -> Iterator[GmemHost]:
    """A host to test a VMM on (`guest_memfd.testing.hosts.Host`).

    Skips where the host is not there, or lacks what the marker wants. After a test that passed, whatever it left open and
    every law it broke is an error.
    """
    host = _made(request)
    try:
        yield host
    finally:
        host.end()
    if not request.node.stash.get(_unfinished, False) and (left := host.left()):
        pytest.fail(f"{host.name}: {'; '.join(left)}", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Remember what did not pass: what such a test leaves behind is no one's fault."""
    report = yield
    if report.when != "teardown" and not report.passed:
        item.stash[_unfinished] = True
    return report


# -- what was asked for ----------------------------------------------------------------------------------------------


class _Asked(NamedTuple):
    needs: tuple[str, ...] = ()
    device: str = "kvm"
    ram: int = 64 << 20


# By the marker nearest to the test.
def _asked(node: Any) -> _Asked:
    marker = node.get_closest_marker("gmem")
    if marker is None:
        return _Asked()
    from guest_memfd.testing.hosts import NEEDS

    wrong = [f"no need is called {need!r}; known: {', '.join(NEEDS)}" for need in marker.args if need not in list(NEEDS)]
    wrong += [f"no argument {name!r}; {_MARKER}" for name in marker.kwargs if name not in ("device", "ram")]
    asked = _Asked(marker.args, **{name: value for name, value in marker.kwargs.items() if name in ("device", "ram")})
    if asked.device not in list(HOSTS):
        wrong.append(f"no device {asked.device!r}; known: {', '.join(HOSTS)}")
    if not isinstance(asked.ram, int) or asked.ram < _LEAST_RAM:
        wrong.append(f"ram {asked.ram!r}: a number of bytes, {_LEAST_RAM} or more")
    if wrong:
        pytest.fail(f"{node.nodeid}: marker gmem: {wrong[0]}", pytrace=False)
    return asked


def _made(request: pytest.FixtureRequest) -> GmemHost:
    from guest_memfd.errors import BadInput, HostUnavailable, SyscallFailed
    from guest_memfd.testing.hosts import Emulated, LinuxGunyah, LinuxKvm

    name: str | None = getattr(request, "param", None)
    if name is None:
        pytest.fail("gmem_host is one host after the other: a test or fixture has to name it as an argument", pytrace=False)
    asked = _asked(request.node)
    try:
        host: GmemHost = {"kvm": LinuxKvm, "gunyah": LinuxGunyah}[name]() if ":" not in name else Emulated(
            name.rpartition("/")[2], request.config.getoption("--gmem-design"), asked.ram)
        host.open().close()
    except (HostUnavailable, SyscallFailed) as error:
        if name in request.config.getoption("--gmem-host"):
            pytest.fail(f"--gmem-host {name}: {error}", pytrace=False)
        pytest.skip(f"{name}: {error}")
    except BadInput as error:
        pytest.fail(str(error), pytrace=False)
    for need in asked.needs:
        if why := host.lacks(need):
            host.end()
            pytest.skip(f"{name} cannot do what the test needs, {need}: {why}")
    return host
