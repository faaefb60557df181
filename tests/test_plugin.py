"""The pytest plugin, as somebody's test suite sees it: every case is a run of pytest of its own."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

import pytest
from linux_driver import no_guests

pytest.importorskip("unicorn")
pytest_plugins = ["pytester"]

ROOT = Path(__file__).parent.parent
EXAMPLE = (ROOT / "docs" / "examples" / "test_tiny_vmm.py").read_text(encoding="utf-8")
INSTALLED = bool(entry_points(group="pytest11", name="guest_memfd"))


NO_KVM = no_guests()
with_kvm = pytest.mark.skipif(bool(NO_KVM), reason=NO_KVM)


def run(pytester: pytest.Pytester, source: str, *options: str, apart: bool = False) -> pytest.RunResult:
    """Run *source* in this process; *apart*, in one of its own, which takes seconds: what it leaves open is found there."""
    pytester.makepyfile(source)
    more = () if INSTALLED else ("-p", "guest_memfd.testing.plugin")
    without = [f"-pno:{plugin}" for plugin in ("cacheprovider", "xdist", "hypothesispytest")]       # a second and more
    return (pytester.runpytest_subprocess if apart else pytester.runpytest_inprocess)(
        *more, *without, "-rs", "--strict-markers", *options)


def shown(result: pytest.RunResult) -> str:
    return result.stdout.str() + result.stderr.str()


# -- the example ---------------------------------------------------------------------------------------------------------


def test_the_manual_shows_the_example_as_it_is() -> None:
    assert f"```python\n{EXAMPLE}```" in (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")


def test_the_example_runs_on_every_host_that_is_there(pytester: pytest.Pytester) -> None:
    result = run(pytester, EXAMPLE)
    skipped = 5 if NO_KVM else 1                    # and one more where the kernel does not convert
    counts = [{"passed": 12 - more, "skipped": more} for more in (skipped, skipped + 1)]
    assert result.parseoutcomes() in counts, shown(result)
    assert "under pKVM only a protected VM has private memory" in shown(result)


@with_kvm
def test_the_example_on_the_real_kernel(pytester: pytest.Pytester) -> None:
    result = run(pytester, EXAMPLE, "--gmem-host", "kvm", "-v")
    assert "test_the_host_sees_what_the_guest_stores[kvm] PASSED" in shown(result)
    assert "emulated" not in shown(result)
    assert result.ret == 0


def test_a_vmm_that_is_wrong_is_told_on_every_host(pytester: pytest.Pytester) -> None:
    broken = EXAMPLE.replace("vmm.ram.punch_hole(3 * PAGE, PAGE)", "vmm.ram.punch_hole(4 * PAGE, PAGE)")
    assert broken != EXAMPLE
    result = run(pytester, broken)
    assert result.parseoutcomes()["failed"] == (2 if NO_KVM else 3), shown(result)


# -- what is left behind -------------------------------------------------------------------------------------------------

LEAK = """
import pytest
kept = []

@pytest.mark.gmem("mmap")
def test_it(gmem_host):
    kvm = gmem_host.open()
    vm = kvm.create_vm()
    file = vm.create_guest_memfd(1 << 20, 3)
    file.mmap().write(0, b"x")
    kept.extend([kvm, vm, file])
