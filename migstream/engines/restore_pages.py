"""The memory half of restore: a PAGE_DATA record into a target's pages.

A record is judged whole before anything is given memory, in Xen's order of checks (xg_sr_restore.c,
handle_page_data): its head, each entry, its length. Pages are then read from the stream straight into the
target's memory. In verify mode they are read beside it and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from migstream.bitmap import PfnBitmap
from migstream.engines.restore_checks import refusal
from migstream.guests.protocols import PAGE_SIZE, RestoreTarget
from migstream.io.reader import Frame
from migstream.records.page_data import Entries, PageData
from migstream.records.page_types import PageType, type_name

__all__ = ["Batch", "PageReceiver"]

Pfns = npt.NDArray[np.uint64]
Types = npt.NDArray[np.uint8]

ENTRIES_AT_ONCE = 8192  # entries judged and applied at a time: bounds the arrays, however long the record
PAGES_A_MIB = (1 << 20) // PAGE_SIZE
PAGES_COMPARED = 256  # pages read beside the guest at a time in verify mode: 1 MiB
FRAME_MASK = np.uint64(0x000F_FFFF_FFFF_F000)  # bits 12-51 of a page-table entry: its frame
PRESENT = np.uint64(1)


def _by_type(values: dict[PageType, int]) -> npt.NDArray[np.uint8]:
    table = np.zeros(16, np.uint8)
    table[list(values)] = list(values.values())
    return table


_KNOWN = _by_type(dict.fromkeys(PageType, 1)).astype(np.bool_)
_HAS_DATA = _by_type({t: t.has_data for t in PageType}).astype(np.bool_)
_POPULATED = _by_type({t: t.populated for t in PageType}).astype(np.bool_)
_LEVEL = _by_type({t: t.page_table_level for t in PageType})


class Batch(NamedTuple):
    """What one PAGE_DATA record held: entries, of them with a page; its first and last PFN as they stand."""

    entries: int
    pages: int
    first_pfn: int
    last_pfn: int


class PageReceiver:
    """Takes PAGE_DATA records into ``target``.

    ``highest_pfn`` is the highest PFN that the stream itself allows: of a PV guest its P2M_FRAMES'
    p2m_end_pfn, ``None`` for HVM. ``localises``: page tables hold PFNs, which the target has to turn into
    its frames. ``pages`` counts pages received, ``batch`` tells of the last record; ``differing`` is the set
    of PFNs that verify mode found to differ.
    """

    def __init__(self, target: RestoreTarget, *, localises: bool) -> None:
        self.target = target
        self._take_run: Callable[[int, int, int], memoryview] | None = getattr(target, "take_run", None)
        self.localises = localises
        self.highest_pfn: int | None = None
        self.verifying = False
        self.pages = 0
        self.batch = Batch(0, 0, 0, 0)
        self.differing = PfnBitmap(target.max_pfn + 1)

    def receive(self, frame: Frame) -> None:
        """Take one record. Raises `FormatError` for a bad one, `GuestError` if the target cannot take it."""
        count = frame.page_head().entries
        if not count:
            raise refusal(frame, "expected at least one PFN, found a count of 0", field="count")
        pieces = list(frame.entries(count, ENTRIES_AT_ONCE))
        self._check(frame, count, pieces)
        before = self.pages
        for piece in pieces:
            self._apply(frame, piece)
        self.batch = Batch(count, self.pages - before, pieces[0].first_pfn, pieces[-1].last_pfn)

    # Judging

    def _check(self, frame: Frame, count: int, pieces: Sequence[Entries]) -> None:
        data_pages = 0
        for number, piece in enumerate(pieces):
            if not self._plain(piece):
                self._check_entries(frame, number * ENTRIES_AT_ONCE, piece.pfns, piece.types)
            if piece.run is None:
                data_pages += int(np.count_nonzero(_HAS_DATA[piece.types]))
            elif _HAS_DATA[piece.run.type]:
                data_pages += piece.run.length
        expected = PageData.head_size + 8 * count + PAGE_SIZE * int(data_pages)
        if frame.length != expected:
            raise refusal(
                frame,
                f"{count} entries, {data_pages} of them with a page, need {expected} octets; "
                f"the body has {frame.length}",
                field="length",
                at=-4,
            )
        for number, piece in enumerate(pieces):
            if not self._plain(piece):
                self._check_target(frame, number * ENTRIES_AT_ONCE, piece.pfns, piece.types)

    def _plain(self, piece: Entries) -> bool:
        """Whether the entries are one run within all bounds, as nearly every batch of a first pass is.

        What is not may still be right: then the arrays are looked at.
        """
        run = piece.run
        if run is None or not _KNOWN[run.type]:
            return False
        highest = self.target.max_pfn if self.highest_pfn is None else self.highest_pfn
        return run.first + run.length - 1 <= min(highest, self.target.max_pfn)

    def _check_entries(self, frame: Frame, first: int, pfns: Pfns, types: Types) -> None:
        bad = ~_KNOWN[types]
        if self.highest_pfn is not None:
            bad |= pfns > self.highest_pfn
        if not bad.any():
            return
        i = int(bad.argmax())
        pfn, type = int(pfns[i]), int(types[i])
        if self.highest_pfn is not None and pfn > self.highest_pfn:
            message = f"PFN {pfn:#x} is above the guest's highest, {self.highest_pfn:#x}"
        else:
            message = f"PFN {pfn:#x} is of the type {type_name(type)}, which has no meaning"
        raise _entry_refusal(frame, first + i, message)

    def _check_target(self, frame: Frame, first: int, pfns: Pfns, types: Types) -> None:
        """Refuse what the target has no room for before it is asked; holes may lie anywhere."""
        beyond = pfns > self.target.max_pfn
        if not beyond.any():
            return
        beyond &= _POPULATED[types]
        if beyond.any():
            i = int(beyond.argmax())
            message = f"PFN {int(pfns[i]):#x} is above the target's highest, {self.target.max_pfn:#x}"
            hint = f"restore into a guest of at least {-(-(int(pfns[i]) + 1) // PAGES_A_MIB)} MiB"
            raise _entry_refusal(frame, first + i, message, hint=hint)

    # Applying

    def _apply(self, frame: Frame, piece: Entries) -> None:
        run = piece.run
        ordinary = run is not None and run.type == PageType.NOTAB and not self.verifying
        if run is not None and ordinary and self._take_run is not None and self._plain(piece):
            frame.readv_into([self._take_run(run.first, run.length, run.type)])
            self.pages += run.length
        else:
            self._apply_arrays(frame, piece.pfns, piece.types)

    def _apply_arrays(self, frame: Frame, pfns: Pfns, types: Types) -> None:
        target = self.target
        self._populate(pfns[_POPULATED[types]])
        within = pfns <= target.max_pfn
        if within.all():
            target.set_page_types(pfns, types)
        else:
            target.set_page_types(pfns[within], types[within])
        with_data = _HAS_DATA[types]
        if not with_data.all():
            pfns, types = pfns[with_data], types[with_data]
        if self.verifying:
            for start in range(0, len(pfns), PAGES_COMPARED):
                part = slice(start, start + PAGES_COMPARED)
                self._compare(frame, pfns[part], types[part])
        elif len(pfns):
            frame.readv_into(target.pages(pfns))
            self._localise_in_place(frame, pfns, types)
        self.pages += len(pfns)

    def _populate(self, pfns: Pfns) -> None:
        populated = self.target.populated(pfns)
        fresh = pfns[~populated] if populated.any() else pfns
        if len(fresh):
            self.target.populate(_distinct(fresh))

    def _localise_in_place(self, frame: Frame, pfns: Pfns, types: Types) -> None:
        """Localise the page tables among ``pfns``; of a PFN that stands there twice, the last counts."""
        if not self.localises:
            return
        levels = _LEVEL[types]
        tables = np.flatnonzero(levels)
        if not len(tables):
            return
        _, from_the_end = np.unique(pfns[::-1], return_index=True)
        last = np.zeros(len(pfns), np.bool_)
        last[len(pfns) - 1 - from_the_end] = True
        for i in tables[last[tables]].tolist():
            self._localise(frame, int(pfns[i]), int(levels[i]), self.target.pages(pfns[i : i + 1])[0])

    def _localise(self, frame: Frame, pfn: int, level: int, page: memoryview) -> None:
        """Localise one page table; the PFNs it refers to that have no memory get some, as NOTAB pages."""
        entries = np.frombuffer(page, "<u8")
        frames = (entries[(entries & PRESENT) != 0] & FRAME_MASK) >> np.uint64(12)
        if not len(frames):
            return
        assert self.highest_pfn is not None  # only PV has tables to localise; P2M_FRAMES came first
        highest = min(self.highest_pfn, self.target.max_pfn)
        if int(frames.max()) > highest:
            raise refusal(
                frame,
                f"the level {level} page table at PFN {pfn:#x} refers to PFN {int(frames.max()):#x}, "
                f"above the highest, {highest:#x}",
                field="pages",
            )
        fresh = _distinct(frames[~self.target.populated(frames)])
        self.target.localise(level, page)
        if len(fresh):
            unnoted = fresh[self.target.page_types(fresh) == PageType.XTAB]
            self.target.set_page_types(unnoted, np.full(len(unnoted), PageType.NOTAB, np.uint8))

    def _compare(self, frame: Frame, pfns: Pfns, types: Types) -> None:
        incoming = np.empty((len(pfns), PAGE_SIZE // 8), np.uint64)
        frame.readv_into([incoming.data.cast("B")])
        if self.localises:
            for i in np.flatnonzero(_LEVEL[types]).tolist():
                page = incoming[i].data.cast("B")
                self._localise(frame, int(pfns[i]), int(_LEVEL[types[i]]), page)
        row = 0
        for view in self.target.pages(pfns):
            present = np.frombuffer(view, np.uint64).reshape(-1, PAGE_SIZE // 8)
            rows = slice(row, row + len(present))
            self.differing.add(pfns[rows][(present != incoming[rows]).any(axis=1)])
            row = rows.stop


def _entry_refusal(frame: Frame, index: int, message: str, *, hint: str | None = None) -> Exception:
    error = refusal(frame, message, field=f"entries[{index}]", at=PageData.head_size + 8 * index)
    error.hint = hint
    return error


def _distinct(pfns: Pfns) -> Pfns:
    """Return ``pfns`` in ascending order, each once; what is in order already is not sorted."""
    if (pfns[1:] > pfns[:-1]).all():
        return pfns
    return np.unique(pfns)
