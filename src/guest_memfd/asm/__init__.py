"""Assemblers for the guests: a toolchain, no part of a host."""
