"""What runs at EL2: KVM with VHE, pKVM, Gunyah."""
