"""guest_memfd: the guest_memfd library of the Linux discussion of July 2024, to be run, broken, compared and proved."""
