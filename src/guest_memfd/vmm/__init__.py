"""A tiny VMM over /dev/kvm or /dev/gunyah (uapi): one vCPU, private memory, a shared window, a console.

    layout.py     where the guest's memory is, and what goes there before it starts
    devices.py    the console, the balloon, and what is no device
    loop.py       running the guest until it ends, and noticing that it never will
    kvm.py        a guest by way of /dev/kvm (arm64)
    kvm_x86.py    a guest by way of the real /dev/kvm (x86-64), in 64-bit or real mode
    gunyah.py     a guest by way of /dev/gunyah

what `gmem run --on kvm` puts around it:

    linux.py      what can this kernel do, how does its vCPU reach memory; one run from beginning to end

and on the emulated machine:

    emulated.py   machine, VMM, readers, teardown, audit: one run from beginning to end
    readers.py    the host kernel reads what it should not
    watch.py      the laws, judged at every primitive; counting and tracing
    ghosts.py     what the laws have to remember when guests are real programs
"""
