"""Other Linux kernels, in QEMU: find one, boot it, run one command there, bring back what it said.

No root, no /dev/kvm, nothing installed and nothing left but a cache, of which every file can be deleted at any time.
"""
