"""Gunyah: the hypervisor at EL2 and the Resource Manager, as far as memory goes.

    el2.py          the hypervisor as a machine has it: the host VM, other VMs, what a host fault becomes
    hypercalls.py   SMCCC numbers, registers, capabilities
    donate.py       memory changes hands
    addrspace.py    map, unmap, lookup, configure_range, modify_pages
    mappings.py     what a stage-2 table maps, forwards and backwards
    config.py       which guest addresses are for private pages, which for devices
    private.py      locked, unlocked, to be zeroed: software bits of a stage-2 entry
    stage2.py       a stage-2 table as ranges of leaves
    memextent.py    memory extents and where they are mapped
    memdb.py        which extent owns a page; on rangemap.py
    capabilities.py objects by number, with rights
    vm.py, vcpu.py  a VM, and running it
    errors.py       error codes, and what Linux makes of them
    rm/             the Resource Manager: VM life, memory parcels, messages
"""
