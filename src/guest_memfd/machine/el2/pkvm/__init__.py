"""Protected KVM at EL2: arch/arm64/kvm/hyp/nvhe of Linux 7.3, page ownership and what guards it.

    states.py       who owns a page: hyp_vmemmap
    annotation.py   what an invalid stage-2 entry says
    host_stage2.py  the host's stage 2: filled by its faults, annotated where pages are given away
    checks.py       what has to be so before a page changes hands
    transitions.py  share, donate, reclaim: every check, then every change
    vm.py           VMs, their memcaches and vCPUs, hypercalls of guests
    hypercalls.py   hypercalls of the host
    el2.py          the machine's EL2: all of it together
"""
