"""The abstract host: a page is a few small fields, so that every interleaving can be explored."""

from guest_memfd.abstract.machine import AbstractHost

__all__ = ["AbstractHost"]
