"""A machine in memory, HVM or PV: the guest to save from and to restore to where there is no hypervisor.

It has pages of every type, a dirty log, processors and devices (`machine_state`), and for PV real page
tables: they hold frames that differ from machine to machine (`pv_pages`), as on two hosts. What a live
guest does to its own pages is in `machine`; who does it, and how fast, in `workload`.

A restored model is what the stream says, to the octet; unlike Xen, restore rewrites no ring page. A PV
guest's own list of frames and its start info page are put right on `resume`, by the guest, as Linux does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Self, overload

import numpy as np
import numpy.typing as npt

from migstream.bitmap import PfnBitmap
from migstream.errors import GuestError
from migstream.guests import machine_state, model_boot
from migstream.guests.machine import Machine
from migstream.guests.memory import run_bounds
from migstream.guests.protocols import PAGE_SIZE, RestoredRings
from migstream.guests.pv_pages import (
    INVALID,
    PRESENT,
    TABLE_LEVEL,
    FrameMap,
    entry_frames,
    referenced_pfns,
    with_frames,
)
from migstream.guests.state_book import StateBook
from migstream.records import Record, array_of
from migstream.records.libxc import (
    GuestType,
    X86PvP2mFrames,
)
from migstream.records.page_types import PageType
from migstream.records.pv_state import PV_LAYOUTS

__all__ = ["ModelGuest", "SuspendAnswer"]

PV = PV_LAYOUTS[8]
AT_ONCE = 1 << 16  # PFNs in an array while a machine boots
VCPU_LIMIT = 32  # processors that a shared info page has room for: XEN_LEGACY_MAX_VCPUS


class SuspendAnswer(Enum):
    """What a guest says to the event channel's request that it suspend."""

    SUSPENDS = "it suspends"
    REFUSES = "it refused to suspend"
    SILENT = "it did not answer the request to suspend"


