"""What a stream's PAGE_DATA records add up to: types, range, distinct PFNs, passes."""

from __future__ import annotations

from dataclasses import dataclass, field

from migstream.bitmap import PfnBitmap
from migstream.io.reader import Frame
from migstream.records.page_data import Entries, PfnRun
from migstream.records.page_types import DATA_TYPES, type_name

__all__ = ["Batch", "PageStats", "Pass"]

TRACKED_PFNS = 1 << 27  # a guest of 512 GiB: two bitmaps of 16 MiB; PFNs above are counted, not told apart
PASSES_KEPT = 4096  # passes that are listed; a Remus stream of days has more
ZERO_SCAN = 64  # pages read at a time when zero pages are counted: 256 KiB stays in cache


@dataclass
class Batch:
    """One PAGE_DATA record: its PFNs by type, and their range."""

    by_type: dict[int, int] = field(default_factory=dict)
    lowest: int | None = None
    highest: int | None = None
    zero_pages: int | None = None

    @property
    def pfns(self) -> int:
        """Entries of the record."""
        return sum(self.by_type.values())

    @property
    def pages(self) -> int:
        """Entries with a page of data."""
        return sum(count for type, count in self.by_type.items() if type in DATA_TYPES)

    def widen(self, lowest: int, highest: int) -> None:
        """Take a range of PFNs into the batch's."""
        self.lowest = lowest if self.lowest is None else min(lowest, self.lowest)
        self.highest = highest if self.highest is None else max(highest, self.highest)

    def count(self, by_type: dict[int, int]) -> None:
        """Add counts by type."""
        if not self.by_type:
            self.by_type.update(by_type)
            return
        for type, count in by_type.items():
            self.by_type[type] = self.by_type.get(type, 0) + count

    @property
    def range_text(self) -> str:
        """The PFNs' range, ``0x0..0x3ff``, or ``-`` for none."""
        return "-" if self.lowest is None or self.highest is None else f"{self.lowest:#x}..{self.highest:#x}"

    @property
    def text(self) -> str:
        """The batch in one line: ``1024 PFNs 0x0..0x3ff: NOTAB 900, XTAB 124``."""
        types = ", ".join(f"{name} {count}" for name, count in self.types_json().items())
        zero = "" if self.zero_pages is None else f"; {self.zero_pages} zero pages"
        return f"{self.pfns} PFNs {self.range_text}: {types}{zero}"

    def types_json(self) -> dict[str, int]:
        """Return the counts by the names of the types."""
        return {type_name(type): count for type, count in sorted(self.by_type.items())}


@dataclass
class Pass:
    """Consecutive PAGE_DATA records in which no PFN occurs twice: one iteration of a live migration."""

    number: int
    offset: int
    checkpoint: int
    verify: bool
    records: int = 0
    pfns: int = 0
    pages: int = 0

    def to_json(self) -> dict[str, int | bool]:
        """Return the pass as `inspect --json` has it."""
        return dict(vars(self))


class PageStats:
    """Adds up PAGE_DATA records. Memory: at most two bits a PFN, for the first 2^27 PFNs."""

    def __init__(self) -> None:
        self.total = Batch()
        self.distinct = 0
        self.untracked = 0
        self.passes: list[Pass] = []
        self.pass_count = 0
        self._seen = PfnBitmap(TRACKED_PFNS)
        self._in_pass: PfnBitmap | None = None  # only from the second pass on: until then it is _seen
        self._current: Pass | None = None

    @property
    def exact(self) -> bool:
        """Whether ``distinct`` is exact: no PFN lay above those that are tracked."""
        return not self.untracked

    def add(
        self, frame: Frame, *, checkpoint: int = 0, verify: bool = False, count_zero: bool = False
    ) -> Batch:
        """Read head and entries of ``frame`` and take them in; read its pages only to count zero ones.

        Raises what `Frame.page_head` raises.
        """
        batch = Batch()
        repeated = False
        for entries in frame.entries(frame.page_head().entries):
            run = entries.run
            if run is not None:
                batch.count({run.type: run.length})
                batch.widen(run.first, run.first + run.length - 1)
                repeated |= self._track_run(run)
            else:
                batch.count(entries.count_by_type())
                batch.widen(int(entries.pfns.min()), int(entries.pfns.max()))
                repeated |= self._track(entries)
        if count_zero:
            batch.zero_pages = _count_zero_pages(frame)
            self.total.zero_pages = (self.total.zero_pages or 0) + batch.zero_pages
        self._count_pass(batch, frame, repeated, checkpoint, verify)
        self.total.count(batch.by_type)
        if batch.lowest is not None and batch.highest is not None:
            self.total.widen(batch.lowest, batch.highest)
        return batch

    # Which PFNs were seen, ever and in this pass

    def _track_run(self, run: PfnRun) -> bool:
        """Take a run in; return whether one of its PFNs had occurred in this pass."""
        count = max(0, min(run.length, TRACKED_PFNS - run.first))
        self.untracked += run.length - count
        if not count:
            return False
        new = self._seen.add_run(run.first, count)
        self.distinct += new
        if self._in_pass is None:
            repeated = new < count
            if repeated:
                self._in_pass = PfnBitmap(TRACKED_PFNS)
        else:
            repeated = bool(self._in_pass.count_run(run.first, count))
            if repeated:
                self._in_pass.clear()
        if self._in_pass is not None:
            self._in_pass.add_run(run.first, count)
        return repeated

    def _track(self, entries: Entries) -> bool:
        pfns = entries.pfns
        tracked = pfns[pfns < TRACKED_PFNS]
        self.untracked += len(pfns) - len(tracked)
        new = self._seen.add(tracked)
        self.distinct += new
        if self._in_pass is None:
            repeated = new < len(tracked)
            if repeated:
                self._in_pass = PfnBitmap(TRACKED_PFNS)
        else:
            repeated = bool(self._in_pass.test(tracked).any())
            if repeated:
                self._in_pass.clear()
        if self._in_pass is not None:
            self._in_pass.add(tracked)
        return repeated

    def _count_pass(self, batch: Batch, frame: Frame, repeated: bool, checkpoint: int, verify: bool) -> None:
        if self._current is None or repeated:
            self.pass_count += 1
            self._current = Pass(self.pass_count, frame.offset, checkpoint, verify)
            if len(self.passes) < PASSES_KEPT:
                self.passes.append(self._current)
        self._current.records += 1
        self._current.pfns += batch.pfns
        self._current.pages += batch.pages


def _count_zero_pages(frame: Frame) -> int:
    import numpy as np

    octets = memoryview(bytearray(ZERO_SCAN * 4096))
    words = np.frombuffer(octets, np.uint64).reshape(ZERO_SCAN, 4096 // 8)
    found = 0
    while frame.left:
        pages = min(ZERO_SCAN, frame.left // 4096)
        if not pages:
            break
        frame.readv_into([octets[: pages * 4096]])
        found += int(np.count_nonzero(np.bitwise_or.reduce(words[:pages], axis=1) == 0))
    return found
