"""The running part of a model: memory, page types, the dirty log, and what a live guest does to them.

Everything that a guest does to itself goes through here, so that the log sees it, and so that no engine
ever sees half of it.
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from migstream.errors import GuestError
from migstream.guests.dirty_log import DirtyLog
from migstream.guests.memory import Memory, run_bounds
from migstream.guests.model_boot import MIN_PAGES, USABLE
from migstream.guests.page_book import PageBook
from migstream.guests.pv_pages import ENTRIES, PRESENT, FrameMap
from migstream.records.page_types import PageType

__all__ = ["Machine"]


class Machine(PageBook):
    """``n_pages`` pages, none of them populated yet, and a dirty log. Starts suspended.

    ``lock`` is held around every step that must look atomic from outside; who waits for it is notified
    when the machine resumes.
    """

    def __init__(self, n_pages: int, *, pv: bool, seed: int, page_limit: int | None) -> None:
        if n_pages < MIN_PAGES:
            raise GuestError(f"a model needs at least {MIN_PAGES} pages ({MIN_PAGES * 4}K), not {n_pages}")
        super().__init__(n_pages, page_limit)
        self.lock = threading.Condition(threading.RLock())
        self.memory = Memory.anonymous(n_pages)
        self.log = DirtyLog(n_pages)
        self.frames = FrameMap(n_pages, seed) if pv else None
        self.suspended = True
        self.ticks = 0  # how long the machine has run, in steps of its workload
        self.fixed: npt.NDArray[np.uint64] = np.empty(0, np.uint64)  # PFNs that a workload leaves alone
        self.l1_tables: npt.NDArray[np.uint64] | None = None  # the i-th maps PFNs from 512 i (booted PV)
        self._changes: dict[tuple[int, int], np.uint64] = {}  # (table, entry) in change -> its old value

    # What the running guest does. Each raises `GuestError` while the machine is suspended.

    def write(
        self, pfns: npt.NDArray[np.uint64], columns: npt.NDArray[np.uint64], words: npt.NDArray[np.uint64]
    ) -> None:
        """Write ``words``, one into each of ``pfns`` at word ``columns`` (0-511) of a page; all uint64[n]."""
        with self.lock:
            self._must_run()
            self.memory.words[self._bounded(pfns), columns] = words
            self.log.note(pfns)

    def balloon_out(self, pfns: npt.NDArray[np.uint64]) -> None:
        """Give ordinary pages back to the host: ``pfns``, uint64[n], become holes (XTAB)."""
        with self.lock:
            self._must_run()
            self._release(pfns, PageType.XTAB)

    def balloon_in(self, pfns: npt.NDArray[np.uint64]) -> None:
        """Fill the holes ``pfns``, uint64[n], with zero pages from the host."""
        with self.lock:
            self._must_run()
            self.populate(pfns)
            self._map(pfns)
            self.set_page_types(pfns, PageType.NOTAB)
            self.log.note(pfns)

    def mark_offline(self, pfns: npt.NDArray[np.uint64]) -> None:
        """Lose ordinary pages to bad memory: ``pfns``, uint64[n], become BROKEN."""
        with self.lock:
            self._must_run()
            self._release(pfns, PageType.BROKEN)

    def exchange(self, pfn: int) -> None:
        """Give a page a new frame with the same content (XENMEM_exchange); a BROKEN page gets a zero page."""
        one = np.array([pfn], np.uint64)
        with self.lock:
            self._must_run()
            if int(self.page_types(one)[0]) == PageType.BROKEN:
                self.balloon_in(one)
                return
            self._unmap(one)
            if self.frames is not None:
                self.frames.exchange(pfn)
            self._map(one)
            self.log.note(one)

    def begin_change(self, table: int, index: int) -> None:
        """Put entry ``index`` of a page table into change: it names a frame that is not the guest's."""
        with self.lock:
            self._must_run()
            if self.frames is None:
                raise GuestError("only a PV guest's page tables are seen from outside")
            words = self.memory.words[table]
            if (table, index) not in self._changes:
                self._changes[table, index] = words[index]
                words[index] = np.uint64(self.frames.foreign << 12) | PRESENT
                self.log.note(np.array([table], np.uint64))

    def finish_changes(self) -> None:
        """Complete every page table entry in change."""
        with self.lock:
            for (table, index), entry in self._changes.items():
                self.memory.words[table, index] = entry
                self.log.note(np.array([table], np.uint64))
            self._changes.clear()

    def _must_run(self) -> None:
        if self.suspended:
            raise GuestError("a suspended guest does nothing; resume it first")

    def _release(self, pfns: npt.NDArray[np.uint64], type: PageType) -> None:
        self._unmap(pfns)
        self.depopulate(pfns)
        self.set_page_types(pfns, type)
        for first, end in run_bounds(pfns):
            self.memory.discard(first, end - first)
        self.log.note(pfns)

    def _unmap(self, pfns: npt.NDArray[np.uint64]) -> None:
        self._set_entries(pfns, np.zeros(len(pfns), np.uint64))

    def _map(self, pfns: npt.NDArray[np.uint64]) -> None:
        if self.frames is not None:
            self._set_entries(pfns, self.frames.mfns(pfns) << np.uint64(12) | np.uint64(USABLE))

    def _set_entries(self, pfns: npt.NDArray[np.uint64], entries: npt.NDArray[np.uint64]) -> None:
        if self.frames is None:
            return
        if self.l1_tables is None:
            raise GuestError("only a PV guest that booted here knows which of its page tables map a page")
        # An entry in change is completed first: it must not come back with what it had before.
        self.finish_changes()
        tables = self.l1_tables[pfns // np.uint64(ENTRIES)]
        self.memory.words[tables, pfns % np.uint64(ENTRIES)] = entries
        self.log.note(tables)
