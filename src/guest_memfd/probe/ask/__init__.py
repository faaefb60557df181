"""How a question is put to a kernel.

    row.py     a row of the behaviour table: what is done, what is expected where, and the verdict
    child.py   one row in a process of its own: a result, a signal with its address, or no answer
    here.py    what rows work on: /dev/kvm, a VM, files, mappings; all of it in the child
    calls.py   system calls by name, and their arguments
    guest.py   a vCPU at CPL 3, one load or store at a time (x86-64)
"""
