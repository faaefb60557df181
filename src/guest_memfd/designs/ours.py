"""`library`: ours, with nothing changed."""

from __future__ import annotations

from guest_memfd.designs.design import Design


class OurLibrary(Design):
    """The library of core/, as it is."""

    name = "library"
    title = "the guest_memfd library of this project"
    source = "core/"
    large = True
