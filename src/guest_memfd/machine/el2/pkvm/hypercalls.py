"""Hypercalls of the host. Here is which number calls what, and who may call it in which state.

x0 = 0xC6000000 | n (fast SMC64 call of the vendor hypervisor service; n is no ABI, these are Linux 7.3's); x0 comes back
as 0 or NOT_SUPPORTED, and x1 as the function's own result (kvm/hyp/nvhe/hyp-main.c). EL2 is initialised from the start,
so that calls below MIN_PKVM are refused. Numbers from 51 on, after the last of 7.3, are this project's.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EINVAL, ENOENT
from typing import TYPE_CHECKING

from guest_memfd.machine.el2.pkvm import transitions
from guest_memfd.machine.el2.pkvm.vm import PkvmHypVm, PkvmVcpu
from guest_memfd.words.units import Gfn, Ipa, Pa, Pfn

if TYPE_CHECKING:
    from guest_memfd.machine.el2.pkvm.el2 import El2

BASE = 0xc600_0000
MIN_PKVM = 7
SHARE_HYP, UNSHARE_HYP, DONATE_GUEST, SHARE_GUEST, UNSHARE_GUEST = 29, 30, 31, 32, 33
IN_POISON_FAULT, FORCE_RECLAIM, RECLAIM_DYING, START_TEARDOWN, FINALIZE_TEARDOWN = 42, 43, 44, 45, 46
VCPU_LOAD, VCPU_PUT = 47, 48
UNSHARE, CHECK_CONSENT, SPLIT_GUEST = 51, 52, 53

_MASK = (1 << 64) - 1
_NOT_SUPPORTED = -1 & _MASK
# enum kvm_pgtable_prot: X, W, R from bit 0 on.
_PROT = ((4, "r"), (2, "w"), (1, "x"))

Handler = Callable[["El2", list[int], int], int]


def _vm(el2: El2, handle: int) -> PkvmHypVm | None:
    return el2.vms.get(handle)


# The vCPU that is loaded on the CPU that calls, if it is of that kind. Sharing is upstream only for unprotected VMs.
def _loaded(el2: El2, cpu: int, *, donating: bool) -> PkvmVcpu | None:
    vcpu = el2.loaded.get(cpu)
    return None if vcpu is None or (donating and not vcpu.vm.protected) else vcpu


def _donate_guest(el2: El2, a: list[int], cpu: int) -> int:
    vcpu = _loaded(el2, cpu, donating=True)
    return -EINVAL if vcpu is None else transitions.donate_guest(el2, vcpu.vm, Pfn(a[0]), Gfn(a[1]), a[2] or 1)


def _share_guest(el2: El2, a: list[int], cpu: int) -> int:
    vcpu = _loaded(el2, cpu, donating=False)
    if vcpu is None or a[3] & ~7:
        return -EINVAL
    prot = "".join(letter for bit, letter in _PROT if a[3] & bit)
    return transitions.share_guest(el2, vcpu.vm, Pfn(a[0]), Gfn(a[1]), a[2], prot)


def _unshare_guest(el2: El2, a: list[int], cpu: int) -> int:
    vm = _vm(el2, a[0])
    return -ENOENT if vm is None else transitions.unshare_guest(el2, vm, Gfn(a[1]), a[2])


def _reclaim_dying(el2: El2, a: list[int], cpu: int) -> int:
    vm = _vm(el2, a[0])
    return -EINVAL if vm is None else transitions.reclaim_dying_guest_page(el2, vm, Gfn(a[1]), a[2] or 1)


def _unshare(el2: El2, a: list[int], cpu: int) -> int:
    vm = _vm(el2, a[0])
    return -ENOENT if vm is None else transitions.unshare(el2, vm, Gfn(a[1]))


def _check_consent(el2: El2, a: list[int], cpu: int) -> int:
    vm = _vm(el2, a[0])
    return -ENOENT if vm is None else transitions.check_consent(el2, vm, Gfn(a[1]), a[2], bool(a[3]))


def _split_guest(el2: El2, a: list[int], cpu: int) -> int:
    vm = _vm(el2, a[0])
    return -ENOENT if vm is None else transitions.split_guest(el2, vm, Gfn(a[1]))


def _in_poison_fault(el2: El2, a: list[int], cpu: int) -> int:
    # Upstream reads the IPA from the vCPU's fault registers.
    vcpu = el2.loaded.get(cpu)
    return -EINVAL if vcpu is None else int(vcpu.vm.poisoned(Ipa(a[0])))


def _vcpu_load(el2: El2, a: list[int], cpu: int) -> int:
    vm = _vm(el2, a[0])
    if vm is None or cpu in el2.loaded or vm.dying or a[1] >= len(vm.vcpus) or vm.vcpus[a[1]].loaded:
        return 0                                # void upstream: the next run of the vCPU finds that it is not loaded
    vm.vcpus[a[1]].loaded = True
    el2.loaded[cpu] = vm.vcpus[a[1]]
    return 0


def _vcpu_put(el2: El2, a: list[int], cpu: int) -> int:
    vcpu = el2.loaded.pop(cpu, None)
    if vcpu is not None:
        vcpu.loaded = False
    return 0


def _start_teardown(el2: El2, a: list[int], cpu: int) -> int:
    vm = _vm(el2, a[0])
    return -ENOENT if vm is None else vm.start_teardown()


def _finalize_teardown(el2: El2, a: list[int], cpu: int) -> int:
    vm = _vm(el2, a[0])
    return -ENOENT if vm is None else vm.finalize_teardown()


HANDLERS: dict[int, Handler] = {
    SHARE_HYP: lambda el2, a, cpu: transitions.share_hyp(el2, Pfn(a[0])),           # pfn
    UNSHARE_HYP: lambda el2, a, cpu: transitions.unshare_hyp(el2, Pfn(a[0])),       # pfn
    DONATE_GUEST: _donate_guest,                                                    # pfn, gfn[, nr: addition, 0 is 1]
    SHARE_GUEST: _share_guest,                                                      # pfn, gfn, nr, prot
    UNSHARE_GUEST: _unshare_guest,                                                  # handle, gfn, nr
    IN_POISON_FAULT: _in_poison_fault,                                              # ipa: addition
    FORCE_RECLAIM: lambda el2, a, cpu: transitions.force_reclaim_guest_page(el2, Pa(a[0])),     # physical address
    RECLAIM_DYING: _reclaim_dying,                                                  # handle, gfn[, nr: addition]
    START_TEARDOWN: _start_teardown,                                                # handle
    FINALIZE_TEARDOWN: _finalize_teardown,                                          # handle
    VCPU_LOAD: _vcpu_load,                                                          # handle, index
    VCPU_PUT: _vcpu_put,
    UNSHARE: _unshare,                                                              # handle, gfn: addition
    CHECK_CONSENT: _check_consent,                                                  # handle, gfn, nr, converting: addition
    SPLIT_GUEST: _split_guest,                                                      # handle, gfn: of a posted series
}


def dispatch(el2: El2, regs: list[int], cpu: int) -> None:
    """handle_host_hcall(): registers x0..x17 in and out; *cpu* is who calls."""
    number = (regs[0] & 0xffff_ffff) - BASE
    # Calls for setting EL2 up are refused once it is: they could replace the tables that protect it.
    handler = HANDLERS.get(number) if number >= MIN_PKVM else None
    if handler is None:
        regs[0] = _NOT_SUPPORTED
        return
    result = handler(el2, regs[1:8], cpu)
    regs[0], regs[1] = 0, result & _MASK
