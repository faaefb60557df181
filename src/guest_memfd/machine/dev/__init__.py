"""Devices of the emulated machine: what a VMM opens, and the files it gets. uapi/ says what they promise.

    file.py    a guest_memfd file and its mappings, shared by all devices
    kvm/       /dev/kvm
    gunyah/    /dev/gunyah (series v17)

Rule of this package: checks in the kernel's order, then library procedures run to their end; no policy of its own.
"""
