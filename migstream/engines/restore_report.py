"""What a restore tells besides making the guest: its result, passes over memory, libxl's records."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

from migstream.engines.common import Missing
from migstream.engines.progress import PassKind, PassReport, PassStart, Progress
from migstream.engines.restore_checks import refusal
from migstream.engines.restore_pages import Batch
from migstream.io.reader import Frame
from migstream.records import Record, libxl

__all__ = ["MISMATCHES_LISTED", "LibxlRecords", "Outcome", "Passes", "RestoreResult"]

MISMATCHES_LISTED = 1 << 16  # differing PFNs that a result lists; all are counted
KEPT_RECORD = 1 << 20  # octets of the largest libxl record that is kept
KEPT_TOTAL = 16 << 20  # octets of all of them
TAKEN_TOTAL = 128 << 20  # octets of those that a target takes over: what its emulator has to have


class Outcome(Enum):
    """How a restore ended well."""

    RESTORED = "restored"
    FAILED_OVER = "failed_over"


@dataclass
class RestoreResult:
    """What a restore did.

    ``missing`` is the static data that the stream lacked; ``checkpoints`` counts those applied, ``pages``
    those received with their content. ``verify_mismatches`` are PFNs that verify mode found to differ,
    ascending, uint64[n], at most 65,536 of ``verify_mismatch_count``. ``libxl_records`` are what a libxl
    stream holds for the emulators, as far as they are small, of the state that was restored.
    ``failover_reason`` says what ended the stream; ``warnings`` what was tolerated.
    """

    result: Outcome = Outcome.RESTORED
    missing: Missing = Missing.NONE
    checkpoints: int = 0
    pages: int = 0
    seconds: float = 0.0
    verify_mismatches: npt.NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    verify_mismatch_count: int = 0
    store_pfn: int | None = None
    console_pfn: int | None = None
    libxl_records: list[Record] = field(default_factory=list)
    failover_reason: str | None = None
    warnings: list[str] = field(default_factory=list)


class LibxlRecords:
    """libxl's records around the image: shown to the caller, and kept where they are small.

    ``complete`` are those of the last complete state, ``_pending`` of the one that is coming in. ``needed``:
    a target takes them over, so that none may be left out.
    """

    def __init__(self, show: Callable[[Frame], None] | None, *, needed: bool = False) -> None:
        self.complete: list[Record] = []
        self._pending: list[Record] = []
        self._octets = 0
        self._show = show
        self._needed = needed

    def take(self, frame: Frame) -> None:
        """Take one record. Raises `FormatError` for one that is needed and would be too much to hold."""
        if self._show is not None:
            self._show(frame)
        keeps = frame.record_class in (libxl.EmulatorContext, libxl.EmulatorXenstoreData)
        untouched = frame.left == frame.length
        if not (keeps and untouched):
            return
        room = (TAKEN_TOTAL if self._needed else KEPT_TOTAL) - self._octets
        if frame.length <= (room if self._needed else min(KEPT_RECORD, room)):
            self._octets += frame.length
            self._pending.append(frame.record())
        elif self._needed:
            message = f"an emulator's state of more than {TAKEN_TOTAL} octets is not taken over"
            raise refusal(frame, message, field="length", at=-4)

    def commit(self) -> None:
        """Let what came with a state replace what was there: the state is complete."""
        self.complete, self._pending, self._octets = self._pending, [], 0


class Passes:
    """Tells a `Progress` of the passes over memory: each goes through the PFNs in ascending order."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._kind: PassKind | None = None
        self._number = 0
        self._last_pfn = -1
        self._pages = self._octets = 0
        self._started = 0.0

    def received(self, kind: PassKind, batch: Batch, octets: int) -> None:
        """Tell of one PAGE_DATA record of ``octets`` that was applied."""
        first = batch.first_pfn
        if self._kind is not None and (first <= self._last_pfn or kind != self._kind):
            self.close()
        if self._kind is None:
            self._kind = kind
            self._started = time.monotonic()
            self._progress.begin(PassStart(kind, self._number, None))
        self._last_pfn = batch.last_pfn
        self._pages += batch.entries
        self._octets += octets
        self._progress.advance(batch.pages, octets)

    def close(self) -> None:
        """End the pass, if one is under way."""
        if self._kind is None:
            return
        seconds = time.monotonic() - self._started
        self._progress.end(PassReport(self._kind, self._number, self._pages, self._octets, seconds))
        self._number += 1
        self._kind, self._last_pfn = None, -1
        self._pages = self._octets = 0
