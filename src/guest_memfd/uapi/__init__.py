"""What user space sees: the ioctls and system calls of a VMM, as protocols that every host with user space implements.

    ioctl.py   command numbers, computed as the kernel's _IOC() does
    memory.py  a guest_memfd file, and a mapping of it
    owned.py   what is given up when it is closed; words.py: what a structure is
    kvm.py     /dev/kvm; kvm_run.py the page a vCPU shares, and its exits; kvm_arm64.py what is arm64's
    gunyah.py  /dev/gunyah (series v17)

Rule of this package: names, numbers, layouts and promises; no implementation. Errors are `errors.SyscallFailed` with the
errno, and `errors.Signalled` for memory that must not be touched.
"""
