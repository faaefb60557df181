"""/dev/gunyah of the emulated machine: series v17, with any design to serve its memory files.

    device.py    CREATE_VM, CREATE_GUEST_MEM
    vm.py        a VM's descriptor: MAP_MEM, configuration, functions
    binding.py   which file is where in the guest
    start.py     START, step by step through the Resource Manager
    teardown.py  stop, reclaim, reset: when the last descriptor goes
    vcpu.py      VCPU_RUN
    ioevent.py   irqfd and ioeventfd
    memory.py    what every memory file refuses, no matter which code serves it
    lent.py      memory served by a library that converts in place: lend is private, share is shared
    posted.py    memory served by the driver as posted
"""

from guest_memfd.machine.dev.gunyah.device import GunyahDeviceFile

__all__ = ["GunyahDeviceFile"]
