"""Who does what at the same time: the parties, one short file per hazard, and the scenarios made of them."""

from __future__ import annotations

from guest_memfd.plugins import Registry
from guest_memfd.scenarios.device import DEVICE
from guest_memfd.scenarios.lifetime import STOP, TEARDOWN, UNLOADER
from guest_memfd.scenarios.party import Party
from guest_memfd.scenarios.pfncache import PFN_CACHE
from guest_memfd.scenarios.poison import MEMORY_FAILURE
from guest_memfd.scenarios.power import POWER
from guest_memfd.scenarios.readers import KCORE, ZEROPAD
from guest_memfd.scenarios.vcpu import VCPU, VCPU2
from guest_memfd.scenarios.vmm import VMM


def _lacks(thing: object) -> str | None:
    return None if isinstance(thing, Party) else f"{thing!r} is no guest_memfd.scenarios.Party"


PARTIES: Registry[Party] = Registry("party", "guest_memfd.parties", {p.name: p for p in (
    VCPU, VCPU2, VMM, DEVICE, ZEROPAD, KCORE, MEMORY_FAILURE, PFN_CACHE, POWER, UNLOADER, STOP,
)}, _lacks)

__all__ = ["PARTIES", "TEARDOWN", "Party"]