class ModelGuest(Machine):
    """A machine of ``n_pages`` pages, `SaveSource` and `RestoreTarget`. Make one with `booted` or `empty`.

    Thread-safe: a workload may write while an engine saves. `lock` is held around every step that must
    look atomic from outside; it is also notified when the guest resumes.
    """

    def __init__(self, n_pages: int, guest_type: GuestType, *, seed: int, memory_limit: int | None) -> None:
        super().__init__(n_pages, pv=guest_type is GuestType.PV, seed=seed, page_limit=memory_limit)
        self._guest_type = guest_type
        #: Asked by `suspend`, while the guest still runs.
        self.suspend_request: Callable[[], SuspendAnswer] = lambda: SuspendAnswer.SUSPENDS
        self._book = StateBook()
        self._make_state: Callable[[int], list[Record]] | None = None

    @classmethod
    def empty(
        cls,
        n_pages: int,
        guest_type: GuestType = GuestType.HVM,
        *,
        seed: int = 1,
        memory_limit: int | None = None,
    ) -> Self:
        """Make a machine without memory to restore to; ``memory_limit`` is how many pages the host has."""
        return cls(n_pages, guest_type, seed=seed, memory_limit=memory_limit)

    @classmethod
    def booted(
        cls,
        n_pages: int,
        guest_type: GuestType = GuestType.HVM,
        *,
        seed: int = 0,
        vcpus: int = 2,
        holes: bool = True,
        content: bool = True,
    ) -> Self:
        """Make a running machine whose memory, layout and state follow from ``seed``.

        Without ``holes`` every page is populated; without ``content`` ordinary pages are zero and cost no
        memory until they are written.
        """
        if not 1 <= vcpus <= VCPU_LIMIT:
            raise GuestError(f"a model has 1 to {VCPU_LIMIT} processors, not {vcpus}")
        guest = cls(n_pages, guest_type, seed=seed, memory_limit=None)
        rng = np.random.default_rng(seed)
        types = np.zeros(n_pages, np.uint8)
        plan = model_boot.plan_pv(n_pages) if guest_type is GuestType.PV else None
        if plan is not None:
            vcpu_places = plan.places
            for type, tables in plan.tables.items():
                types[tables] = type
            fixed = plan.fixed
            p2m = X86PvP2mFrames(
                p2m_start_pfn=0, p2m_end_pfn=n_pages - 1, p2m_pfns=array_of(8, plan.p2m_frames)
            )
            guest.l1_tables = plan.l1_tables
            known = [machine_state.pv_info(), *machine_state.policies(), p2m]
            guest._make_state = lambda ticks: machine_state.pv_state(
                vcpu_places, vcpus=vcpus, seed=seed, ticks=ticks
            )
        else:
            places = model_boot.hvm_places(n_pages)
            fixed = np.arange(n_pages - 8, n_pages, dtype=np.uint64)
            known = machine_state.policies()
            guest._make_state = lambda ticks: machine_state.hvm_state(
                places, vcpus=vcpus, seed=seed, ticks=ticks
            )
        for record in known:
            guest.apply(record)
        guest.fixed = fixed
        if holes:
            model_boot.scatter_holes(types, fixed, rng)
        for start in range(0, n_pages, AT_ONCE):
            pfns = np.arange(start, min(start + AT_ONCE, n_pages), dtype=np.uint64)
            own = types[pfns]
            guest.set_page_types(pfns, own)
            guest.populate(pfns[(own != PageType.XTAB) & (own != PageType.BROKEN)])
        if content:
            model_boot.fill(guest.memory, types, rng)
        if plan is not None and guest.frames is not None:
            model_boot.write_tables(plan, guest.memory, types, guest.frames)
            start_info = guest.memory.page(plan.places.start_info)
            start_info[:] = bytes(PAGE_SIZE)
            PV.start_info.nr_pages.set(start_info, n_pages)
            PV.start_info.store_mfn.set(start_info, plan.store)
            PV.start_info.console_mfn.set(start_info, plan.console)
        guest.resume()
        return guest

    # Both ends

    @property
    def guest_type(self) -> GuestType:
        """PV or HVM."""
        return self._guest_type

    @property
    def vcpu_limit(self) -> int:
        """How many processors may be restored."""
        return VCPU_LIMIT

    @overload
    def pages(self, pfns: npt.NDArray[np.uint64]) -> Sequence[memoryview]: ...
    @overload
    def pages(
        self, pfns: npt.NDArray[np.uint64], types: npt.NDArray[np.uint8]
    ) -> tuple[Sequence[memoryview], npt.NDArray[np.bool_]]: ...
    def pages(
        self, pfns: npt.NDArray[np.uint64], types: npt.NDArray[np.uint8] | None = None
    ) -> Sequence[memoryview] | tuple[Sequence[memoryview], npt.NDArray[np.bool_]]:
        """Return the memory of ``pfns``: to restore to it, or, with their ``types``, to save from it."""
        if types is None:
            return self.memory.views(pfns)
        if self.frames is None or not (tables := TABLE_LEVEL[types] > 0).any():
            return self.memory.views(pfns), np.zeros(len(pfns), np.bool_)
        return self._pages_with_tables(pfns, tables, TABLE_LEVEL[types[tables]], self.frames)

    def take_run(self, first_pfn: int, count: int, type: int) -> memoryview:
        """Populate a run of pages, set their type and return their memory."""
        self.book_run(first_pfn, count, type)
        return self.memory.run(first_pfn, count)

    def _pages_with_tables(
        self,
        pfns: npt.NDArray[np.uint64],
        tables: npt.NDArray[np.bool_],
        levels: npt.NDArray[np.uint8],
        frames: FrameMap,
    ) -> tuple[Sequence[memoryview], npt.NDArray[np.bool_]]:
        with self.lock:
            self._bounded(pfns)
            copies, in_change = frames.normalise(
                self.memory.words[pfns[tables]], levels, self._book.pv_layout.guest_width
            )
            if self.suspended and in_change.any():
                pfn = int(pfns[tables][in_change][0])
                raise GuestError(
                    f"page table {pfn:#x} refers to a frame that is not the guest's, and it is suspended"
                )
        deferred = np.zeros(len(pfns), np.bool_)
        deferred[tables] = in_change
        # As octets in one row: all tables may be in change, and an empty table of rows is no memoryview.
        normalised = np.ascontiguousarray(copies[~in_change]).view(np.uint8).reshape(-1).data
        # The copies are numbered on from the end of memory, so that one search finds the runs in both.
        beyond = self.n_pages + 1
        split = beyond * PAGE_SIZE
        numbers = pfns.copy()
        numbers[tables & ~deferred] = beyond + np.arange(np.count_nonzero(~in_change))
        buffers = []
        for start, end in run_bounds(numbers[~deferred], PAGE_SIZE):
            where, base = (normalised, split) if start >= split else (self.memory.octets, 0)
            buffers.append(where[start - base : end - base])
        return buffers, deferred

    def clean_dirty_log(self, into: PfnBitmap) -> None:
        """Move the log of writes into ``into`` and start an empty one, as one step."""
        with self.lock:
            self.log.clean(into)

    def peek_dirty_log(self, into: PfnBitmap) -> None:
        """Copy the log of writes into ``into`` and keep it."""
        with self.lock:
            self.log.peek(into)

    def enable_dirty_log(self) -> None:
        """Start to log writes, with an empty log."""
        with self.lock:
            self.log.enable()

    def disable_dirty_log(self) -> None:
        """Stop to log writes."""
        with self.lock:
            self.log.disable()

    # The source's side

    def static_records(self) -> Sequence[Record]:
        """Return PV_INFO (PV), CPUID and MSR policies."""
        return self._book.static

    def layout_records(self) -> Sequence[Record]:
        """Return P2M_FRAMES of a PV guest."""
        return self._book.layout

    def state_records(self) -> Sequence[Record]:
        """Return the machine's state. Raises `GuestError` while it runs."""
        if not self.suspended:
            raise GuestError("the state of a running guest cannot be read; suspend it first")
        return self.state()

    def state(self) -> list[Record]:
        """Return the state as it is at this moment; that of a restored machine is as it was restored."""
        if self._make_state is not None:
            for record in self._make_state(self.ticks):
                self._book.apply(record)
        return self._book.state

    def suspend(self) -> None:
        """Ask the guest to suspend, and stop it. Raises `GuestError` if it refuses or does not answer."""
        if self.suspended:
            return
        answer = self.suspend_request()
        if answer is not SuspendAnswer.SUSPENDS:
            raise GuestError(f"the guest is still running: {answer.value}")
        with self.lock:
            self.finish_changes()
            self._translate_start_info(to_frames=False)
            self.suspended = True

    def resume(self) -> None:
        """Let the machine run on. A PV guest learns its frames anew, which may be others than before."""
        with self.lock:
            if not self.suspended:
                return
            self.suspended = False
            self._translate_start_info(to_frames=True)
            self._write_p2m()
            self.lock.notify_all()

    def _translate_start_info(self, *, to_frames: bool) -> None:
        """Turn the rings' PFNs in the start info page into frames, or back."""
        self.state()
        pfn = self._book.start_info_pfn
        if self.frames is None or pfn is None or pfn > self.max_pfn:
            return
        layout = self._book.pv_layout
        page = self.memory.page(pfn)
        translate = self.frames.mfns if to_frames else self.frames.pfns
        for ring in (layout.start_info.store_mfn, layout.start_info.console_mfn):
            ring.set(page, int(translate(np.array([ring.get(page)], np.uint64))[0]))
        self.log.note(np.array([pfn], np.uint64))

    def _write_p2m(self) -> None:
        """Write the guest's list of frames into its P2M_FRAMES pages."""
        for record in self._book.layout:
            if self.frames is None or not isinstance(record, X86PvP2mFrames):
                continue
            layout = self._book.pv_layout
            per_frame = layout.p2m_entries_per_frame
            entry = np.dtype(f"<u{layout.guest_width}")
            frames = record.p2m_pfns.numpy().astype(np.uint64)
            for i, frame in enumerate(frames.tolist(), record.p2m_start_pfn // per_frame):
                pfns = np.arange(i * per_frame, min((i + 1) * per_frame, self.n_pages), dtype=np.uint64)
                mfns = np.where(self.populated(pfns), self.frames.mfns(pfns), INVALID)
                self.memory.pages[frame].view(entry)[: len(pfns)] = mfns.astype(entry)
            self.log.note(frames)

    # The target's side

    def localise(self, level: int, page: memoryview) -> None:
        """Put this machine's frames into a page table, in place, and populate what it refers to.

        Raises `GuestError` for an entry past `max_pfn`, or in a machine that is not PV.
        """
        if self.frames is None:
            raise GuestError("an HVM guest's page tables are its own affair: nothing to localise")
        entries = np.frombuffer(page, np.uint64)
        wanted = referenced_pfns(entries, level, self.max_pfn)
        self.populate(wanted[~self.populated(wanted)])
        pfns = np.where(entries & PRESENT != 0, entry_frames(entries), 0)
        entries[:] = with_frames(entries, self.frames.mfns(pfns))

    def apply(self, record: Record) -> None:
        """Take over one record; it replaces an earlier one of its kind (and vCPU), parameters one by one."""
        self._book.apply(record)

    def complete(self) -> RestoredRings:
        """Finish; from here on the machine's own writes are logged, which COLO asks for."""
        if not self.log.enabled:
            self.log.enable()
        self.state()
        return self._book.rings(lambda pfn: self.memory.page(pfn) if pfn < self.n_pages else None)

    @property
    def guest_width(self) -> int:
        """Octets of a word of a PV guest: 8, or 4 where X86_PV_INFO said so."""
        return self._book.pv_layout.guest_width
