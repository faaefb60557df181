"""The emulated arm64 host: the library's procedures on real page tables, TLBs and instructions.

    hw/             memory and its allocator; the architecture: descriptors, walks, faults, TLBs, the CPU
    el2/            what runs at EL2: KVM, pKVM, Gunyah
    linux/          Linux's side: linear map, folios, page cache, user mappings, faults, power, modules
    board/          the parts put together, the CPUs that execute, the ghosts that the laws read
    hypcalls/       what the library asks of a hypervisor, in that hypervisor's own calls
    primitives/     the steps that a procedure asks for
    dev/            /dev/kvm and /dev/gunyah, as user space sees them
    adversary.py    the worst luck that hardware allows; audit.py, stray.py: what has not come back, and what leads astray
    boot.py         all of it: `Machine`
"""
