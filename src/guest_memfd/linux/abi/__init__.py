"""Tables of the kernel's binary interfaces, one file per device: commands, structures, flags. No code that calls anything.

    table.py            what a row of a table is
    words.py            flags and constants as words
    kvm.py              /dev/kvm, guest memory, the run page: the same on every architecture
    kvm_x86.py          registers and VM types of x86
    kvm_arm64.py        what arm64 adds to it
    memory.py           cachestat(2), fallocate(2), madvise(2) and timers: numbers of system calls per architecture
    memfd_secret.py     memfd_secret(2)
    gunyah.py           /dev/gunyah, series v17
    gunyah_android.py   /dev/gunyah of Android's kernels 6.1 and 6.6

Numbers and names that `uapi` has are not repeated: rows refer to them. A structure here has every field of the
kernel's, reserved ones included, so that all bytes can be read and written by name.
"""
