"""The primitives of words/primitives.py, carried out on the emulated machine: functions over a file and a task.

One module per subject.

    base.py       whose file, whose task, how a primitive waits or ends the kernel
    lifetime.py   what has to be there for a primitive: the module its code is in, the inode it works on
    locks.py      rw-semaphores, folio lock
    pagecache.py  look-up, insertion, references, and what the last put does
    contents.py   the kernel touches memory: real instructions, real aborts
    directmap.py  linear-map entries and their TLB entries
    user.py       VMAs, user accesses, GUP
    guest.py      hypercalls, guest accesses, pfn caches
    files.py      trees, files, inodes, modules, the VM
    services.py   what reads and writes all RAM: kcore, the hibernation image, page poisoning
    power.py      hibernation, memory failure
    host.py       the list of all of them, and the only place from which they are called
"""
