"""What keeps a model busy while it is saved: a seeded program that writes, balloons and edits page tables.

`Workload.step` does a fixed amount of it and is deterministic, for tests; `start` lets a thread do so many
pages a second until `stop`. While the guest is suspended the thread waits; it goes on at resume.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from migstream.guests.model import ModelGuest
from migstream.guests.pv_pages import ENTRIES
from migstream.records.page_types import PageType

__all__ = ["Workload"]

PERIOD_S = 0.01  # how often the thread wakes up
MAX_BATCH = 4096  # pages written while the lock is held: bounds how long an engine waits


class Workload:
    """A program on ``guest``: writes spread evenly over ``working_set`` pages.

    ``turmoil`` is the chance, at each step, that the guest does something rarer: balloon, lose or mend a
    page, and for PV leave a page table in change until the next step. A PV guest that was restored only
    writes, since only a booted one knows which of its tables map a page.
    """

    def __init__(
        self,
        guest: ModelGuest,
        *,
        seed: int = 0,
        working_set: int = 4096,
        pages_per_second: float = 20_000,
        turmoil: float = 0.0,
    ) -> None:
        self.guest = guest
        self.pages_per_second = pages_per_second
        self.turmoil = 0.0 if guest.frames is not None and guest.l1_tables is None else turmoil
        self.pages_written = 0
        self._rng = np.random.default_rng(seed)
        self._working_set = self._choose(working_set)
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()

    def _choose(self, wanted: int) -> npt.NDArray[np.uint64]:
        """Return about ``wanted`` ordinary pages: one stretch of memory, as a program's heap is."""
        guest = self.guest
        length = min(guest.n_pages, max(1, wanted))
        first = int(self._rng.integers(0, guest.n_pages - length + 1))
        pfns = np.arange(first, first + length, dtype=np.uint64)
        return pfns[~np.isin(pfns, guest.fixed)]

    def step(self, n_pages: int) -> None:
        """Write to ``n_pages`` pages, chosen with repetition. Raises `GuestError` if it is suspended."""
        guest, rng = self.guest, self._rng
        with guest.lock:
            guest.finish_changes()
            if rng.random() < self.turmoil:
                self._stir()
            pfns = rng.choice(self._working_set, n_pages)
            pfns = pfns[guest.page_types(pfns) == PageType.NOTAB]
            columns = rng.integers(0, 512, len(pfns), np.uint64)
            guest.write(pfns, columns, rng.integers(0, 1 << 63, len(pfns), np.uint64))
            guest.ticks += 1
        self.pages_written += len(pfns)

    def _stir(self) -> None:
        """Do one rare thing."""
        guest, rng = self.guest, self._rng
        pfns = np.unique(rng.choice(self._working_set, 4))
        types = guest.page_types(pfns)
        ordinary = pfns[types == PageType.NOTAB]
        deed = int(rng.integers(0, 5))
        if deed == 0:
            guest.balloon_out(ordinary)
        elif deed == 1:
            guest.balloon_in(pfns[types == PageType.XTAB])
        elif deed == 2:
            guest.mark_offline(ordinary[:1])
        elif deed == 3:
            for pfn in pfns[types == PageType.BROKEN].tolist():
                guest.exchange(pfn)
        elif guest.l1_tables is not None:  # PV
            guest.begin_change(int(rng.choice(guest.l1_tables)), int(rng.integers(0, ENTRIES)))

    # In a thread

    def start(self) -> None:
        """Run in a thread until `stop`."""
        if self._thread is not None:
            raise RuntimeError("the workload runs already")
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run, name="workload", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; page table changes that it left are completed."""
        if self._thread is None:
            return
        self._stopping.set()
        with self.guest.lock:
            self.guest.lock.notify_all()
        self._thread.join()
        self._thread = None
        self.guest.finish_changes()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self) -> None:
        owed = 0.0
        before = time.monotonic()
        while not self._stopping.wait(PERIOD_S):
            with self.guest.lock:
                if self.guest.suspended:
                    self.guest.lock.wait_for(lambda: self._stopping.is_set() or not self.guest.suspended)
                    before = time.monotonic()
                    continue
                now = time.monotonic()
                # What it could not do in time is not made up for: a busy host slows a guest down.
                owed = min(owed + (now - before) * self.pages_per_second, MAX_BATCH)
                before = now
                self.step(int(owed))
                owed -= int(owed)
