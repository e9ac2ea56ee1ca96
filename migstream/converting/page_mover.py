"""Pages from where they lie in an input file to PAGE_DATA records of an output.

A page is never held: records are built from PFNs and offsets, and runs of pages that lie behind each
other in the input are moved within the kernel. Only where runs are short, or where pages are looked at,
do they pass through one buffer of 4 MiB.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from migstream.converting.options import MAX_BATCH
from migstream.errors import FormatError, TruncatedError
from migstream.guests.protocols import PAGE_SIZE
from migstream.io.inputs import FileInput
from migstream.io.reader import Frame
from migstream.io.writer import StreamWriter
from migstream.records import PageData, array_of, libxc
from migstream.records.page_types import DATA_TYPES, PFN_MASK, TYPE_SHIFT, PageType, type_name

__all__ = ["HAS_DATA", "PageMover", "page_blocks"]

Words = npt.NDArray[np.uint64]
Offsets = npt.NDArray[np.int64]
NO_PAGE = -1  # the offset of an entry without a page

BUFFER = 4 << 20  # octets
SHORT_RUN = 64 << 10  # octets; runs that are shorter on average are gathered instead of moved one by one

#: Whether an entry of a type has a page in the record, bool[16], and whether the type means something.
HAS_DATA = np.isin(np.arange(16), list(DATA_TYPES))
_KNOWN = np.isin(np.arange(16), list(PageType))


def page_blocks(frame: Frame) -> Iterator[tuple[Words, Offsets]]:
    """Yield a PAGE_DATA record's entries, and where each one's page lies in the input; -1: it has none.

    They are uint64[n] and int64[n], n at most 65,536. Raises `FormatError` for a type without a meaning,
    for a count of 0, and for a length that does not fit the entries.
    """
    count = frame.page_head().entries
    if not count:
        raise _wrong(frame, "expected at least one PFN, found a count of 0", "count")
    pages_at = frame.body_offset + PageData.head_size + 8 * count
    data_pages = 0
    for block in frame.entries(count):
        order = "<u8" if block.order == "little" else ">u8"
        entries = np.frombuffer(block.raw, order).astype(np.uint64)
        types = block.types
        if not _KNOWN[types].all():
            i = int((~_KNOWN[types]).argmax())
            message = f"PFN {int(block.pfns[i]):#x} is of the type {type_name(int(types[i]))}"
            raise _wrong(frame, f"{message}, which has no meaning", "entries")
        has_data = HAS_DATA[types]
        before = np.cumsum(has_data, dtype=np.int64) - has_data
        offsets = np.where(has_data, pages_at + PAGE_SIZE * (data_pages + before), NO_PAGE)
        data_pages += int(np.count_nonzero(has_data))
        if frame.length < PageData.head_size + 8 * count + PAGE_SIZE * data_pages:
            break
        yield entries, offsets
    expected = PageData.head_size + 8 * count + PAGE_SIZE * data_pages
    if frame.length != expected:
        raise _wrong(
            frame,
            f"{count} entries, {data_pages} or more of them with a page, need {expected} octets; "
            f"the body has {frame.length}",
            "length",
        )


def _wrong(frame: Frame, message: str, field: str) -> FormatError:
    return FormatError(message, offset=frame.offset, layer=frame.layer.name, record=frame.ref, field=field)


class PageMover:
    """Writes PAGE_DATA records of at most ``batch`` entries, whose pages come from ``source``.

    ``drop_zero`` turns ordinary pages without content into allocate-only entries.
    """

    def __init__(
        self, writer: StreamWriter, source: FileInput, *, batch: int = MAX_BATCH, drop_zero: bool = False
    ) -> None:
        self._writer = writer
        self._source = source
        self._batch = batch
        self._drop_zero = drop_zero
        self._buffer = memoryview(bytearray(BUFFER))
        self._entries = np.empty(0, np.uint64)
        self._offsets = np.empty(0, np.int64)
        self.pages = 0
        self.dropped = 0

    def add(self, entries: Words, offsets: Offsets, keep: npt.NDArray[np.bool_] | None = None) -> None:
        """Take entries and the offsets of their pages; full records are written.

        Pages where ``keep``, bool[n], is true are not dropped, whatever is in them.
        """
        if self._drop_zero:
            entries, offsets = self._without_zero_pages(entries, offsets, keep)
        if len(self._entries):
            entries = np.concatenate([self._entries, entries])
            offsets = np.concatenate([self._offsets, offsets])
        whole = len(entries) - len(entries) % self._batch
        for start in range(0, whole, self._batch):
            stop = start + self._batch
            self._write(entries[start:stop], offsets[start:stop])
        self._entries, self._offsets = entries[whole:], offsets[whole:]

    def flush(self) -> None:
        """Write what waits for a record to become full."""
        if len(self._entries):
            self._write(self._entries, self._offsets)
            self._entries, self._offsets = self._entries[:0], self._offsets[:0]

    @property
    def last_pfn(self) -> int:
        """The PFN of the last entry that waits, or -1."""
        return int(self._entries[-1]) & PFN_MASK if len(self._entries) else -1

    def _write(self, entries: Words, offsets: Offsets) -> None:
        offsets = offsets[offsets != NO_PAGE]
        order = self._writer.order
        head = PageData.struct(order).pack(len(entries), 0)
        length = len(head) + 8 * len(entries) + PAGE_SIZE * len(offsets)
        header = libxc.RecordHeader.struct(order).pack(PageData.code, length)
        self._writer.write(header + head, array_of(8, entries).in_order(order))
        self.pages += len(offsets)
        runs = list(_runs(offsets))
        if PAGE_SIZE * len(offsets) < SHORT_RUN * len(runs):
            self._gather(offsets)
            return
        for start, octets in runs:
            self._writer.copy_range(self._source, start, octets)

    def _gather(self, offsets: Offsets) -> None:
        at_once = BUFFER // PAGE_SIZE
        for first in range(0, len(offsets), at_once):
            piece = offsets[first : first + at_once]
            self._writer.write(self._read(piece))

    def _read(self, offsets: Offsets) -> memoryview:
        """Read the pages at ``offsets``, as many as the buffer holds at most."""
        done = 0
        for start, octets in _runs(offsets):
            got = self._source.pread_into([self._buffer[done : done + octets]], start)
            if got < octets:
                raise TruncatedError("the input ends inside a page", offset=start + got)
            done += octets
        return self._buffer[:done]

    def _without_zero_pages(
        self, entries: Words, offsets: Offsets, keep: npt.NDArray[np.bool_] | None
    ) -> tuple[Words, Offsets]:
        candidates = (offsets != NO_PAGE) & (entries >> np.uint64(TYPE_SHIFT) == PageType.NOTAB)
        if keep is not None:
            candidates &= ~keep
        places = np.flatnonzero(candidates)
        at_once = BUFFER // PAGE_SIZE
        entries, offsets = entries.copy(), offsets.copy()
        for first in range(0, len(places), at_once):
            piece = places[first : first + at_once]
            words = np.frombuffer(self._read(offsets[piece]), np.uint64).reshape(-1, PAGE_SIZE // 8)
            empty = piece[np.bitwise_or.reduce(words, axis=1) == 0]
            entries[empty] |= np.uint64(PageType.XALLOC << TYPE_SHIFT)
            offsets[empty] = NO_PAGE
            self.dropped += len(empty)
        return entries, offsets


def _runs(offsets: Offsets) -> Iterator[tuple[int, int]]:
    """Yield (offset, octets) of pages that lie behind each other, in the order of ``offsets``."""
    if not len(offsets):
        return
    breaks = np.flatnonzero(np.diff(offsets) != PAGE_SIZE) + 1
    starts = np.concatenate([[0], breaks])
    lengths = np.diff(np.concatenate([starts, [len(offsets)]]))
    yield from zip(offsets[starts].tolist(), (lengths * PAGE_SIZE).tolist(), strict=True)
