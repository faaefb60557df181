"""/dev/kvm of the emulated machine, under plain KVM and under protected KVM.

    system.py   /dev/kvm: capabilities, VM types
    vm.py       a VM: files, slots, vCPUs, and its end
    slots.py    which file is where in the guest's address space
    release.py  what is answered in one release, or on one architecture, and not in another
    memory.py   what KVM's guest_memfd refuses, and conversion in place
    vcpu.py     KVM_RUN

The kernel is 7.4, with conversion in place (v13): attributes belong to the file, a bind that meets another is EEXIST, and
every slot of a guest_memfd is served from the file alone. `Config.kvm_release` has the older ones. Where the library
differs from virt/kvm/guest_memfd.c the library is followed: a binding holds its file, so a slot outlives the descriptor.
"""

from guest_memfd.machine.dev.kvm.system import KvmDevice

__all__ = ["KvmDevice"]
