"""The hypervisors, and how third parties add theirs: an entry point in the group ``guest_memfd.hypervisors``."""

from __future__ import annotations

from collections.abc import Mapping

from guest_memfd.core.hypervisor import Hypervisor
from guest_memfd.hypervisors.gunyah.client import GUNYAH
from guest_memfd.hypervisors.kvm.cca import CCA
from guest_memfd.hypervisors.kvm.default import KVM
from guest_memfd.hypervisors.kvm.pkvm import PKVM
from guest_memfd.hypervisors.kvm.s390 import S390
from guest_memfd.hypervisors.kvm.snp import SNP
from guest_memfd.hypervisors.kvm.tdx import TDX
from guest_memfd.hypervisors.names import lacks
from guest_memfd.plugins.registry import Registry

HYPERVISORS: Registry[Hypervisor] = Registry(
    "hypervisor", "guest_memfd.hypervisors", {h.name: h for h in (KVM, PKVM, GUNYAH, TDX, SNP, CCA, S390)}, lacks
)

SETS: Mapping[str, tuple[str, ...]] = {"2026": (CCA.name, S390.name)}
"""Hypervisors that are compared only with the designs of that year (`designs.SETS`); those in none always are."""
