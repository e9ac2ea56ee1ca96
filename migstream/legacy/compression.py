"""Remus's compressed pages: deltas against what was sent of the same PFN before.

From the second state on, a saver with compression sends batches without pages, and the pages as one
sequence of deltas, in the order of the batches. A delta starts with a marker octet:

* 0x00: the page is what it was,
* 0x80: the whole page follows,
* else runs, until they cover the page: 0x01-0x7f, so many 32-bit words that follow; 0x81-0xff, so many
  (less 0x80) that stay as they were.

A saver keeps the last 8192 pages that it sent so, and sends deltas only against these, so every PFN has
a whole page before its first delta. Here all pages that came compressed are kept, in a sparse file
without a name: its blocks are no more than the whole pages that the stream had.

Source: xc_compression.c of Xen 4.4.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from migstream.bitmap import PfnBitmap
from migstream.io import fd as fdio
from migstream.legacy.source import ChunkSource, Content
from migstream.legacy.waiting import room_wanted
from migstream.records.page_data import Entries

__all__ = ["CompressedBatches", "DeltaError", "apply_delta"]

PAGE_SIZE = 4096
WORD = 4  # octets of the words that runs are counted in
SAME = 0x00
WHOLE = 0x80
SKIP = 0x80  # bit of a run's marker: these words stay
LENGTH = 0x7F  # the marker's other bits: words of the run
PIECE = 256 << 10  # octets of compressed data taken at a time
#: Batches, of one page at least, that may wait for their pages: a saver collects 8192 and then sends them.
MAX_WAITING = 16384

#: Takes a complete batch: entries, uint64[n], and their pages.
Emit = Callable[[npt.NDArray[np.uint64], memoryview], None]


class DeltaError(ValueError):
    """A delta that no page can be made with; ``position`` is that of its faulty octet."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.position = position


def apply_delta(deltas: bytes, position: int, page: memoryview) -> int | None:
    """Apply the delta at ``position`` of ``deltas`` to ``page``, 4096 octets, in place.

    Returns the position behind the delta, or ``None`` where the octets end inside it; the page is then
    neither old nor new. Raises `DeltaError` for a run of no words, or past the page's end.
    """
    end = len(deltas)
    if position >= end:
        return None
    if deltas[position] == SAME:
        return position + 1
    if deltas[position] == WHOLE:
        if end - position - 1 < PAGE_SIZE:
            return None
        page[:] = deltas[position + 1 : position + 1 + PAGE_SIZE]
        return position + 1 + PAGE_SIZE
    at = 0
    while at < PAGE_SIZE:
        if position >= end:
            return None
        marker = deltas[position]
        run = (marker & LENGTH) * WORD
        if not run:
            raise DeltaError(f"marker {marker:#04x} inside a page: a run of no words", position)
        if at + run > PAGE_SIZE:
            raise DeltaError(f"a run of {run} octets at {at} of a page of {PAGE_SIZE}", position)
        position += 1
        if not marker & SKIP:
            if end - position < run:
                return None
            page[at : at + run] = deltas[position : position + run]
            position += run
        at += run
    return position


class _KnownPages:
    """The last content of each PFN that came compressed."""

    def __init__(self, p2m_size: int, directory: str | None) -> None:
        self._directory = directory
        self._present = PfnBitmap(p2m_size)
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 - closed by `close`

    def close(self) -> None:
        self._file.close()

    def __contains__(self, pfn: int) -> bool:
        return pfn in self._present

    def read_into(self, pfn: int, page: memoryview) -> None:
        fdio.pread_into(self._file.fileno(), [page], pfn * PAGE_SIZE)

    def keep(self, pfn: int, page: memoryview) -> None:
        with room_wanted(self._directory):
            self._file.seek(pfn * PAGE_SIZE)
            fdio.write_vectors(self._file.fileno(), [page])
        self._present.add_run(pfn, 1)


class _Batch:
    """A batch whose pages are being put together."""

    def __init__(self, entries: npt.NDArray[np.uint64], offset: int) -> None:
        unpacked = Entries(entries.tobytes())
        self.entries = entries
        self.offset = offset
        self.pfns = unpacked.pfns[unpacked.with_data]
        self.done = 0
        self.pages = memoryview(b"")

    @property
    def complete(self) -> bool:
        return self.done == len(self.pfns)

    def next_page(self) -> memoryview:
        """Return where the next page belongs. The memory is there only from the first page on."""
        if not self.pages:
            self.pages = memoryview(bytearray(PAGE_SIZE * len(self.pfns)))
        return self.pages[self.done * PAGE_SIZE :][:PAGE_SIZE]


class CompressedBatches:
    """Puts batches and compressed data together; ``emit`` is called with each batch when it is whole."""

    def __init__(self, source: ChunkSource, p2m_size: int, emit: Emit, directory: str | None = None) -> None:
        self._source = source
        self._emit = emit
        self._known = _KnownPages(p2m_size, directory)
        self._waiting: deque[_Batch] = deque()
        self._rest = b""  # the start of a delta that goes on in the next piece

    def close(self) -> None:
        """Drop all pages."""
        self._known.close()

    def batch(self, entries: npt.NDArray[np.uint64]) -> None:
        """Take the entries, uint64[n], of a batch without pages. Raises `FormatError` for one too many."""
        if len(self._waiting) == MAX_WAITING:
            raise self._source.fault(
                f"more than {MAX_WAITING} batches wait for their pages to come as compressed data",
                self._source.position,
            )
        self._waiting.append(_Batch(entries, self._source.position))
        self._emit_whole()

    def compressed(self, content: Content) -> None:
        """Take compressed data. Raises `FormatError` for what is no delta, or has no PFN to belong to."""
        while content.left:
            start = content.offset - len(self._rest)
            deltas = self._rest + content.read(PIECE)
            self._rest = deltas[self._apply(deltas, start) :]

    def finish(self, offset: int) -> None:
        """Check that nothing is open at a body's end, which is at ``offset``."""
        if self._rest or self._waiting:
            lacking = sum(len(batch.pfns) - batch.done for batch in self._waiting)
            raise self._source.fault(
                f"the body ends, and {lacking} pages of its batches are not there; "
                f"{len(self._rest)} octets of compressed data are left over",
                offset,
            )

    def _apply(self, deltas: bytes, start: int) -> int:
        """Apply as many deltas as are whole; return where the first that is not starts."""
        position = 0
        while position < len(deltas):
            if not self._waiting:
                raise self._source.fault(
                    "compressed data of a page, but every PFN of the batches before has its page",
                    start + position,
                )
            behind = self._one(deltas, position, start)
            if behind is None:
                break
            position = behind
        return position

    def _one(self, deltas: bytes, position: int, start: int) -> int | None:
        batch = self._waiting[0]
        pfn = int(batch.pfns[batch.done])
        page = batch.next_page()
        if deltas[position] != WHOLE:
            if pfn not in self._known:
                raise self._source.fault(
                    f"a delta for PFN {pfn:#x}, of which no whole page came compressed before",
                    start + position,
                )
            self._known.read_into(pfn, page)
        try:
            behind = apply_delta(deltas, position, page)
        except DeltaError as exc:
            raise self._source.fault(f"PFN {pfn:#x}: {exc}", start + exc.position) from None
        if behind is not None:
            self._known.keep(pfn, page)
            batch.done += 1
            self._emit_whole()
        return behind

    def _emit_whole(self) -> None:
        while self._waiting and self._waiting[0].complete:
            batch = self._waiting.popleft()
            self._emit(batch.entries, batch.pages)
