"""Passes over a guest's memory: the sending half of the save engine, without its order of things."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from migstream.bitmap import PfnBitmap
from migstream.engines.channel import SendingChannel
from migstream.engines.progress import PassKind, PassReport, PassStart, Progress
from migstream.errors import GuestError
from migstream.guests.protocols import PAGE_SIZE, SaveSource
from migstream.records import array_of
from migstream.records.libxc import GuestType
from migstream.records.page_types import DATA_TYPES, TYPE_SHIFT, PageType

__all__ = ["MemoryPasses"]

# What to do with a page type, indexed by it, whatever octet a guest may give for one.
_EMPTY, _DATA, _UNKNOWN = range(3)
_SORT = np.full(256, _UNKNOWN, np.uint8)
_SORT[list(PageType)] = _EMPTY
_SORT[sorted(DATA_TYPES)] = _DATA


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
        sorts = _SORT[types]
        lowest, highest = int(sorts.min()), int(sorts.max())
        if highest == _UNKNOWN:
            raise _unknown_type(pfns, types, sorts)
        if self.guest_runs and self.source.guest_type is GuestType.PV:
            # A PFN without a frame may be given one before the end, which no log tells (INVALID_MFN).
            self.deferred.add(pfns[types == PageType.XTAB])
        pages: list[memoryview] = []
        if highest == _DATA:
            # Nearly always every PFN has a page, and nothing has to be picked out.
            have_data = slice(None) if lowest == _DATA else np.flatnonzero(sorts)
            wanted, wanted_types = pfns[have_data], types[have_data]
            buffers, waiting = self.source.pages(wanted, wanted_types)
            pages, count = list(buffers), len(wanted)
            if waiting.any():
                self._defer(wanted[waiting])
                types = types.copy()
                types[have_data] = np.where(waiting, np.uint8(PageType.XTAB), wanted_types)
                count -= int(np.count_nonzero(waiting))
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


def _unknown_type(
    pfns: npt.NDArray[np.uint64], types: npt.NDArray[np.uint8], sorts: npt.NDArray[np.uint8]
) -> GuestError:
    at = int(np.argmax(sorts))
    return GuestError(f"PFN {int(pfns[at]):#x} has the page type {int(types[at]):#x}, which is unknown")


def _check_octets(pfns: npt.NDArray[np.uint64], count: int, pages: list[memoryview]) -> None:
    octets = sum(page.nbytes for page in pages)
    if octets != count * PAGE_SIZE:
        raise GuestError(
            f"the guest gave {octets} octets for {count} pages of PFNs {int(pfns[0]):#x} to "
            f"{int(pfns[-1]):#x}, not {count * PAGE_SIZE}"
        )
