"""Power: guest memory and hibernation. Two ways to protect it, as options, so that they can be compared.

``count``     as secretmem does: refuse while a file is open, looked at once when hibernation starts
              (secretmem_active(), kernel/power/hibernate.c). Simple, and blind to what comes later.
``notifier``  a PM notifier: at PM_HIBERNATION_PREPARE refuse while a page is away from the host, else let none leave
              until PM_POST_HIBERNATION; the count and the refusal are one atomic operation.
``none``      no protection, as in the posted designs.

Suspend to RAM keeps the tables of both stages, so nothing is vetoed there.
"""

from __future__ import annotations

from errno import EPERM

from guest_memfd.core.gmem import Gmem
from guest_memfd.words.primitives import Steps


def account(gmem: Gmem, pages: int) -> Steps[int]:
    """Pages leave the host (+) or come back (-); -EAGAIN if they may not leave now."""
    if gmem.power != "notifier":
        return 0
    # One primitive counts and looks whether hibernation has begun. Two would leave a gap: a page that leaves
    # after the look and before the count is in no veto and in the image.
    return (yield from gmem.host.pm_account(pages))


def hibernate_prepare(gmem: Gmem) -> Steps[int]:
    """Hibernation is announced; 0, -EPERM (``count``) or -EBUSY (``notifier``)."""
    if gmem.power == "count":
        # Looked at once. A file that is opened after this is not seen: that is what the policy is here to show.
        return -EPERM if (yield from gmem.host.open_files()) else 0
    if gmem.power == "notifier":
        return (yield from gmem.host.pm_prepare("hibernate"))
    return 0


def hibernate_post(gmem: Gmem) -> Steps[None]:
    """Hibernation is over, or was given up after this notifier had agreed."""
    if gmem.power == "notifier":
        yield from gmem.host.pm_post()
