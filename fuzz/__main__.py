"""``python -m fuzz``: run the reader's harness for a while, or one execution of it."""

from __future__ import annotations

import argparse
import sys
import time
import traceback

from fuzz.reader import execute, mutate, seeds


def main() -> int:
    """Run; return 0 if nothing was found, else 1."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="how long (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="where everything follows from (default 0)")
    parser.add_argument("--only", type=int, metavar="N", help="replay execution N, and show its traceback")
    args = parser.parse_args()
    corpus = seeds()
    if args.only is not None:
        print("sound" if execute(mutate(args.seed, args.only, corpus)) else "not sound")
        return 0
    started, number, sound, found = time.monotonic(), 0, 0, 0
    while time.monotonic() - started < args.seconds:
        try:
            sound += execute(mutate(args.seed, number, corpus))
        except Exception:
            found += 1
            print(f"finding: python -m fuzz --seed {args.seed} --only {number}")
            traceback.print_exc(limit=-3)
        number += 1
    spent = time.monotonic() - started
    print(f"{number} executions, {number / spent:.0f}/s, {sound} sound, {found} findings")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
