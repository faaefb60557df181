"""The kernel's binary interfaces that only this host uses: structures, numbers, flags. No code that calls anything.

    kvm.py              /dev/kvm: signal masks and statistics
    kvm_x86.py          registers of x86
    memory.py           cachestat(2), fallocate(2), madvise(2) and timers: numbers of system calls per architecture
    memfd_secret.py     memfd_secret(2)

What the emulated machine's devices take, too, is in `uapi`.
"""
