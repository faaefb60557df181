"""The Linux host: guest memory on the kernel this process runs on, by its own system calls.

    abi/            structures, numbers and flags that only a real kernel takes; nothing there calls anything
    syscall.py      the one place that enters the kernel
    fd.py           what owns a descriptor
    mapping.py      a mapping that may be touched safely
    system.py       /dev/kvm
    vm.py           a VM: memory slots, guest_memfd files, vCPUs
    vcpu.py         a vCPU: KVM_RUN and what it came back with
    kick.py         how a thread in KVM_RUN is made to come back
    stats.py        the counters of a VM or vCPU
    vcpu_x86.py     its registers, and guests at CPL 3 and in real mode
    vcpu_arm64.py   its registers
    anonymous.py    memory of our own, for plain slots
    guest_x86.py    page tables for programs at CPL 3, and a VM with one small program in it
    fault_path.py   does a vCPU fault a guest_memfd in, or is it emulated
    guest_memfd.py  KVM's guest_memfd
    secret.py       memfd_secret(2)
    gunyah.py       /dev/gunyah

`System` and `Secret` are where a program begins. Everything here fails with `errors.SyscallFailed`, `Signalled` or
`HostUnavailable`, with `BadInput` for what cannot be said to a kernel; nothing is emulated.
"""

from guest_memfd.linux.secret import Secret
from guest_memfd.linux.system import System

__all__ = ["Secret", "System"]
