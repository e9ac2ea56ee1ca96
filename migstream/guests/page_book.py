"""What is known of each page of a guest: its type, and whether it has memory."""

from __future__ import annotations

import mmap
import threading

import numpy as np
import numpy.typing as npt

from migstream.bitmap import PfnBitmap
from migstream.errors import GuestError
from migstream.records.page_types import PageType

__all__ = ["PageBook"]

XTAB = np.uint8(PageType.XTAB)


class PageBook:
    """``n_pages`` PFNs, none of which has memory or a type yet; at most ``page_limit`` may get memory.

    These are the methods of `RestoreTarget` that are about single pages. Arrays of PFNs are uint64[n], of
    types uint8[n]. Each raises `GuestError` for a PFN past the last.
    """

    def __init__(self, n_pages: int, page_limit: int | None = None) -> None:
        self.n_pages = n_pages
        self.page_limit = n_pages if page_limit is None else page_limit
        self.n_populated = 0
        try:
            self._populated = PfnBitmap(n_pages)
            types = mmap.mmap(-1, n_pages)
        except (OSError, OverflowError) as exc:
            raise GuestError(f"a guest of {n_pages} pages is too large to keep book of: {exc}") from exc
        # A page's type ^ XTAB: so a page that nobody spoke of is XTAB, and its octet is never touched.
        self._types = np.frombuffer(types, np.uint8)
        self._accounts = threading.Lock()

    @property
    def max_pfn(self) -> int:
        """The highest PFN that there is room for."""
        return self.n_pages - 1

    def page_types(self, pfns: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
        """Return the types of ``pfns`` as they were set last; XTAB where none was."""
        types: npt.NDArray[np.uint8] = self._types[self._bounded(pfns)] ^ XTAB
        return types

    def set_page_types(self, pfns: npt.NDArray[np.uint64], types: npt.NDArray[np.uint8] | int) -> None:
        """Set the types of ``pfns``, populated or not."""
        self._types[self._bounded(pfns)] = np.asarray(types, np.uint8) ^ XTAB

    def populate(self, pfns: npt.NDArray[np.uint64]) -> None:
        """Give memory to ``pfns``. Raises `GuestError` past the limit."""
        self._bounded(pfns)
        with self._accounts:
            self._check_limit(len(pfns))
            self.n_populated += self._populated.add(pfns)

    def book_run(self, first_pfn: int, count: int, type: int) -> None:
        """Populate those of ``count`` PFNs that are not, and set the type of all."""
        if first_pfn + count > self.n_pages:
            raise GuestError(
                f"PFN {first_pfn + count - 1:#x} is past the guest's last, {self.n_pages - 1:#x}"
            )
        with self._accounts:
            wanted = count - self._populated.count_run(first_pfn, count)
            if wanted:
                self._check_limit(wanted)
                self.n_populated += self._populated.add_run(first_pfn, count)
        self._types[first_pfn : first_pfn + count] = type ^ XTAB

    def depopulate(self, pfns: npt.NDArray[np.uint64]) -> None:
        """Take memory from ``pfns``, each named once."""
        with self._accounts:
            self.n_populated -= int(self._populated.test(self._bounded(pfns)).sum())
            self._populated.discard(pfns)

    def populated(self, pfns: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Return which of ``pfns`` have memory, bool[n]."""
        return self._populated.test(self._bounded(pfns))

    def _check_limit(self, wanted: int) -> None:
        if self.n_populated + wanted > self.page_limit:
            raise GuestError(
                f"no memory is left: {self.n_populated} of {self.page_limit} pages are in use, and "
                f"{wanted} more are wanted; allow the guest more memory"
            )

    def _bounded(self, pfns: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        if len(pfns) and int(pfns.max()) >= self.n_pages:
            raise GuestError(f"PFN {int(pfns.max()):#x} is past the guest's last, {self.n_pages - 1:#x}")
        return pfns
