"""What this kernel's guest_memfd and memfd_secret offer, how they behave, and which known bugs they have.

    row.py     a row of the behaviour table: what is done, what is expected where, and the verdict
    child.py   one row in a process of its own: a result, a signal with its address, or no answer
    here.py    what rows work on: /dev/kvm, a VM, files, mappings; all of it in the child
    calls.py   system calls by name, and their arguments
    guest.py   a vCPU at CPL 3, one load or store at a time (x86-64)
    rows/      the table
    offers.py  capabilities, limits, parameters: what rows depend on
    bugs.py    known bugs, and how each shows itself from user space
    left.py    what a run leaves behind
    report.py  all of it as text, JSON and KTAP

Rule of this package: the process that asks never touches /dev/kvm itself for longer than a question; whatever can hang,
crash or leak does so in a child.
"""
