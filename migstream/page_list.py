"""Final pages by PFN: the type that was named last, and where the page that came with it lies.

Nine octets a PFN, whatever the number of passes; memory that no PFN falls into is never touched.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from migstream.guests.memory import ANONYMOUS
from migstream.guests.protocols import PAGE_SIZE
from migstream.records.page_types import DATA_TYPES

__all__ = ["HAS_DATA", "Batch", "PageList", "PageRun"]

BLOCK = 1 << 16  # PFNs looked at in one go

#: Whether pages of a type have content in a stream, bool[16].
HAS_DATA = np.isin(np.arange(16), list(DATA_TYPES))


class Batch(NamedTuple):
    """Some PFNs: uint64[n] ascending, their types uint8[n], and where their pages lie, int64[n].

    An offset is in octets from the start of the (unpacked) input, or -1 for a PFN without a page.
    """

    pfns: npt.NDArray[np.uint64]
    types: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]


class PageRun(NamedTuple):
    """``pages`` pages of consecutive PFNs from ``first`` on, which lie one after the other at ``offset``."""

    first: int
    pages: int
    offset: int


class PageList:
    """Types and offsets of up to ``size`` PFNs; ``end`` is one more than the highest that was named.

    Both are kept one higher than they are, so that 0, which memory holds at first, is what nobody named.
    """

    def __init__(self, size: int) -> None:
        """Make an empty list of PFNs below ``size``."""
        self.resize(size)

    def resize(self, size: int) -> None:
        """Start anew, empty, with PFNs below ``size``."""
        self.size = size
        self.end = 0
        room = max(size, 1)
        self._types = np.frombuffer(mmap.mmap(-1, room, flags=ANONYMOUS), np.uint8)
        self._offsets = np.frombuffer(mmap.mmap(-1, 8 * room, flags=ANONYMOUS), np.int64)

    def put(
        self, pfns: npt.NDArray[np.int64], types: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]
    ) -> None:
        """Replace what is known of ``pfns``; of one named twice, the last counts."""
        if not len(pfns):
            return
        self._types[pfns] = types + np.uint8(1)
        self._offsets[pfns] = offsets + 1
        self.end = max(self.end, int(pfns.max()) + 1)

    def lookup(self, pfns: npt.NDArray[np.uint64]) -> Batch:
        """Return what is known of ``pfns``, uint64[n]; those never named have type XTAB and no page."""
        types = np.full(len(pfns), 0xF, np.uint8)
        offsets = np.full(len(pfns), -1, np.int64)
        inside = pfns < np.uint64(self.end)
        found, where = self._get(pfns[inside].astype(np.int64))
        types[inside] = np.where(found > 0, found - np.uint8(1), np.uint8(0xF))
        offsets[inside] = where - 1
        return Batch(pfns, types, offsets)

    def batches(self, first: int = 0, end: int | None = None) -> Iterator[Batch]:
        """Yield every PFN in [``first``, ``end``) that was named, ascending, at most 64 Ki at a time."""
        end = self.end if end is None else min(end, self.end)
        for start in range(first, end, BLOCK):
            named = np.flatnonzero(self._types[start : min(start + BLOCK, end)]) + start
            if len(named):
                types, offsets = self._get(named)
                yield Batch(named.astype(np.uint64), types - np.uint8(1), offsets - 1)

    def runs(
        self, first: int = 0, end: int | None = None, *, omit: frozenset[int] = frozenset()
    ) -> Iterator[PageRun]:
        """Yield the pages in [``first``, ``end``) in the order of PFNs, those that lie together as one run.

        Pages whose type is in ``omit`` are left out. Runs end at multiples of 64 Ki PFNs.
        """
        for pfns, offsets in self._with_pages(first, end, omit):
            yield from _runs(pfns, offsets)

    def pfn_runs(
        self, first: int = 0, end: int | None = None, *, omit: frozenset[int] = frozenset()
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """Return the runs of consecutive PFNs with pages: their first PFNs and lengths, uint64[n] both.

        As `runs`, but wherever the pages lie; each of these starts where one of those does.
        """
        starts: list[npt.NDArray[np.uint64]] = [np.empty(0, np.uint64)]
        ends: list[npt.NDArray[np.uint64]] = [np.empty(0, np.uint64)]
        for pfns, _ in self._with_pages(first, end, omit):
            breaks = np.flatnonzero(np.diff(pfns) != 1)
            begin = 1 if len(ends[-1]) and ends[-1][-1] == pfns[0] else 0
            if begin:
                ends[-1] = ends[-1][:-1]  # the run goes on over the edge of the batch
            starts.append(pfns[np.concatenate(([0], breaks + 1))][begin:])
            ends.append(pfns[np.append(breaks, len(pfns) - 1)] + np.uint64(1))
        first_pfns = np.concatenate(starts)
        return first_pfns, np.concatenate(ends) - first_pfns

    def pfns_with_pages(
        self, first: int = 0, end: int | None = None, *, omit: frozenset[int] = frozenset()
    ) -> Iterator[npt.NDArray[np.uint64]]:
        """Yield the PFNs that `runs` consists of, uint64[n], 64 Ki at most at a time."""
        return (pfns for pfns, _ in self._with_pages(first, end, omit))

    def _with_pages(
        self, first: int, end: int | None, omit: frozenset[int]
    ) -> Iterator[tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]]:
        keep = HAS_DATA.copy()
        keep[list(omit)] = False
        for batch in self.batches(first, end):
            there = keep[batch.types]
            if there.any():
                yield batch.pfns[there], batch.offsets[there]

    def count_by_type(self, first: int = 0, end: int | None = None) -> Counter[int]:
        """Return how many PFNs in [``first``, ``end``) have each type."""
        counts = np.zeros(16, np.int64)
        for batch in self.batches(first, end):
            counts += np.bincount(batch.types, minlength=16)
        return Counter({type: n for type, n in enumerate(counts.tolist()) if n})

    def absorb(self, other: PageList) -> None:
        """Take over everything that ``other`` knows."""
        for batch in other.batches():
            self.put(batch.pfns.astype(np.int64), batch.types, batch.offsets)

    def _get(self, pfns: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Return types and offsets of ``pfns``, both one higher than they are."""
        return self._types[pfns], self._offsets[pfns]


def _runs(pfns: npt.NDArray[np.uint64], offsets: npt.NDArray[np.int64]) -> Iterator[PageRun]:
    breaks = (np.diff(pfns) != 1) | (np.diff(offsets) != PAGE_SIZE)
    starts = np.concatenate(([0], np.flatnonzero(breaks) + 1))
    counts = np.diff(np.append(starts, len(pfns)))
    rows = zip(pfns[starts].tolist(), counts.tolist(), offsets[starts].tolist(), strict=True)
    yield from (PageRun(*row) for row in rows)
