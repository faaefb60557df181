"""What Linux's drivers do around a hypercall: registers in, errno out. Rule of this package: no policy, that is core/'s.

    driver.py   what every driver offers to the machine, and the vCPU that executes single accesses
    kvm.py      plain KVM: calls into its own MMU code
    pkvm.py     hypercalls of protected KVM
    gunyah.py   hypercalls of Gunyah, as drivers/virt/gunyah issues them
    modelled.py calls of a third party's model, which el2/modelled carries out on real tables
"""
