"""What came of asking a reader about a vector, and the score of many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from migstream.conformance.corpus import Vector

__all__ = ["Kind", "Outcome", "score"]


class Kind(StrEnum):
    """How a reader did on one vector."""

    AGREES = "agrees"
    DIFFERS = "differs"
    CRASHED = "crashed"
    TIMED_OUT = "timed out"


@dataclass(frozen=True)
class Outcome:
    """A vector, how the reader did on it, and in lines what was expected and found where it did not agree."""

    vector: Vector
    kind: Kind
    differences: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Return what `migstream conformance --json` prints of it."""
        return {
            "name": self.vector.name,
            "group": self.vector.group,
            "description": self.vector.description,
            "outcome": str(self.kind),
            "differences": list(self.differences),
        }


def score(outcomes: Iterable[Outcome]) -> dict[str, Counter[Kind]]:
    """Return how often each kind of outcome occurred, by group, in the order of the corpus."""
    groups: dict[str, Counter[Kind]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.vector.group, Counter())[outcome.kind] += 1
    return groups
