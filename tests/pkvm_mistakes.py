"""Mistakes planted in the emulated pKVM, in EL2 and in Linux's half; gmem conform --pkvm sees them all."""

from __future__ import annotations

from collections.abc import Callable
from errno import EPERM
from typing import Any

import pytest

from guest_memfd.machine.board.hostcpu import HostCpu
from guest_memfd.machine.el2.pkvm import transitions
from guest_memfd.machine.el2.pkvm.host_stage2 import HostStage2
from guest_memfd.machine.el2.pkvm.vm import PkvmHypVm, PkvmVcpu
from guest_memfd.machine.hw.ram import Ram
from guest_memfd.machine.linux import mem_abort
from guest_memfd.machine.linux.fault_info import BUS_ADRERR, SEGV_MAPERR, SIGBUS
from guest_memfd.machine.linux.mem_abort import UserSignal
from guest_memfd.words.units import Gfn, Ipa, gfn_to_gpa

Plant = Callable[[pytest.MonkeyPatch], None]


def _in(function: str, owner: Any, name: str, instead: Callable[..., Any]) -> Plant:
    """While transitions.*function* runs, *owner*'s *name* is *instead*, which is given what it replaces."""
    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        real = getattr(transitions, function)

        def wrong(*args: Any) -> Any:
            with pytest.MonkeyPatch.context() as inside:
                old = getattr(owner, name)
                inside.setattr(owner, name, lambda *given, **more: instead(old, *given, **more))
                return real(*args)

        monkeypatch.setattr(transitions, function, wrong)

    return plant


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _signal_of_no_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mem_abort, "SEGV_ACCERR", SEGV_MAPERR)


def _another_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    real = mem_abort.do_page_fault

    def wrong(*args: Any) -> Any:
        told = real(*args)
        return UserSignal(SIGBUS, BUS_ADRERR, told.address) if isinstance(told, UserSignal) else told

    monkeypatch.setitem(mem_abort._HANDLERS, "do_translation_fault", wrong)
    monkeypatch.setitem(mem_abort._HANDLERS, "do_page_fault", wrong)


def _no_fixup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mem_abort, "fixup_exception", lambda *_: False)


def _reclaims_for_user_space(monkeypatch: pytest.MonkeyPatch) -> None:
    real = HostCpu._abort

    def wrong(cpu: HostCpu, fault: Any) -> Any:
        told = real(cpu, fault)
        if isinstance(told, UserSignal) and fault.stage == 2:
            cpu.machine.driver.force_reclaim(fault.ipa & -4096)
            return mem_abort.Retry("taken by force")
        return told

    monkeypatch.setattr(HostCpu, "_abort", wrong)


def _alignment_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    real = PkvmVcpu._call

    def wrong(vcpu: PkvmVcpu, number: int) -> Any:
        vcpu.cpu.set_x(1, vcpu.cpu.x(1) & -4096)
        return real(vcpu, number)

    monkeypatch.setattr(PkvmVcpu, "_call", wrong)


def _poison_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PkvmHypVm, "poisoned", lambda *_: False)


def _share_again(monkeypatch: pytest.MonkeyPatch) -> None:
    real = transitions.guest_share_host
    monkeypatch.setattr(transitions, "guest_share_host",
                        lambda *args: 0 if real(*args) == -EPERM else real(*args))


def _share_zeroes(monkeypatch: pytest.MonkeyPatch) -> None:
    real = transitions.guest_share_host

    def wrong(el2: Any, vm: PkvmHypVm, gfn: Gfn) -> int:
        ret = int(real(el2, vm, gfn))
        if not ret:
            el2.ram.zero(vm.pgt.leaf(gfn_to_gpa(gfn)).oa, 4096)
        return ret

    monkeypatch.setattr(transitions, "guest_share_host", wrong)


def _unshare_faults_in(monkeypatch: pytest.MonkeyPatch) -> None:
    real = PkvmVcpu._unshare

    def wrong(vcpu: PkvmVcpu, ipa: Ipa) -> Any:
        return real(vcpu, ipa) if vcpu.vm.pgt.leaf(ipa).value else vcpu._fault_in(ipa)

    monkeypatch.setattr(PkvmVcpu, "_unshare", wrong)


def _calls_for_everyone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PkvmHypVm, "protected", property(lambda _: True, _nothing), raising=False)


MISTAKES: dict[str, Plant] = {
    "the host keeps its entry for a page that it donates": _in("donate_guest", HostStage2, "give_away", _nothing),
    "a page taken by force keeps its bytes": _in("force_reclaim_guest_page", Ram, "zero", _nothing),
    "a page of a dead guest keeps its bytes": _in("reclaim_dying_guest_page", Ram, "zero", _nothing),
    "MEM_SHARE does not give the page to the host": _in("guest_share_host", HostStage2, "take_back", _nothing),
    "MEM_SHARE loses what is in the page": _share_zeroes,
    "the host keeps its entry when the guest ends its share": _in("guest_unshare_host", HostStage2, "give_away", _nothing),
    "MEM_SHARE of a page that is shared already succeeds": _share_again,
    "MEM_UNSHARE of a page that is not there faults it in": _unshare_faults_in,
    "addresses of pages are rounded": _alignment_is_not_looked_at,
    "a guest is not told that its page was taken": _poison_is_forgotten,
    "the signal's code is that of an address without a mapping": _signal_of_no_mapping,
    "the signal is SIGBUS": _another_signal,
    "copy_from_user() of a guest's page is not fixed up": _no_fixup,
    "a load of user space takes the page by force": _reclaims_for_user_space,
    "guests that are not protected may share, too": _calls_for_everyone,
}
