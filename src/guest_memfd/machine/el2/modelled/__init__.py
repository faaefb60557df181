"""EL2 of a hypervisor that is given by its model, on real tables."""
