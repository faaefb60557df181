"""The Resource Manager: the VM that makes VMs, and the messages one asks it with.

    errors.py       its error codes; what Linux makes of them, and what it makes of the hypervisor's
    message.py      240-byte messages, fragments, reassembly
    payloads.py     what the messages carry
    lifecycle.py    which call is allowed in which state of a VM
    memparcel.py    lend, share, donate, append, accept, release, reclaim
    server.py       the Resource Manager itself
    client.py       Linux's side: request, reply, notifications
"""
