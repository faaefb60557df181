"""The abstract host and the machine, side by side: after every primitive they must agree."""
