"""Gunyah: el2.py is the hypervisor, client.py the Linux driver on top of the library."""
