"""KVM's own halves of a machine: stage-2 tables (arch/arm64/kvm/hyp/pgtable.c), vCPUs, and plain KVM on VHE.

    pgtable.py  a stage-2 table as KVM keeps it: break-before-make, TLB maintenance, nothing half done
    vcpu.py     what a vCPU's run comes back with
    guest.py    the stage 2 of a guest, of plain KVM and pKVM
    vm.py       the host without a stage 2 of its own: guests are mapped under mmu_lock and no one owns anything
"""
