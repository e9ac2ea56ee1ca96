"""Sets of PFNs as packed bits: dirty logs, populated pages, PFNs seen.

Bit ``pfn & 7`` of octet ``pfn >> 3`` is the PFN's, as in Xen's dirty bitmaps. The bits lie in memory that
costs nothing until it is touched, so a bitmap may span far more PFNs than it will ever hold.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["PfnBitmap"]

RUN_LIMIT = 1 << 16  # PFNs of a run whose bits are handled as one integer
BLOCK = 64 << 10  # octets scanned at a time (512 Ki PFNs): stays in a core's cache


class PfnBitmap:
    """A set of PFNs in [0, ``size``), one bit each."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"a bitmap needs room for at least one PFN, not {size}")
        self.size = size
        # Rounded up to whole words, so that the bits can be seen as uint64 too.
        self._bits = mmap.mmap(-1, (size + 63) // 64 * 8)

    def __contains__(self, pfn: int) -> bool:
        return 0 <= pfn < self.size and bool(self._bits[pfn >> 3] >> (pfn & 7) & 1)

    def __len__(self) -> int:
        """Return how many PFNs are in the set."""
        import numpy as np

        words = self.words
        step = BLOCK // 8
        return sum(int(np.bitwise_count(words[i : i + step]).sum()) for i in range(0, len(words), step))

    def __ior__(self, other: PfnBitmap) -> Self:
        import numpy as np

        if other.size != self.size:
            raise ValueError(f"bitmaps of {self.size} and {other.size} PFNs cannot be merged")
        np.bitwise_or(self.words, other.words, out=self.words)
        return self

    @property
    def words(self) -> npt.NDArray[np.uint64]:
        """The bits as uint64[ceil(size / 64)], shared: writing there writes here."""
        import numpy as np

        return np.frombuffer(self._bits, np.uint64)

    @property
    def octets(self) -> npt.NDArray[np.uint8]:
        """The bits as uint8[8 * ceil(size / 64)], shared: writing there writes here."""
        import numpy as np

        return np.frombuffer(self._bits, np.uint8)

    def clear(self) -> None:
        """Empty the set and give its memory back."""
        self._bits = mmap.mmap(-1, len(self._bits))

    def fill(self) -> None:
        """Put every PFN in [0, size) into the set, in place: a terabyte's bits are 32 MiB."""
        whole, rest = divmod(self.size, 8)
        self.octets[:whole] = 0xFF
        if rest:
            self.octets[whole] = (1 << rest) - 1

    # Runs: no numpy, so that a consumer of plain runs never imports it

    def _window(self, first: int, count: int) -> tuple[slice, int, int]:
        if first < 0 or count < 0 or first + count > self.size:
            raise IndexError(f"PFNs {first:#x} to {first + count - 1:#x} are not all below {self.size:#x}")
        where = slice(first >> 3, (first + count + 7) >> 3)
        return where, int.from_bytes(self._bits[where], "little"), ((1 << count) - 1) << (first & 7)

    def add_run(self, first: int, count: int) -> int:
        """Add ``count`` PFNs from ``first``; return how many were new. Raises `IndexError` past the size."""
        where, bits, mask = self._window(first, count)
        self._bits[where] = (bits | mask).to_bytes(where.stop - where.start, "little")
        return count - (bits & mask).bit_count()

    def count_run(self, first: int, count: int) -> int:
        """Return how many of ``count`` PFNs from ``first`` are in the set."""
        _, bits, mask = self._window(first, count)
        return (bits & mask).bit_count()

    # Arrays

    def _checked(self, pfns: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        import numpy as np

        if len(pfns) and int(pfns.max()) >= self.size:
            raise IndexError(f"PFN {int(pfns.max()):#x} is not below {self.size:#x}")
        return pfns.astype(np.int64)

    def _as_run(self, pfns: npt.NDArray[np.uint64]) -> tuple[int, int] | None:
        """Return (first, count) where ``pfns`` are consecutive, as in most batches of a first pass."""
        count = len(pfns)
        if not 1 < count <= RUN_LIMIT:
            return None
        first, last = int(pfns[0]), int(pfns[-1])
        if last - first != count - 1 or last >= self.size or not (pfns[1:] > pfns[:-1]).all():
            return None
        return first, count

    def test(self, pfns: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Return which of ``pfns``, uint64[n], are in the set, bool[n]. Raises `IndexError` past the size."""
        import numpy as np

        if run := self._as_run(pfns):
            first, count = run
            bits = np.unpackbits(self.octets[first >> 3 : (first + count + 7) >> 3], bitorder="little")
            return bits[first & 7 : (first & 7) + count].view(np.bool_)
        at = self._checked(pfns)
        found: npt.NDArray[np.bool_] = (self.octets[at >> 3] >> (at & 7).astype(np.uint8)) & np.uint8(1) != 0
        return found

    def add(self, pfns: npt.NDArray[np.uint64]) -> int:
        """Add ``pfns``, uint64[n] in any order; return how many were new. Raises `IndexError`."""
        import numpy as np

        if run := self._as_run(pfns):
            return self.add_run(*run)
        fresh = pfns[~self.test(pfns)].astype(np.int64)
        if not (fresh[1:] > fresh[:-1]).all():  # what is ascending, as most batches are, holds none twice
            fresh = np.unique(fresh)
        np.bitwise_or.at(self.octets, fresh >> 3, np.left_shift(1, fresh & 7).astype(np.uint8))
        return len(fresh)

    def discard(self, pfns: npt.NDArray[np.uint64]) -> None:
        """Take ``pfns``, uint64[n], out of the set. Raises `IndexError` past the size."""
        import numpy as np

        at = self._checked(pfns)
        np.bitwise_and.at(self.octets, at >> 3, ~np.left_shift(1, at & 7).astype(np.uint8))

    def batches(self, at_most: int = 1024) -> Iterator[npt.NDArray[np.uint64]]:
        """Yield the set's PFNs in ascending order, uint64[n], ``at_most`` at a time, all but the last full.

        Memory is bounded by one block of 512 Ki PFNs, however large the bitmap; octets without a bit are
        passed over eight at a time.
        """
        import numpy as np

        held: npt.NDArray[np.uint64] = np.empty(0, np.uint64)
        for block in self._blocks():
            pfns = np.concatenate((held, block)) if len(held) else block
            whole = len(pfns) - len(pfns) % at_most
            for start in range(0, whole, at_most):
                yield pfns[start : start + at_most]
            held = pfns[whole:]
        if len(held):
            yield held

    def _blocks(self) -> Iterator[npt.NDArray[np.uint64]]:
        """Yield the PFNs of each block that has any."""
        import numpy as np

        octets = self.octets
        for start in range(0, len(octets), BLOCK):
            block = octets[start : start + BLOCK]
            if not block.view(np.uint64).any():
                continue
            used = np.flatnonzero(block)
            bits = np.flatnonzero(np.unpackbits(block[used], bitorder="little"))
            yield (((used[bits >> 3] + start) << 3) | (bits & 7)).astype(np.uint64)
