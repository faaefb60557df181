"""Who does what at the same time, and where: the parties, one short file per hazard, and the scenes."""

from __future__ import annotations

from guest_memfd.plugins.registry import Registry
from guest_memfd.scenarios.device import DEVICE, PINNER
from guest_memfd.scenarios.filling import LAUNCHER, PFN_CACHE_V2, UFFD, WRITER
from guest_memfd.scenarios.lifetime import CREATOR, OTHER_STOP, STOP, TEARDOWN, UNLOADER
from guest_memfd.scenarios.party import Party, lacks
from guest_memfd.scenarios.pfncache import PFN_CACHE
from guest_memfd.scenarios.poison import MEMORY_FAILURE
from guest_memfd.scenarios.power import POWER
from guest_memfd.scenarios.readers import DRAINER, KCORE, PAGE_CACHE_READER, ZEROPAD
from guest_memfd.scenarios.scenes import SCENES
from guest_memfd.scenarios.vcpu import OTHER_VCPU, PATIENT_VCPU, VCPU, VCPU2
from guest_memfd.scenarios.vmm import REPEATER, VMM, VMM2, VMM_ANY, VMM_LIFE, VMM_MAPPED, VMM_MOVE, VMM_ODD, VMM_PAGES

PARTIES: Registry[Party] = Registry("party", "guest_memfd.parties", {p.name: p for p in (
    VCPU, VCPU2, PATIENT_VCPU, OTHER_VCPU, VMM, VMM_LIFE, VMM_PAGES, VMM_MAPPED, VMM_ANY, VMM_MOVE, VMM_ODD, CREATOR, PINNER,
    VMM2, REPEATER, DEVICE, ZEROPAD, KCORE, PAGE_CACHE_READER, MEMORY_FAILURE, PFN_CACHE, POWER, UNLOADER, STOP,
    OTHER_STOP, DRAINER, WRITER, LAUNCHER, UFFD, PFN_CACHE_V2,
)}, lacks)

__all__ = ["PARTIES", "SCENES", "TEARDOWN", "Party"]
