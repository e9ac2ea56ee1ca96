"""``python -m fuzz``: mutated streams for the targets of `fuzz.targets`, in this process and its children.

Every execution has a number and follows from target, seed and number alone::

    python -m fuzz --seconds 600
    python -m fuzz --target restore --seed 7 --only 12345
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from fuzz.runner import Plan, replay, run
from fuzz.targets import TARGETS


def main() -> int:
    """Run; return 0 if nothing was found, else 1."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="may be repeated; all")
    parser.add_argument("--seconds", type=float, default=60, help="for all targets together (60)")
    parser.add_argument("--seed", default="0", help="where every mutation follows from (0)")
    parser.add_argument("--only", type=int, metavar="N", help="execute number N once, and say all about it")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (one a core)")
    parser.add_argument("--findings", type=Path, metavar="DIR", help="write each finding into DIR")
    args = parser.parse_args()
    names = args.target or list(TARGETS)
    if args.only is None:
        return run(Plan(tuple(names), args.seed, args.seconds, args.workers, args.findings))
    if len(names) != 1:
        parser.error("--only needs one --target")
    return replay(names[0], args.seed, args.only)


if __name__ == "__main__":
    sys.exit(main())