"""


def test_what_a_test_leaves_open_is_an_error(pytester: pytest.Pytester) -> None:
    result = run(pytester, LEAK, apart=True)
    hosts = 2 if NO_KVM else 3
    result.assert_outcomes(passed=hosts, errors=hosts, skipped=3 - hosts)
    if not NO_KVM:
        assert "kvm: anon_inode:kvm-vm is still open; anon_inode:[kvm-gmem] is still open" in shown(result)


def test_a_test_that_failed_has_failed_once(pytester: pytest.Pytester) -> None:
    result = run(pytester, LEAK + "    assert False\n", apart=True)
    hosts = 2 if NO_KVM else 3
    result.assert_outcomes(failed=hosts, skipped=3 - hosts)


def test_a_law_that_is_broken_is_an_error(pytester: pytest.Pytester) -> None:
    source = """
        import pytest
        from guest_memfd.words import facts

        def test_it(gmem_host):
            gmem_host._watch.breaks("guest-private", "the test says so", "nowhere")
    """
    result = run(pytester, source, "--gmem-host", "emulated:arm64/kvm")
    result.assert_outcomes(passed=1, errors=1)
    assert "law guest-private is broken: the test says so" in shown(result)


@pytest.mark.parametrize("ending", [
    "pytest.skip('not today')", "pytest.xfail('known')", "kept[0].create_guest_memfd(0)",
])
def test_only_a_test_that_passed_is_asked_what_it_left(pytester: pytest.Pytester, ending: str) -> None:
    source = f"""
        import pytest
        kept = []

        def test_it(gmem_host):
            kept.append(gmem_host.open().create_vm())
            {ending}
    """
    assert "errors" not in run(pytester, source, "--gmem-host", "emulated:arm64/kvm", apart=True).parseoutcomes()


def test_a_fixture_that_fails_is_one_error(pytester: pytest.Pytester) -> None:
    source = """
        import pytest
        kept = []

        @pytest.fixture
        def vmm(gmem_host):
            kept.append(gmem_host.open().create_vm())
            raise RuntimeError("half way")

        def test_it(vmm):
            pass
    """
    run(pytester, source, "--gmem-host", "emulated:arm64/kvm", apart=True).assert_outcomes(errors=1)


@with_kvm
def test_a_mapping_alone_is_a_leak(pytester: pytest.Pytester) -> None:
    source = """
        kept = []

        def test_it(gmem_host):
            with gmem_host.open().create_vm() as vm, vm.create_guest_memfd(1 << 20, 3) as file:
                kept.append(file.mmap())
    """
    result = run(pytester, source, "--gmem-host", "kvm", apart=True)
    result.assert_outcomes(passed=1, errors=1)
    assert "a mapping of" in shown(result)
    assert "gmem" in shown(result)


# -- who is asked, and for what ------------------------------------------------------------------------------------------

OPENS = """
import pytest

@pytest.mark.gmem(%s)
def test_it(gmem_host):
    gmem_host.open()
