"""What runs at EL2: KVM with VHE, pKVM, Gunyah; and any hypervisor that is given by its model."""
