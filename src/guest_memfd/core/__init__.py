"""THE LIBRARY: hypervisor-neutral procedures over the primitives of a host. Imports no host, hypervisor or checker.

    library.py      the list of operations, and of the steps that a design may replace
    gmem.py         the file, as these procedures see it
    file.py         file, inode, bindings, module lifetime
    fault.py        pages into the guest and into the VMM
    convert.py      accessible <-> inaccessible, in place
    invalidate.py   hole punching, memory errors
    folio.py        one folio: found, zeroed, taken out
    direct_map.py   the only code that changes the direct map
    power.py        hibernation
    ops.py          what a hypervisor supplies; hypervisor.py: the record that names it
"""

from guest_memfd.core.library import Library
from guest_memfd.core.ops import GuestMemfdOps, Reason

__all__ = ["GuestMemfdOps", "Library", "Reason"]
