"""A QEMU machine to save from: its RAM where it is, its writes tracked from outside, its devices over QMP.

While it runs, nothing is asked of QEMU. `suspend` stops it and takes the device state at once, because to
write that, QEMU may write to guest memory: so the scan for dirty pages that follows sees it all.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from migstream.bitmap import PfnBitmap
from migstream.errors import GuestError
from migstream.guests.memory import Memory
from migstream.guests.process.tracer import Tracer
from migstream.guests.process.tracking import DirtyTracker, MemoryRange, track
from migstream.guests.protocols import PAGE_SHIFT
from migstream.guests.qemu import device_state
from migstream.guests.qemu.client import QmpClient
from migstream.guests.qemu.machine import check_blockers, look_at, run_state
from migstream.guests.qemu.ram_file import RamFile
from migstream.records import Record
from migstream.records.libxc import GuestType
from migstream.records.libxl import EmulatorContext, EmulatorId
from migstream.records.page_types import PageType

__all__ = ["QemuSource"]

#: What to do about a machine that is neither running nor paused.
_REMEDIES = {
    "inmigrate": "it waits for a migration itself; save the machine that it is to come from",
    "postmigrate": "it was migrated away; let it go on here first (QMP: cont)",
    "shutdown": "its guest has shut down",
    "suspended": "its guest sleeps (ACPI S3); wake it first (QMP: system_wakeup)",
}
CHUNK = 1 << 16  # PFNs looked at together
_SAVEABLE = ("running", "paused", "prelaunch")


class QemuSource:
    """The machine behind the QMP socket at ``path``, as a `SaveSource` that is a `HasEmulator`.

    ``pid`` is QEMU's process where the socket does not tell. Close it, or use it as a context manager: the
    machine is no longer tracked then.
    """

    def __init__(self, path: str, *, pid: int | None = None) -> None:
        """Connect, and look whether the machine can be saved. Raises `GuestError` that says what to do."""
        with ExitStack() as opened:
            self.qmp = opened.enter_context(QmpClient(path))
            self.pid = pid or self.qmp.peer_pid
            # Its process starts meanwhile, so that nobody has to wait for it later.
            self._tracer = opened.enter_context(Tracer(self.pid))
            self.machine = look_at(self.qmp)
            state = run_state(self.qmp)
            if state not in _SAVEABLE:
                remedy = _REMEDIES.get(state, "only a running or paused machine can be saved")
                raise GuestError(f"{path}: QEMU's machine is in the state {state!r}: {remedy}")
            check_blockers(self.qmp)
            ram = self.machine.ram
            self._ram = opened.enter_context(
                RamFile(self.pid, self.machine.address, ram.size, writable=False)
            )
            # Where they are does not change, and a machine that would lose some is refused before it stops.
            self._blocks = device_state.carried_blocks(self.qmp, self.machine)
            self._state_file = opened.enter_context(device_state.StateFile(self.qmp))
            self._opened = opened.pop_all()
        self._origin = self.machine.origin
        self._tracker: DirtyTracker | None = None
        self._tracking_ends = False  # with the standstill
        self._device_state: bytes | None = None
        #: Pages, numbered as in the file, that the stream leaves out, because the target's are zeros anyway:
        #: those that nobody ever wrote to (to read one would give it memory), and zeros in the first pass.
        self._left_out = PfnBitmap(ram.size >> PAGE_SHIFT)
        self._first_pass = True
        self._notes: list[str] = []

    @property
    def guest_type(self) -> GuestType:
        """HVM: a machine of its own."""
        return GuestType.HVM

    @property
    def max_pfn(self) -> int:
        """The last page of RAM."""
        return self.machine.ram.max_pfn

    def static_records(self) -> Sequence[Record]:
        """Return ORIGIN. CPUID and MSRs are what ``-cpu`` of both QEMUs says, and in no record."""
        return [self._origin]

    def layout_records(self) -> Sequence[Record]:
        """Return nothing."""
        return []

    def state_records(self) -> Sequence[Record]:
        """Return nothing: processors and time stamp counter are in QEMU's state, not in Xen's form."""
        return []

    def emulator_records(self) -> Sequence[Record]:
        """Return EMULATOR_CONTEXT with what `suspend` took. Raises `GuestError` if the machine went on."""
        if self._device_state is None or not self.suspended:
            raise GuestError(f"{self.qmp.path}: QEMU's machine went on while it was saved; do not let it")
        return [
            EmulatorContext(emulator_id=EmulatorId.QEMU_UPSTREAM, index=0, emulator_ctx=self._device_state)
        ]

    def page_types(self, pfns: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
        """Return NOTAB for RAM, XTAB for the hole below 4 GiB and for pages that need not be sent."""
        ram = self.machine.ram
        there = ram.holds(pfns)
        pages = ram.file_pages(pfns[there])
        sent = ~self._left_out.test(pages)
        if self._first_pass and self._copy is None:
            sent[sent] = self._ram.memory.nonzero(pages[sent])
            self._left_out.add(pages[~sent])
        there[there] = sent
        return np.where(there, np.uint8(PageType.NOTAB), np.uint8(PageType.XTAB))

    def pages(
        self, pfns: npt.NDArray[np.uint64], types: npt.NDArray[np.uint8]
    ) -> tuple[Sequence[memoryview], npt.NDArray[np.bool_]]:
        """Return the machine's own memory, or the tracker's copy of it; no page ever has to wait."""
        if self._copy is not None:
            return self._copy.views(pfns), np.zeros(len(pfns), np.bool_)
        views = self._ram.memory.views(self.machine.ram.file_pages(pfns))
        return views, np.zeros(len(pfns), np.bool_)

    @property
    def _copy(self) -> Memory | None:
        """The tracker's copy of the memory, if it has one: then that is what is sent."""
        return None if self._tracker is None else self._tracker.copy

    # The dirty log

    def enable_dirty_log(self) -> None:
        """Track the writes of QEMU's process. Raises `GuestError`, also if they are tracked already."""
        self._close_tracker()
        pieces = self.machine.ram.pieces
        ranges = [
            MemoryRange(
                self.machine.address + (piece.file_page << PAGE_SHIFT),
                piece.n_pages << PAGE_SHIFT,
                piece.first_pfn,
            )
            for piece in pieces
        ]
        views = [self._ram.memory.run(piece.file_page, piece.n_pages) for piece in pieces]
        self._tracker = track(self.pid, ranges, views=views, tracer=self._tracer)
        self._begin_first_pass()  # not before: from here on, whatever is written to is logged
        self._notes = [f"writes were tracked by {self._tracker.name}: {self._tracker.why}"]

    def disable_dirty_log(self) -> None:
        """Stop to track: QEMU's process is as it was.

        While the machine stands still nothing is written, and taking the protection off would only prolong
        its standstill: then that waits until it runs on, or `close`.
        """
        if self._device_state is None:
            self._close_tracker()
        else:
            self._tracking_ends = True

    def _begin_first_pass(self) -> None:
        self._left_out = self._ram.holes()
        self._first_pass = True

    def _close_tracker(self) -> None:
        self._tracking_ends = False
        if self._tracker is not None:
            self._tracker.close()
            self._tracker = None

    def clean_dirty_log(self, into: PfnBitmap) -> None:
        """Move the log into ``into``."""
        self._log().clean(into)
        self._first_pass = False
        for pfns in into.batches(CHUNK):
            self._left_out.discard(self.machine.ram.file_pages(pfns))

    def peek_dirty_log(self, into: PfnBitmap) -> None:
        """Copy the log into ``into``."""
        self._log().peek(into)

    def _log(self) -> DirtyTracker:
        if self._tracker is None:
            raise GuestError("the dirty log is off; enable it before asking what is dirty")
        return self._tracker

    def notes(self) -> Sequence[str]:
        """Return how writes were tracked, and why so."""
        return self._notes

    # Running and standing still

    def suspend(self) -> None:
        """Stop the machine, and take its device state. Raises `GuestError`."""
        self._device_state = None
        self.qmp.execute("stop")
        state = self._state_file.take()
        if self._tracker is None:
            self._begin_first_pass()
        blocks = [
            (block, device_state.read_block(self.pid, address, block.length))
            for block, address in self._blocks
        ]
        self._device_state = device_state.with_blocks(state, blocks, footer=self.machine.section_footer)

    def resume(self) -> None:
        """Let the machine run on; what it had given up with its device state (disks) it takes back."""
        self._device_state = None
        self.qmp.execute("cont")
        if self._tracking_ends:
            self._close_tracker()

    @property
    def suspended(self) -> bool:
        """Whether the machine stands still, as QEMU tells. Raises `GuestError` when QEMU is gone."""
        return not self.qmp.running

    def close(self) -> None:
        """Stop tracking, and disconnect. Closing twice is harmless."""
        self._close_tracker()
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
