"""`kvm-7.4`: KVM's guest_memfd as merged, in three parts: its MMU, its memslots, and the file."""
