"""The command; see the package."""

from __future__ import annotations

import argparse
import sys
import time

from fuzz.kinds import KINDS


def main() -> int:
    """0 if every input was answered as it should be, 2 if not."""
    parser = argparse.ArgumentParser(prog="fuzz", description="random inputs, and whether each is answered as it should be")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"default: all ({', '.join(KINDS)})")
    parser.add_argument("--count", type=int, default=1000, help="inputs of each kind")
    parser.add_argument("--start", type=int, default=0, help="number of the first")
    parser.add_argument("--only", type=int, help="this input alone")
    args = parser.parse_args()
    numbers = range(args.start, args.start + args.count) if args.only is None else range(args.only, args.only + 1)
    failed = 0
    for name in args.kinds or KINDS:
        began = time.monotonic()
        found = 0
        for failure in KINDS[name]().run(numbers):
            found += 1
            print(f"{name} {failure.number}: {failure.why}\n{failure.what}", flush=True)
        took = time.monotonic() - began
        print(f"{name}: {len(numbers):,} inputs from {numbers.start} on, {found} wrong, {took:.0f} s", flush=True)
        failed += found
    return 2 if failed else 0


sys.exit(main())
