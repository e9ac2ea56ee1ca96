"""Which memory of a process is a guest's, and at which PFNs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from migstream.errors import GuestError
from migstream.guests.protocols import PAGE_SHIFT, PAGE_SIZE

__all__ = ["MemoryRange", "check", "numbered"]


@dataclass(frozen=True)
class MemoryRange:
    """``length`` octets, whole pages, from ``address`` in a process: the guest's PFNs from ``first_pfn``."""

    address: int
    length: int
    first_pfn: int

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.address + self.length

    @property
    def n_pages(self) -> int:
        """Its length in pages."""
        return self.length >> PAGE_SHIFT

    @property
    def end_pfn(self) -> int:
        """The first PFN behind it."""
        return self.first_pfn + self.n_pages

    def __str__(self) -> str:
        return f"{self.address:#x}-{self.end:#x}"


def numbered(spans: Iterable[tuple[int, int]]) -> list[MemoryRange]:
    """Return a range for each (address, end), with PFNs from 0 on and without gaps, in the order given."""
    ranges: list[MemoryRange] = []
    for address, end in spans:
        first_pfn = ranges[-1].end_pfn if ranges else 0
        ranges.append(MemoryRange(address, end - address, first_pfn))
    return ranges


def check(ranges: Sequence[MemoryRange]) -> None:
    """Raise `GuestError` for no range, parts of pages, an empty range, or PFNs that are given twice."""
    if not ranges:
        raise GuestError("no memory of the process is named; at least one range is needed")
    for each in ranges:
        if each.address % PAGE_SIZE or each.length % PAGE_SIZE or each.length <= 0:
            raise GuestError(f"the range {each} is not whole pages of {PAGE_SIZE} octets, at least one")
    ordered = sorted(ranges, key=lambda each: each.first_pfn)
    for before, after in itertools.pairwise(ordered):
        if after.first_pfn < before.end_pfn:
            raise GuestError(f"the ranges {before} and {after} have PFN {after.first_pfn:#x} in common")
