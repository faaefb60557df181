"""`no-flush`: the library without the TLB flush after zapping, "because the hypervisor flushes anyway"."""

from __future__ import annotations

from guest_memfd import Design, Folio, Steps


class NoFlush(Design):
    """Overrides what is different, and nothing else."""

    name = "no-flush"
    title = "the library, relying on the hypervisor's flush"
    source = "docs/write-a-design.md"

    def flush(self, folios: tuple[Folio, ...]) -> Steps[None]:
        """Left to the hypervisor."""
        yield from ()
