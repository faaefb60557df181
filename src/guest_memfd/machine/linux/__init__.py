"""Linux's side of the machine: the linear map, folios, page cache, user mappings, faults, power, modules."""
