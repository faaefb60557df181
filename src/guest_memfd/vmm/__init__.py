"""A tiny VMM over /dev/kvm or /dev/gunyah (hosts/uapi): one vCPU, private memory, a shared window, a console.

    layout.py     where the guest's memory is, and what goes there before it starts
    devices.py    the console, and what is no device
    loop.py       running the guest until it ends, and noticing that it never will
    kvm.py        a guest by way of /dev/kvm (arm64)
    gunyah.py     a guest by way of /dev/gunyah

and what `gmem run` puts around it on the emulated machine:

    emulated.py   machine, VMM, readers, teardown, audit: one run from beginning to end
    readers.py    the host kernel reads what it should not
    watch.py      the laws, judged at every primitive; counting and tracing
    ghosts.py     what the laws have to remember when guests are real programs
"""
