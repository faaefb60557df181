"""The emulated arm64 host: the library's procedures on real page tables, TLBs and instructions.

    ram.py, buddy.py    memory, and who has it
    arm64/              the architecture: descriptors, walks, faults, TLBs, the CPU
    kernel/             Linux's side: linear map, folios, page cache, user mappings, faults, power, modules
    gunyah/, pkvm/      EL2, and the drivers that user space talks to
"""
