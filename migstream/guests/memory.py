"""Guest memory that lies in one mapping, and its pages as buffers for readv and writev."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from migstream.errors import GuestError
from migstream.guests.protocols import PAGE_SHIFT, PAGE_SIZE

__all__ = ["Memory", "run_bounds"]

# Private, for huge pages and MADV_DONTNEED do less for shared memory; without a reservation, for a guest may
# be larger than what it uses. (The constant has a name from Python 3.13 on; this is Linux's value.)
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE


def run_bounds(numbers: npt.NDArray[np.uint64], scale: int = 1) -> Iterator[tuple[int, int]]:
    """Return the runs of consecutive ``numbers``, uint64[n] in any order: (start, exclusive end) of each.

    Both come multiplied by ``scale``, which numpy does a hundred times as fast as its caller could.
    """
    count = len(numbers)
    if count == 0:
        return iter(())
    first, last = int(numbers[0]), int(numbers[-1])
    if last - first == count - 1 and (numbers[1:] > numbers[:-1]).all():
        return iter([(first * scale, (last + 1) * scale)])  # a whole batch: most of a first pass
    ends_here = numbers[1:] - numbers[:-1] != 1
    starts = numbers[np.concatenate(([True], ends_here))] * np.uint64(scale)
    ends = (numbers[np.concatenate((ends_here, [True]))] + np.uint64(1)) * np.uint64(scale)
    return zip(starts.tolist(), ends.tolist(), strict=True)


class Memory:
    """``n_pages`` pages of 4 KiB in one mapping.

    ``pages`` is the memory as uint8[n_pages, 4096], ``words`` as uint64[n_pages, 512]; both are shared.
    """

    def __init__(self, mapping: mmap.mmap, n_pages: int) -> None:
        self.mapping = mapping
        self.n_pages = n_pages
        self.octets = memoryview(mapping)
        self.pages: npt.NDArray[np.uint8] = np.frombuffer(mapping, np.uint8).reshape(n_pages, PAGE_SIZE)
        self.words: npt.NDArray[np.uint64] = self.pages.view(np.uint64)

    @classmethod
    def anonymous(cls, n_pages: int) -> Memory:
        """Make zeroed memory that costs nothing until it is touched. Raises `GuestError` if there is none."""
        try:
            mapping = mmap.mmap(-1, n_pages << PAGE_SHIFT, flags=ANONYMOUS)
        except (OSError, OverflowError, ValueError) as exc:
            raise GuestError(
                f"{n_pages} pages ({n_pages >> 8} MiB) of memory cannot be had: {exc}; make the guest smaller"
            ) from exc
        # The first touch of 4 KiB pages takes longer than to copy into them; 2 MiB ones are nearly free.
        if hasattr(mmap, "MADV_HUGEPAGE"):
            mapping.madvise(mmap.MADV_HUGEPAGE)
        return cls(mapping, n_pages)

    def views(self, pfns: npt.NDArray[np.uint64]) -> list[memoryview]:
        """Return the memory of ``pfns``, uint64[n] in any order, contiguous pages in one view.

        Raises `GuestError` for a PFN past the end.
        """
        if len(pfns) and int(pfns.max()) >= self.n_pages:
            raise GuestError(f"PFN {int(pfns.max()):#x} is past the guest's last, {self.n_pages - 1:#x}")
        octets = self.octets
        return [octets[start:end] for start, end in run_bounds(pfns, PAGE_SIZE)]

    def run(self, first_pfn: int, count: int) -> memoryview:
        """Return the memory of ``count`` pages from ``first_pfn``."""
        return self.octets[first_pfn << PAGE_SHIFT : (first_pfn + count) << PAGE_SHIFT]

    def page(self, pfn: int) -> memoryview:
        """Return the memory of one page."""
        return self.octets[pfn << PAGE_SHIFT : (pfn + 1) << PAGE_SHIFT]

    def nonzero(self, pfns: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Return which of the pages ``pfns``, uint64[n] ascending, hold anything but zeros, bool[n]."""
        found: npt.NDArray[np.bool_] = self.words[pfns, 0] != 0  # most pages with content show it here,
        found |= self.words[pfns, PAGE_SIZE // 16] != 0  # or in the middle
        unclear = np.flatnonzero(~found)
        content = [
            np.bitwise_or.reduce(self.words[start:end], axis=1) for start, end in run_bounds(pfns[unclear])
        ]
        if content:
            found[unclear] = np.concatenate(content) != 0
        return found

    def discard(self, first: int, count: int) -> None:
        """Give ``count`` pages from ``first`` of anonymous memory back; they read as zeros from here on."""
        self.mapping.madvise(mmap.MADV_DONTNEED, first << PAGE_SHIFT, count << PAGE_SHIFT)
