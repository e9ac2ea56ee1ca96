"""Octets that print as the records in them: 8,000 octets of a falsifying example tell nobody anything."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Self

from migstream.fuzzing.tree import Tree

__all__ = ["StreamOctets"]


class StreamOctets(bytes):
    """The octets of a stream. ``steps``: how it was damaged, a line each, none for a sound one."""

    steps: tuple[str, ...]

    def __new__(cls, octets: bytes, steps: Sequence[str] = ()) -> Self:
        """Make it of octets, and the steps that led to them."""
        made = super().__new__(cls, octets)
        made.steps = tuple(steps)
        return made

    def __repr__(self) -> str:
        runs = [(label, len(list(alike))) for label, alike in groupby(Tree.parse(self).labels())]
        nodes = ", ".join(label if times == 1 else f"{times} {label}" for label, times in runs)
        steps = "".join(f"\n    {step}" for step in self.steps)
        return f"<{len(self)} octets: {nodes or 'nothing'}{';' if steps else ''}{steps}>"

    __str__ = __repr__
