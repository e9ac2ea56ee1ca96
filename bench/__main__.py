"""``python -m bench [--quick] [GROUP ...]``: measure, and print the tables that the README shows."""

from __future__ import annotations

import argparse
import importlib
import sys

from bench.timing import print_table

GROUPS = ("reading", "engines", "converting", "extracting", "tracking", "qemu")
SLOW = ("qemu",)  # left out of a quick run unless it is named: machines boot for it


def main() -> int:
    """Measure each group; return 1 if a target is missed, unless the run is quick: it shows no speed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small streams: does it run, not how fast")
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; default: all")
    args = parser.parse_args()
    unknown = set(args.groups) - set(GROUPS)
    if unknown:
        parser.error(f"no group {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    reached = True
    for group in args.groups or [name for name in GROUPS if not (args.quick and name in SLOW)]:
        found = importlib.import_module(f"bench.{group}").rows(quick=args.quick)
        print_table(found)
        print(flush=True)
        reached &= all(row.reached for row in found)
    return int(not (reached or args.quick))


if __name__ == "__main__":
    sys.exit(main())
