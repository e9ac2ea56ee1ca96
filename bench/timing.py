"""Timing two commands against each other, so that a noisy machine slows both."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Row", "compare", "print_table", "shell"]


@dataclass(frozen=True)
class Row:
    """One line of the table: a ratio of speeds (higher is better) or of a cost (lower is better)."""

    what: str
    ours: str
    reference: str
    ratio: float
    target: float
    higher_is_better: bool = True

    @property
    def reached(self) -> bool:
        """Whether the target is met."""
        return self.ratio >= self.target if self.higher_is_better else self.ratio <= self.target


def shell(command: str) -> Callable[[], float]:
    """Return a function that runs ``command`` in a shell and returns its wall-clock seconds."""

    def run() -> float:
        started = time.perf_counter()
        subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL, env=os.environ)
        return time.perf_counter() - started

    return run


def compare(
    ours: Callable[[], float], reference: Callable[[], float], runs: int = 5
) -> tuple[float, float, float]:
    """Run both in turn, after one run of each that does not count.

    Returns the medians of our seconds, of the reference's, and of the reference's time over ours, pair by
    pair: how many times as fast we are.
    """
    ours()
    reference()
    pairs = [(ours(), reference()) for _ in range(runs)]
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(b / a for a, b in pairs),
    )


def print_table(rows: list[Row]) -> None:
    """Print the rows as a Markdown table."""
    print("| what | migstream | reference | ratio | target | |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        sign = "at least" if row.higher_is_better else "at most"
        met = "reached" if row.reached else "**missed**"
        print(
            f"| {row.what} | {row.ours} | {row.reference} | {row.ratio:.2f} | {sign} {row.target} | {met} |"
        )
