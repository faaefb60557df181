"""What it costs to lend guest memory and to take it back on the emulated machine, counted and timed.

Run it with the Python that has guest_memfd[emu] installed (`make bench-emulated`). Counts do not depend on the machine it
runs on; seconds do, and ratios are taken within one run. Nothing is judged by time.
"""

from __future__ import annotations

import argparse
import gc
import resource
import time
from collections.abc import Callable
from typing import NamedTuple

from guest_memfd.asm.arm64.asm import assemble
from guest_memfd.designs.ours import OurLibrary
from guest_memfd.machine.hw.arm64.guestcore import GuestCore
from guest_memfd.vmm.counted_file import CountedFile
from guest_memfd.words.units import PAGE, Index

GIB = 1 << 30
AUDITED = 100_000
"""Files of up to so many pages are audited afterwards: that looks at every page of RAM."""
NAMES = {0: "4K", 9: "2M", 18: "1G"}


class Cost(NamedTuple):
    """Folios lent and taken back; seconds of each; what the kernel and the hypervisor did for it."""

    folios: int
    lend: float
    back: float
    leaf_splits: int
    flushes: int
    table_pages: int

    @property
    def per_folio(self) -> float:
        """Microseconds for a folio to go and come back."""
        return (self.lend + self.back) / self.folios * 1e6


def timed(work: Callable[[], None]) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def taken_back(file: CountedFile) -> float:
    """Seconds. AssertionError when anything is left behind."""
    seconds = timed(file.take_back)
    assert file.machine.audit() == [] if file.pages <= AUDITED else not file.machine.pages
    return seconds


def cost(hypervisor: str, pages: int, order: int, *, bbml3: bool) -> Cost:
    """Lend *pages* pages in folios of *order* and take them back."""
    gc.collect()
    gc.disable()                        # a million folios are a million objects that Python would look at again and again
    file = CountedFile(OurLibrary, hypervisor, pages, order, bbml3=bbml3)
    lm = file.machine.linear_map
    splits, flushes, tables = sum(lm.splits.values()), sum(lm.flushes.values()), lm.table_pages
    lent = timed(file.lend)
    back = taken_back(file)
    return Cost(pages >> order, lent, back, sum(lm.splits.values()) - splits, sum(lm.flushes.values()) - flushes,
                lm.table_pages - tables)


def one_gib(hypervisor: str) -> None:
    """1 GiB in folios of each size, on a linear map of pages and on one of blocks."""
    print(f"1 GiB lent and taken back, {hypervisor}, library")
    print("  linear map   folios         number     lend s     back s   us/folio   ratio to 4K   splits  flushes"
          "  new tables")
    for bbml3, name in ((False, "pages"), (True, "blocks")):
        whole = 0.0
        for order in (0, 9, 18):
            c = cost(hypervisor, GIB // PAGE, order, bbml3=bbml3)
            whole = whole or c.lend + c.back
            print(f"  {name:<12} {NAMES[order]:<6} {c.folios:>12,} {c.lend:>10.3f} {c.back:>10.3f} {c.per_folio:>10.1f}"
                  f" {(c.lend + c.back) / whole:>13.4f} {c.leaf_splits:>8,} {c.flushes:>8,} {c.table_pages:>11,}")


def one_tib(hypervisor: str) -> None:
    """1 TiB as 1024 blocks."""
    start = time.perf_counter()
    file = CountedFile(OurLibrary, hypervisor, (1 << 40) // PAGE, 18)
    built = time.perf_counter() - start
    lent, back = timed(file.lend), taken_back(file)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"1 TiB lent as 1,024 blocks of 1G, {hypervisor}: machine built in {built:.2f} s, lent in {lent:.3f} s, "
          f"taken back in {back:.3f} s, {peak:.0f} MB at most in this process")


def curve(hypervisor: str, most: int) -> None:
    """Microseconds per folio of 4K from 10^3 folios on."""
    print(f"time per folio of 4K, {hypervisor}")
    first, number = 0.0, 1000
    while number <= most:
        c = cost(hypervisor, number, 0, bbml3=False)
        first = first or c.per_folio
        print(f"  {number:>10,} folios {c.per_folio:>8.1f} us/folio   {c.per_folio / first:.2f} of the first")
        number *= 10


def round_trips(hypervisor: str, order: int, most: int) -> None:
    """1 GiB in folios of *order*; one page of it is converted to shared and back, *most* times."""
    file = CountedFile(OurLibrary, hypervisor, GIB // PAGE, order)
    file.lend()
    page = Index(5)
    first, done, every = 0.0, 0, max(most // 5, 1)
    print(f"1 GiB lent as {NAMES[order]}, {hypervisor}: one 4K page to shared and back, {most:,} times")
    file.to_and_fro(page)                                           # splits what is split for good
    while done < most:
        before = file.counted()
        start = time.process_time()                                 # other work on this machine is no part of a curve
        for _ in range(every):
            file.to_and_fro(page)
        seconds = time.process_time() - start
        after, done = file.counted(), done + every
        first = first or seconds
        print(f"  up to {done:>6,} {seconds / every * 1e3:>10.2f} ms each, {seconds / first:.2f} of the first;"
              f" {(after.splits - before.splits) / every:.2f} splits, {(after.table_pages - before.table_pages) / every:.2f}"
              f" table pages, {(after.hypercalls - before.hypercalls) / every:,.0f} hypercalls each")


LOOP = """
        mov x0, #0x10000000
loop:   subs x0, x0, #1
        b.ne loop
        hvc #0
"""
SWEEP = """
        ldr x0, =0x80100000
        mov x1, #4096
next:   ldr x2, [x0]
        add x0, x0, #4096
        subs x1, x1, #1
        b.ne next
        hvc #0
"""


def execution() -> None:
    """Guest instructions per second, and translations per second through walker and TLB."""
    file = CountedFile(OurLibrary, "pkvm", (64 << 20) // PAGE, 0, bbml3=False)
    file.lend()
    machine, vm = file.machine, file.host.vm
    core = GuestCore(machine.ram, machine.tlbs, 0, lambda: machine.driver.guest_stage2(vm))
    code = machine.driver.lookup(vm, 0)
    assert code is not None
    for name, source, unit in (("hot loop", LOOP, 2 << 28), ("4,096 pages, one load each", SWEEP, 0)):
        program = assemble(source.replace("0x80100000", "0x100000"), 0)
        machine.ram.write(code, program.data)
        for again in ("cold", "warm") if not unit else ("",):
            if again == "cold":
                machine.tlbs[0].clear()
            core.pc, core.fills = 0, 0
            start = time.perf_counter()
            core.run()
            seconds = time.perf_counter() - start
            done, what = (unit / 1e6, "M instructions/s") if unit else (core.fills / 1e3, f"k fills/s ({again} TLB)")
            print(f"  {name}: {done / seconds:,.0f} {what}")


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hypervisor", default="gunyah", choices=("kvm", "pkvm", "gunyah"))
    parser.add_argument("--curve", action="store_true", help="the curve alone")
    parser.add_argument("--most", type=int, default=1_000_000, help="folios at the end of the curve")
    arguments = parser.parse_args()
    if not arguments.curve:
        one_tib(arguments.hypervisor)
        one_gib(arguments.hypervisor)
    curve(arguments.hypervisor, arguments.most)
    if arguments.curve:
        return
    round_trips(arguments.hypervisor, 9, 1000)
    round_trips(arguments.hypervisor, 18, 5)
    print("execution of guest code")
    execution()


if __name__ == "__main__":
    main()
