"""Which pages were written, by comparing them with a copy: where the kernel cannot tell.

What is sent has to come from the copy. A page that was sent as it lay in memory, between two comparisons,
may be changed back before the second: it would compare equal while the receiver has the other content. So
the receiver's pages are those of ``copy``, page by page, at every moment, and a page is dirty where memory
differs from what the receiver has. Writes of the same content are not seen, and need not be.

It costs as much memory as is tracked, and to read all of it at each look.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from migstream.bitmap import PfnBitmap
from migstream.guests.memory import Memory
from migstream.guests.process.ranges import MemoryRange
from migstream.guests.process.reading import PageReader
from migstream.guests.protocols import PAGE_SHIFT

__all__ = ["ShadowTracker"]

CHUNK = 256  # pages compared at a time: both sides stay in a core's cache


class ShadowTracker:
    """Compares ``ranges`` of a process with a copy of them."""

    name = "shadow"

    def __init__(
        self, pid: int, ranges: Sequence[MemoryRange], views: Sequence[memoryview | None] | None, why: str
    ) -> None:
        """Take the copy: every page counts as clean from here on. Raises `GuestError`.

        ``views`` are own mappings of ``ranges``, where there are any; other memory is read.
        """
        self.why = why
        self._ranges = list(zip(ranges, views or [None] * len(ranges), strict=True))
        self._reader = PageReader(pid, ranges)
        self._copy: Memory | None = Memory.anonymous(max(each.end_pfn for each in ranges))
        for first_pfn, now in self._chunks():
            self._memory.pages[first_pfn : first_pfn + len(now)] = now.view(np.uint8)

    @property
    def copy(self) -> Memory | None:
        """The pages as they were at the last `clean`, by PFN: what has to be sent."""
        return self._copy

    @property
    def _memory(self) -> Memory:
        assert self._copy is not None  # nobody asks a closed tracker
        return self._copy

    def clean(self, into: PfnBitmap) -> None:
        """Replace ``into`` by the PFNs that differ from the copy, and take them over into it."""
        into.clear()
        for first_pfn, now in self._chunks():
            differs = self._differing(first_pfn, now)
            if len(differs):
                into.add(differs + np.uint64(first_pfn))
                # A page that is written just now goes into the copy torn: it then differs the next time.
                self._memory.words[first_pfn + differs.astype(np.intp)] = now[differs]

    def peek(self, into: PfnBitmap) -> None:
        """Replace ``into`` by the PFNs that differ from the copy, and keep the copy."""
        into.clear()
        for first_pfn, now in self._chunks():
            into.add(self._differing(first_pfn, now) + np.uint64(first_pfn))

    def _differing(self, first_pfn: int, now: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        copy = self._memory.words[first_pfn : first_pfn + len(now)]
        return np.flatnonzero((copy != now).any(axis=1)).astype(np.uint64)

    def _chunks(self) -> Iterator[tuple[int, npt.NDArray[np.uint64]]]:
        """Yield the tracked memory as it is now: a PFN, and the words uint64[n, 512] of the pages from it."""
        for each, view in self._ranges:
            for first in range(0, each.n_pages, CHUNK):
                count = min(CHUNK, each.n_pages - first)
                pfn = each.first_pfn + first
                if view is None:
                    octets = self._reader.read(np.arange(pfn, pfn + count, dtype=np.uint64))
                else:
                    octets = view[first << PAGE_SHIFT : (first + count) << PAGE_SHIFT]
                yield pfn, np.frombuffer(octets, np.uint64).reshape(count, -1)

    def close(self) -> None:
        """Give the copy back."""
        self._copy = None
