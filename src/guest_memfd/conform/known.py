"""Differences that are meant. Each has a reason, and says which answers it is about; none is about an operation as such.

What comes after some of them cannot be compared, because the two hosts are no longer in the same state: a random sequence
ends there. In tables the state is made anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from guest_memfd.conform.operations import OVERFLOW, UserCall
from guest_memfd.conform.subject import StepAnswer
from guest_memfd.uapi.kvm import MemFlag


@dataclass(frozen=True)
class KnownDifference:
    """*about*: of (step, real answer, emulated answer)."""

    name: str
    reason: str
    about: Callable[[UserCall, StepAnswer, StepAnswer], bool]


def _plain_slot(step: UserCall, real: StepAnswer, emulated: StepAnswer) -> bool:
    if step.op not in ("region", "region1"):
        return False
    return not step.args[2] & MemFlag.GUEST_MEMFD and _taken(real, emulated)


def _overflow(step: UserCall, real: StepAnswer, emulated: StepAnswer) -> bool:
    return step.op == "region" and step.args[-1] == OVERFLOW and _taken(real, emulated)


def _taken(real: StepAnswer, emulated: StepAnswer) -> bool:
    # Both the answers and the files: a slot that also changed a file would be another difference, and has to be seen.
    return (real.said, emulated.said) == ("ok", "EINVAL") and real.files == emulated.files


def _held(step: UserCall, real: StepAnswer, emulated: StepAnswer) -> bool:
    # Flags 0: with the private bit (8) it would be a conversion that the guest asks for, and not a slot without a file.
    return (step.op in ("guest_load", "guest_store") and real.said.startswith("EFAULT, memory fault flags 0x0")
            and (emulated.said == "ok" or emulated.said.startswith("0x")) and real.files == emulated.files)


KNOWN = (
    KnownDifference(
        "plain-slots", "the emulated process has no memory but guest_memfd: a slot without one is refused", _plain_slot),
    KnownDifference(
        "bind-offset-overflow", "before 7.2 an offset near 2^63 passes the check against the file's size, a bug that the "
        "emulated device does not have (gmem probe: bind-offset-overflow)", _overflow),
    KnownDifference(
        "binding-holds-file", "when the last descriptor and mapping of a file are closed, KVM's slot has none any more, and "
        "the guest's next access is KVM_EXIT_MEMORY_FAULT; the library's binding holds it (docs/library.md)", _held),
)


# Only of pages that were lent, and only when the emulated ones hold zeros.
def _scrubbed(step: UserCall, real: StepAnswer, emulated: StepAnswer) -> bool:
    if step.op not in ("teardown", "start") or real.said != emulated.said:
        return False
    lent = re.findall(r"(\d+) was lent", real.said)
    pairs = zip(real.files.split(), emulated.files.split(), strict=True)
    return all(theirs == ours or ours in [f"{page}:0" for page in lent] for theirs, ours in pairs)


PKVM_KNOWN = (
    KnownDifference(
        "lent-page-scrubbed", "at the end of a VM upstream zeroes what only the guest could reach, and leaves what it had "
        "lent to the host; the emulated EL2 zeroes both: the library relies on that (GuestMemfdOps.scrubs)", _scrubbed),
)
