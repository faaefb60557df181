"""VMSAv8-64, the EL1&0 translation regime: what the architecture says, and nothing of Linux or of a hypervisor.

    granule.py      geometry: 4K, 16K and 64K translation granules
    descriptor.py   translation table entries as named fields
    registers.py    TCR_EL1, VTCR_EL2, the implemented features, and what a walk derives from them
    regime.py       Stage1 and Stage2: the registers of a context, checked once and worked out per half and level
    permission.py   who may do what: AP, XN, hierarchical bits, WXN, PAN, S2AP
    fault.py        a fault, its status code, ESR, FAR and HPFAR
    syndrome.py     ESR taken apart
    walk.py         one translation, straight from memory
    entry.py        what one TLB entry knows
    tlb.py          every entry a TLB may keep, until the operation that has to remove it
    tlbi.py         TLB maintenance with the scope the architecture gives it; tlbi_instruction.py: as a name and a register
    mmu.py          TLB first, then a walk that fills it
    reached.py      everything that a tree of tables maps
    tables.py       building, splitting and freeing tables; break-before-make is watched where descriptors are stored
    filling.py      where blocks fit, and which runs are contiguous
    pages.py        where table pages come from
    bbm.py          which change of a descriptor needs break-before-make
    sysreg.py       system registers by name
    cpu.py, stop.py one CPU: Unicorn executes, the tables above translate; access.py decodes a load or store for ISV
    guestcore.py    a guest on one of the CPUs: its own stage 1, its VM's stage 2

Left out: FEAT_LPA2 (TCR.DS), level -1, FEAT_HAFDBS (AF=0 always faults), FEAT_XS, permission indirection and overlays,
memory attributes and with them the alignment fault of Device memory, NS, RME.
"""
