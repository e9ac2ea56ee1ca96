"""Raw memory images: files in which page PFN lies at offset PFN * 4096.

As a source, an image is a guest that has been suspended for good. It has memory and nothing else, so its
stream can be inspected, compared and restored to another image; no processor would start from it.

As a target, an image is written beside its name and renamed when it is complete, so that a failure leaves
neither half a file nor the loss of an old one. What a file of memory cannot hold, the page types and the
processors, is kept in the target's ``page_types`` and ``records``, and goes when it does.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import weakref
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

import numpy as np
import numpy.typing as npt

from migstream.bitmap import PfnBitmap
from migstream.errors import GuestError
from migstream.guests.memory import Memory, run_bounds
from migstream.guests.page_book import PageBook
from migstream.guests.protocols import PAGE_SHIFT, PAGE_SIZE, RestoredRings
from migstream.guests.pv_pages import referenced_pfns
from migstream.guests.state_book import StateBook
from migstream.records import Record, array_of
from migstream.records.libxc import (
    GuestType,
    TscMode,
    X86PvInfo,
    X86PvP2mFrames,
    X86TscInfo,
)
from migstream.records.page_types import PageType
from migstream.records.pv_state import PV_LAYOUTS

__all__ = ["Holes", "ImageSource", "ImageTarget", "SuspendedImage", "file_holes"]

PV = PV_LAYOUTS[8]


class Holes(Enum):
    """Which pages of an image a save leaves out, as holes of the guest (XTAB)."""

    KEEP = "keep"  # none: every page of the file is a page of the guest
    FILE = "file"  # those that the file has no data for (SEEK_HOLE)
    ZERO = "zero"  # those that are all zeros


class SuspendedImage:
    """What every file of memory is as a `SaveSource`: suspended by nature, without a dirty log.

    A PV image is taken for 64-bit, and its stream has no vCPUs: a restore that wants to start it refuses.
    """

    def __init__(self, guest_type: GuestType, max_pfn: int) -> None:
        """Make one of a guest whose highest PFN is ``max_pfn``."""
        self._guest_type = guest_type
        self._max_pfn = max_pfn

    @property
    def guest_type(self) -> GuestType:
        """As it was opened: the file does not say."""
        return self._guest_type

    @property
    def max_pfn(self) -> int:
        """The last page of the file."""
        return self._max_pfn

    @property
    def suspended(self) -> bool:
        """Always."""
        return True

    def suspend(self) -> None:
        """Do nothing: an image does not run."""

    def resume(self) -> None:
        """Do nothing: an image does not run."""

    def static_records(self) -> Sequence[Record]:
        """Return PV_INFO for PV. An image has no policies: restore will say that they are missing."""
        if self._guest_type is GuestType.HVM:
            return []
        return [X86PvInfo(guest_width=PV.guest_width, pt_levels=PV.pt_levels)]

    def layout_records(self) -> Sequence[Record]:
        """Return P2M_FRAMES for PV: where the p2m lies is not known, so the first pages are named."""
        if self._guest_type is GuestType.HVM:
            return []
        frames = np.arange(self.max_pfn // PV.p2m_entries_per_frame + 1, dtype=np.uint64)
        return [X86PvP2mFrames(p2m_start_pfn=0, p2m_end_pfn=self.max_pfn, p2m_pfns=array_of(8, frames))]

    def state_records(self) -> Sequence[Record]:
        """Return a time stamp counter at rest: all the state that an image has."""
        return [X86TscInfo(mode=TscMode.DEFAULT, khz=0, nsec=0, incarnation=0)]

    def enable_dirty_log(self) -> None:
        """Refuse: raises `GuestError`."""
        self._no_log()

    def disable_dirty_log(self) -> None:
        """Do nothing: there is no log."""

    def clean_dirty_log(self, into: PfnBitmap) -> None:
        """Refuse: raises `GuestError`."""
        self._no_log()

    def peek_dirty_log(self, into: PfnBitmap) -> None:
        """Refuse: raises `GuestError`."""
        self._no_log()

    def _no_log(self) -> NoReturn:
        raise GuestError("a memory image does not run and has no dirty log; save it without --live")

    def close(self) -> None:
        """Nothing to give back before the last reference goes."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ImageSource(SuspendedImage):
    """A raw image as a `SaveSource`."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        guest_type: GuestType = GuestType.HVM,
        *,
        holes: Holes = Holes.KEEP,
    ) -> None:
        """Open the image. Raises `GuestError` if it is not a file of whole pages, `OSError` if unreadable."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            if size == 0 or size % PAGE_SIZE:
                raise GuestError(
                    f"{os.fspath(path)!r} has {size} octets; a memory image is whole pages of {PAGE_SIZE}, "
                    "at least one"
                )
            self.n_pages = size >> PAGE_SHIFT
            self._memory = Memory(mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ), self.n_pages)
            self._without_data = file_holes(fd, self.n_pages) if holes is not Holes.KEEP else None
        finally:
            os.close(fd)
        self._zero_is_hole = holes is Holes.ZERO
        super().__init__(guest_type, max_pfn=self.n_pages - 1)

    def page_types(self, pfns: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
        """Return NOTAB, or XTAB for the pages that count as holes."""
        types = np.full(len(pfns), PageType.NOTAB, np.uint8)
        if self._without_data is not None:
            holes = self._without_data.test(pfns)
            if self._zero_is_hole:
                there = ~holes
                holes[there] = ~self._memory.nonzero(pfns[there])
            types[holes] = PageType.XTAB
        return types

    def pages(
        self, pfns: npt.NDArray[np.uint64], types: npt.NDArray[np.uint8]
    ) -> tuple[Sequence[memoryview], npt.NDArray[np.bool_]]:
        """Return the file's own pages; none of them ever has to wait."""
        return self._memory.views(pfns), np.zeros(len(pfns), np.bool_)


def file_holes(fd: int, n_pages: int) -> PfnBitmap:
    """Return the pages of ``n_pages`` that the file ``fd`` has no data for: they read as zeros."""
    holes = PfnBitmap(n_pages)
    end_of_data = 0
    size = n_pages * PAGE_SIZE
    while end_of_data < size:
        try:
            data = os.lseek(fd, end_of_data, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno != errno.ENXIO:  # no data up to the end
                raise
            data = size
        first = -(-end_of_data // PAGE_SIZE)
        holes.add_run(first, max(0, data // PAGE_SIZE - first))
        end_of_data = os.lseek(fd, data, os.SEEK_HOLE) if data < size else size
    return holes


class ImageTarget(PageBook):
    """A raw image as a `RestoreTarget`, for guests of up to ``max_pages`` pages.

    The file ends after the last page that was populated; pages that the guest does not have are holes in
    it. A PV guest's page tables stay as they are in the stream: a frame in an image *is* a PFN.

    Close it, or use it as a context manager: what was not completed is removed, and whatever stood under
    ``path`` before stays.
    """

    def __init__(
        self, path: str | os.PathLike[str], guest_type: GuestType = GuestType.HVM, *, max_pages: int
    ) -> None:
        """Start the image beside ``path``. Raises `OSError` if that cannot be written."""
        super().__init__(max_pages)
        self.path = Path(path).resolve()
        self._guest_type = guest_type
        self._book = StateBook()
        self._end = 0  # pages that the complete file has
        if self.path.exists() and not self.path.is_file():
            raise GuestError(f"{os.fspath(path)!r} is no regular file; a memory image needs one")
        self._partial = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.partial")
        self._file = self._partial.open("xb+", buffering=0)
        # Runs at the latest when the interpreter ends.
        self._discard = weakref.finalize(self, self._partial.unlink, missing_ok=True)
        try:
            self._file.truncate(max_pages << PAGE_SHIFT)
            mapping = mmap.mmap(self._file.fileno(), max_pages << PAGE_SHIFT)
        except OSError as exc:
            self._discard()
            raise GuestError(
                f"{os.fspath(path)!r} cannot be a sparse file of {max_pages >> 8} MiB: {exc.strerror}; "
                "give a smaller max="
            ) from exc
        self._memory = Memory(mapping, max_pages)

    @property
    def guest_type(self) -> GuestType:
        """As it was opened."""
        return self._guest_type

    @property
    def records(self) -> list[Record]:
        """What the image itself cannot hold: the last record of each kind, in the order of a stream."""
        return self._book.static + self._book.layout + self._book.state

    @property
    def vcpu_limit(self) -> int:
        """As many as a record can name: an image has none of its own."""
        return 1 << 32

    def populate(self, pfns: npt.NDArray[np.uint64]) -> None:
        """Reserve room for ``pfns`` in the file. Raises `GuestError` when the disk is full."""
        super().populate(pfns)
        # Without a reservation a full disk would show as SIGBUS, at some later write to the mapping.
        for start, end in run_bounds(pfns, PAGE_SIZE):
            try:
                os.posix_fallocate(self._file.fileno(), start, end - start)
            except OSError as exc:
                raise GuestError(
                    f"{self.path}: no room for a page at offset {start}: {exc.strerror}"
                ) from exc
            self._end = max(self._end, end >> PAGE_SHIFT)

    def pages(self, pfns: npt.NDArray[np.uint64]) -> Sequence[memoryview]:
        """Return the file's pages as writable memory. Raises `GuestError` for one not populated."""
        there = self.populated(pfns)
        if not there.all():
            raise GuestError(f"PFN {int(pfns[~there][0]):#x} has no memory in the image; populate it first")
        return self._memory.views(pfns)

    def localise(self, level: int, page: memoryview) -> None:
        """Leave the page table as it is; populate what it refers to. Raises `GuestError` past `max_pfn`."""
        wanted = referenced_pfns(np.frombuffer(page, np.uint64), level, self.max_pfn)
        self.populate(wanted[~self.populated(wanted)])

    def apply(self, record: Record) -> None:
        """Keep ``record`` for `records`; the file has no place for it."""
        self._book.apply(record)

    def clean_dirty_log(self, into: PfnBitmap) -> None:
        """Empty ``into``: an image never writes to itself."""
        into.clear()

    def complete(self) -> RestoredRings:
        """Cut the file to its length, and give it its name."""
        if self._end == 0:
            raise GuestError(f"{self.path} stays as it was: the stream brought no page")
        self._file.truncate(self._end << PAGE_SHIFT)
        if self._discard.alive:
            self._partial.replace(self.path)
            self._discard.detach()
        return self._book.rings(self._page)

    def _page(self, pfn: int) -> memoryview | None:
        return self._memory.page(pfn) if pfn < self.n_pages and pfn in self._populated else None

    def close(self) -> None:
        """Remove the file if it was not completed."""
        self._discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
