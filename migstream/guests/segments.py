"""Memory in pieces of a file: what ELF cores, Xen core dumps and LiME images are as guests to save from."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from migstream.errors import FormatError, GuestError
from migstream.guests.image import SuspendedImage
from migstream.guests.memory import run_bounds
from migstream.guests.protocols import PAGE_SHIFT, PAGE_SIZE
from migstream.io import fd as fdio
from migstream.records.libxc import GuestType
from migstream.records.page_types import PageType

__all__ = ["SegmentSource"]

PFN_LIMIT = 1 << 32  # 16 TiB: past every guest there is, and within what a bitmap of PFNs can be made for


class SegmentSource(SuspendedImage):
    """The whole pages of ``segments`` as a `SaveSource`; all other PFNs are holes of the guest (XTAB)."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        guest_type: GuestType,
        segments: Callable[[int], npt.NDArray[np.uint64]],
    ) -> None:
        """Open ``path``. ``segments`` reads from its descriptor the pieces of memory in it.

        Those are uint64[n, 3]: physical address, offset in the file and octets of each, in any order. Pages
        of which a piece has a part only do not count.

        Raises `GuestError` for a file without a page, for pieces that overlap and for what ``segments`` says
        is damaged; `OSError` for a file that cannot be read.
        """
        name = os.fspath(path)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not fdio.file_size(fd):
                raise GuestError(f"{name!r} is empty, or no file: a memory image is needed")
            try:
                table = segments(fd)
            except FormatError as exc:
                raise GuestError(f"{name!r}: {exc}") from exc
            self._octets = memoryview(mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ))
        finally:
            os.close(fd)
        page = np.uint64(PAGE_SIZE)
        lead = (page - table[:, 0] % page) % page  # octets before the first page boundary
        whole = np.where(
            table[:, 2] > lead, (table[:, 2] - np.minimum(lead, table[:, 2])) // page, np.uint64(0)
        )
        order = np.argsort(table[:, 0], kind="stable")
        order = order[whole[order] > 0]
        self._first = ((table[:, 0] + lead) // page)[order]
        self._offset = (table[:, 1] + lead)[order]
        self._count = whole[order]
        if not len(order):
            self._refuse(name, "has no whole page of memory")
        ends = self._first + self._count
        if int(ends.max()) > PFN_LIMIT:
            self._refuse(name, f"has memory past PFN {PFN_LIMIT:#x}")
        if (self._first[1:] < ends[:-1]).any():
            self._refuse(name, "has two copies of a page; its pieces overlap")
        super().__init__(guest_type, max_pfn=int(ends[-1]) - 1)

    @staticmethod
    def _refuse(name: str, what: str) -> NoReturn:
        raise GuestError(f"{name!r} {what}")

    def _segment_of(
        self, pfns: npt.NDArray[np.uint64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Return the segment that each PFN would be in, and whether it is."""
        at = np.searchsorted(self._first, pfns, side="right").astype(np.int64) - 1
        at = np.maximum(at, 0)
        inside = (pfns >= self._first[at]) & (pfns - self._first[at] < self._count[at])
        return at, inside

    def page_types(self, pfns: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
        """Return NOTAB for the pages of the file, XTAB for all others."""
        _, inside = self._segment_of(pfns)
        return np.where(inside, np.uint8(PageType.NOTAB), np.uint8(PageType.XTAB))

    def pages(
        self, pfns: npt.NDArray[np.uint64], types: npt.NDArray[np.uint8]
    ) -> tuple[Sequence[memoryview], npt.NDArray[np.bool_]]:
        """Return the file's own pages, those that lie together in one buffer; none of them has to wait."""
        at, inside = self._segment_of(pfns)
        if not inside.all():
            raise GuestError(f"PFN {int(pfns[~inside][0]):#x} has no page in the file")
        where = self._offset[at] + ((pfns - self._first[at]) << np.uint64(PAGE_SHIFT))
        # Pieces of a file need not start at multiples of a page; their offsets, over one remainder, do.
        views: list[memoryview] = []
        remainders = where % np.uint64(PAGE_SIZE)
        edges = np.flatnonzero(np.diff(remainders)) + 1
        for part in np.split(where, edges):
            rest = int(part[0]) % PAGE_SIZE if len(part) else 0
            views += [
                self._octets[start + rest : end + rest]
                for start, end in run_bounds(part >> np.uint64(PAGE_SHIFT), PAGE_SIZE)
            ]
        return views, np.zeros(len(pfns), np.bool_)
