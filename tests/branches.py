"""What `make coverage` asks for: the share of branches taken, out of ``coverage json``; exit 1 below it.

coverage.py's own figure, and its ``fail_under``, are of lines and branches together, which is always higher.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

REQUIRED = 95  # per cent


def main(report: str) -> int:
    totals = json.loads(Path(report).read_text())["totals"]
    taken, there = totals["covered_branches"], totals["num_branches"]
    sys.stdout.write(
        f"branches: {taken} of {there} taken, {100 * taken / there:.2f} %; {REQUIRED} % are asked for\n"
    )
    return int(100 * taken < REQUIRED * there)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
