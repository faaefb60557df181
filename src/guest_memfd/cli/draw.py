"""`gmem draw DESIGN`: the life of a page under a design, drawn from the states that the explorer reaches."""

from __future__ import annotations

import argparse

from guest_memfd.cli.load import add_load, designs_of, load_all
from guest_memfd.cli.options import one_hypervisor
from guest_memfd.cli.output import Output
from guest_memfd.designs import DESIGNS
from guest_memfd.errors import BadInput
from guest_memfd.hypervisors import HYPERVISORS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this verb."""
    parser.add_argument("design", metavar="DESIGN", help="which design (gmem list designs, or FILE.py:NAME)")
    parser.add_argument("--hypervisor", metavar="NAME", help="under which hypervisor (default: the first that the design "
                        "was posted for, pkvm where it was posted for all)")
    add_load(parser)
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", metavar="FILE", help="write the SVG there instead of to standard output")


def run(arguments: argparse.Namespace) -> int:
    """Explore three scenarios, a few seconds, and write the picture."""
    from guest_memfd.draw.life import life
    from guest_memfd.draw.svg import picture

    load_all(arguments)
    (design,) = designs_of(arguments, [arguments.design])
    hypervisor = one_hypervisor(arguments.hypervisor or (DESIGNS[design].hypervisors or ("pkvm",))[0])
    title = f"The life of a page: {design} on {hypervisor} ({HYPERVISORS[hypervisor].title})"
    with Output(arguments.output) as out:
        found = life(design, hypervisor=hypervisor)
        if not found.edges:
            raise BadInput(f"design {design!r} on {hypervisor!r}: the page never changes, and there is nothing to draw")
        out.write(picture(found, title, words=True))
    return 0
