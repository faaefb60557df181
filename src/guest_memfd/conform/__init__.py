"""The real /dev/kvm judges the emulated one: the same calls on both, compared after every call.

    operations.py   what user space can do, as data: each operation with its arguments and their edges
    sequence.py     operations in a row: at random, from tables, in a file
    subject.py      what performs an operation and says what came of it; what can be seen of the files afterwards
    emulated.py     the emulated /dev/kvm as a subject;  linux.py: this kernel's, in a child of its own (child.py)
    touch.py        a load or store by the CPU that survives its signal
    known.py        differences that are meant, with the reason;  release.py: whose answers the kernel gives
    compare.py      both, and where they part;  shrink.py: as few steps as show it;  c_program.py: in C

A sequence does not depend on results: files, mappings, VMs and pins are in numbered registers, so any steps can be left out
and what is left still means something. That is what makes shrinking a matter of a few lines.
"""