"""


def test_gunyah_is_another_device(pytester: pytest.Pytester) -> None:
    result = run(pytester, OPENS % "device='gunyah'", "-v")
    assert "test_it[emulated:arm64/gunyah] PASSED" in shown(result)
    assert "/dev/gunyah" in shown(result) or "test_it[gunyah] PASSED" in shown(result)


@pytest.mark.parametrize(("arguments", "words"), [
    ("'mmao'", "no need is called 'mmao'; known: vcpu, mmap"), ("device='xen'", "no device 'xen'; known: kvm, gunyah"),
    ("colour=1", "no argument 'colour'"), ("['vcpu']", "no need is called ['vcpu']"),
    ("device=['kvm']", "no device ['kvm']"),
    ("ram='lots'", "ram 'lots': a number of bytes"), ("ram=4096", "ram 4096: a number of bytes, 16777216 or more"),
])
def test_mistakes_in_the_marker(pytester: pytest.Pytester, arguments: str, words: str) -> None:
    result = run(pytester, OPENS % arguments)
    assert words in shown(result)
    assert result.ret != 0
    assert "INTERNALERROR" not in shown(result)
    assert "Traceback" not in shown(result)


def test_a_host_that_there_is_not(pytester: pytest.Pytester) -> None:
    result = run(pytester, OPENS % "", "--gmem-host", "kvn")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "there is no such host; known: emulated:arm64/kvm" in shown(result)


def test_a_host_asked_for_by_name_is_not_skipped(pytester: pytest.Pytester) -> None:
    result = run(pytester, OPENS % "device='gunyah'", "--gmem-host", "gunyah")
    if Path("/dev/gunyah").exists():
        pytest.skip("there is a Gunyah here")
    result.assert_outcomes(errors=1)
    assert "--gmem-host gunyah: /dev/gunyah: No such file or directory" in shown(result)


def test_a_host_that_has_another_device_is_said_to(pytester: pytest.Pytester) -> None:
    result = run(pytester, OPENS % "", "--gmem-host", "emulated:arm64/gunyah")
    result.assert_outcomes(skipped=1)
    assert "this test is for /dev/kvm, which emulated:arm64/kvm, emulated:arm64/pkvm, kvm have" in shown(result)


@with_kvm
def test_what_only_the_garbage_collector_closes_is_an_error(pytester: pytest.Pytester) -> None:
    source = """
        def test_it(gmem_host):
            gmem_host.open().create_vm().create_guest_memfd(1 << 20, 3)
    """
    result = run(pytester, source, "--gmem-host", "kvm")
    result.assert_outcomes(passed=1, errors=1)
    assert "<GuestMemfd guest_memfd, fd" in shown(result)
    assert "was never closed" in shown(result)


def test_a_test_may_choose_its_hosts(pytester: pytest.Pytester) -> None:
    source = """
        import pytest

        @pytest.mark.parametrize("gmem_host", ["emulated:arm64/kvm"], indirect=True)
        def test_it(gmem_host):
            assert gmem_host.name == "emulated:arm64/kvm"

        def test_that_does_not_name_it(request):
            request.getfixturevalue("gmem_host")
    """
    result = run(pytester, source)
    result.assert_outcomes(passed=1, failed=1)
    assert "has to name it as an argument" in shown(result)


def test_ram_is_the_machine_s(pytester: pytest.Pytester) -> None:
    source = """
        import pytest

        @pytest.mark.gmem(ram=48 << 20)
        def test_it(gmem_host):
            assert gmem_host.machine.ram.size == 48 << 20
    """
    run(pytester, source, "--gmem-host", "emulated:arm64/kvm").assert_outcomes(passed=1)


@pytest.mark.parametrize("host", ["emulated:arm64/kvm", pytest.param("kvm", marks=with_kvm)])
def test_what_enter_promises(pytester: pytest.Pytester, host: str) -> None:
    source = """
        import pytest
        from guest_memfd.errors import BadInput
        from guest_memfd.uapi.kvm import SHARED, MemFlag

        LAST = 0xfffff000
        STORE = {"arm64": "str x5, [x1]\\n b .", "x86_64": "mov [rsi], r9\\n jmp ."}

        @pytest.mark.gmem("vcpu", "mmap")
        def test_it(gmem_host):
            with gmem_host.open().create_vm() as vm, vm.create_guest_memfd(4096, SHARED) as ram, ram.mmap() as mapping:
                vm.set_user_memory_region2(0, MemFlag.GUEST_MEMFD, LAST, 4096, guest_memfd=ram,
                                           userspace_addr=mapping.address)
                mapping.write(0, gmem_host.assemble(STORE, LAST))
                with vm.create_vcpu() as vcpu:
                    for _ in range(3):                          # at the end of 4 GiB, again and again
                        gmem_host.enter(vm, vcpu, LAST, 0, 0x5000_0000, 2, 3, 4, 5)
                        assert vcpu.run(5).data == b"\\5\\0\\0\\0\\0\\0\\0\\0"
                    with pytest.raises(BadInput, match="40 arguments; there are registers for"):
                        gmem_host.enter(vm, vcpu, LAST, *range(40))
    """
    run(pytester, source, "--gmem-host", host).assert_outcomes(passed=1)


def test_a_design_is_chosen(pytester: pytest.Pytester) -> None:
    source = """
        def test_it(gmem_host):
            assert gmem_host.design == "none"
            gmem_host.open().create_vm().close()
    """
    run(pytester, source, "--gmem-design", "none", "--gmem-host", "emulated:arm64/kvm").assert_outcomes(passed=1)
    result = run(pytester, source, "--gmem-design", "nine", "--gmem-host", "emulated:arm64/kvm")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "--gmem-design: unknown design 'nine'" in shown(result)


def test_memory_runs_out_where_a_test_wants_it_to(pytester: pytest.Pytester) -> None:
    source = """
        import pytest
        from guest_memfd.errors import SyscallFailed

        @pytest.mark.gmem("mmap", "fail", ram=32 << 20)
        def test_it(gmem_host):
            with gmem_host.open() as kvm, kvm.create_vm() as vm, vm.create_guest_memfd(1 << 20, 3) as file:
                gmem_host.machine.kernel_pages.fail_at(0)
                with pytest.raises(SyscallFailed, match="ENOMEM"):
                    file.fallocate(1, 0, 1 << 20)
    """
    run(pytester, source).assert_outcomes(passed=2, skipped=1)
