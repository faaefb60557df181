"""A protected guest on upstream's pKVM, and the same guest on the emulated pKVM: both are asked the same.

Upstream's protected VMs (7.1 and later) have anonymous memory of their process, and no guest_memfd. So what is compared is
EL2, and what Linux makes of its refusals: who owns a page, what MEM_SHARE and MEM_UNSHARE say, which signal or errno the
host gets, what is left of a page that was taken by force, and what comes back with the end of the VM.
"""
