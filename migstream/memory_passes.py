"""Passes over a guest's memory: the sending half of the save engine, without its order of things."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from migstream.bitmap import PfnBitmap
from migstream.channel import SendingChannel
from migstream.errors import GuestError
from migstream.guests.protocols import PAGE_SIZE, SaveSource
from migstream.progress import PassKind, PassReport, PassStart, Progress
from migstream.records import array_of
from migstream.records.libxc import GuestType
from migstream.records.page_types import DATA_TYPES, TYPE_SHIFT, PageType

__all__ = ["MemoryPasses"]

# Indexed by page type, whatever octet a guest may give for one.
_HAS_DATA = np.isin(np.arange(256), sorted(DATA_TYPES))
_KNOWN = np.isin(np.arange(256), list(PageType))


class MemoryPasses:
    """Sends the pages in ``dirty`` as PAGE_DATA records, ``batch_size`` PFNs each.

    ``deferred`` collects what has to be looked at again when the guest stands still, while ``guest_runs``
    says that it does not. Both are one bit a page. ``pages`` counts those sent with their content.
    Source: xg_sr_save.c, send_dirty_pages and write_batch.
    """

    def __init__(
        self, source: SaveSource, channel: SendingChannel, *, batch_size: int, progress: Progress
    ) -> None:
        self.source = source
        self.channel = channel
        self.batch_size = batch_size
        self.progress = progress
        self.dirty = PfnBitmap(source.max_pfn + 1)
        self.deferred = PfnBitmap(source.max_pfn + 1)
        self.guest_runs = False
        self.pages = 0
        self._passes = 0
        self._octets = 0
        self._seconds = 0.0

    @property
    def bandwidth(self) -> float | None:
        """Octets a second that the channel took over all passes, ``None`` before the first."""
        return self._octets / self._seconds if self._seconds > 0 else None

    def send(self, kind: PassKind, dirty_count: int, dirty_rate: float | None = None) -> None:
        """Send what is in ``dirty``: ``dirty_count`` PFNs, as far as is known before they are listed."""
        bandwidth = self.bandwidth
        downtime_s = dirty_count * PAGE_SIZE / bandwidth if bandwidth else None
        self.progress.begin(PassStart(kind, self._passes, dirty_count, dirty_rate, downtime_s))
        started, before, entries = time.monotonic(), self.channel.written, 0
        for pfns in self.dirty.batches(self.batch_size):
            octets = self._send_batch(pfns)
            entries += len(pfns)
            self.progress.advance(len(pfns), octets)
        seconds, octets = time.monotonic() - started, self.channel.written - before
        self.progress.end(PassReport(kind, self._passes, entries, octets, seconds, dirty_rate, downtime_s))
        self._passes += 1
        self._octets += octets
        self._seconds += seconds

    def _send_batch(self, pfns: npt.NDArray[np.uint64]) -> int:
        """Write one PAGE_DATA record, even if no PFN of it has a page; return its octets."""
        types = self.source.page_types(pfns)
        _check_types(pfns, types)
        if self.guest_runs and self.source.guest_type is GuestType.PV:
            # A PFN without a frame may be given one before the end, which no log tells (INVALID_MFN).
            self.deferred.add(pfns[types == PageType.XTAB])
        pages: list[memoryview] = []
        has_data = _HAS_DATA[types]
        if has_data.any():
            buffers, waiting = self.source.pages(pfns[has_data], types[has_data])
            pages = list(buffers)
            if waiting.any():
                later = np.flatnonzero(has_data)[waiting]
                self._defer(pfns[later])
                types = types.copy()
                types[later] = PageType.XTAB
                has_data[later] = False
            count = int(np.count_nonzero(has_data))
            _check_octets(pfns, count, pages)
            self.pages += count
        entries = (types.astype(np.uint64) << np.uint64(TYPE_SHIFT)) | pfns
        return self.channel.pages(array_of(8, entries), pages)

    def _defer(self, pfns: npt.NDArray[np.uint64]) -> None:
        if not self.guest_runs:
            raise GuestError(
                f"the page table at PFN {int(pfns[0]):#x} cannot be read although the guest is suspended"
            )
        self.deferred.add(pfns)


def _check_types(pfns: npt.NDArray[np.uint64], types: npt.NDArray[np.uint8]) -> None:
    known = _KNOWN[types]
    if not known.all():
        at = int(np.argmin(known))
        raise GuestError(f"PFN {int(pfns[at]):#x} has the page type {int(types[at]):#x}, which is unknown")


def _check_octets(pfns: npt.NDArray[np.uint64], count: int, pages: list[memoryview]) -> None:
    octets = sum(page.nbytes for page in pages)
    if octets != count * PAGE_SIZE:
        raise GuestError(
            f"the guest gave {octets} octets for {count} pages of PFNs {int(pfns[0]):#x} to "
            f"{int(pfns[-1]):#x}, not {count * PAGE_SIZE}"
        )
