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
    with_frames,
)
from migstream.layout import TABLE, Phase
from migstream.records import Record, array_of
from migstream.records.hvm_params import HvmParam
from migstream.records.libxc import (
    GuestType,
    HvmParamEntry,
    HvmParams,
    VcpuRecord,
    X86PvP2mFrames,
    X86PvVcpuBasic,
)
from migstream.records.page_types import PageType
from migstream.records.pv_state import PV_LAYOUTS

__all__ = ["ModelGuest", "SuspendAnswer"]

PV = PV_LAYOUTS[8]
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
        super().__init__(n_pages, pv=guest_type is GuestType.PV, seed=seed)
        self._guest_type = guest_type
        self.memory_limit = n_pages if memory_limit is None else memory_limit
        #: Asked by `suspend`, while the guest still runs.
        self.suspend_request: Callable[[], SuspendAnswer] = lambda: SuspendAnswer.SUSPENDS
        self._static: list[Record] = []
        self._layout: list[Record] = []
        self._state: dict[tuple[type[Record], int], Record] = {}
        self._make_state: Callable[[int], list[Record]] | None = None

    @classmethod
    def empty(
        cls, n_pages: int, guest_type: GuestType, *, seed: int = 1, memory_limit: int | None = None
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
            guest.l1_tables, guest._layout = plan.l1_tables, [p2m]
            guest._static = [machine_state.pv_info(), *machine_state.policies()]
            guest._make_state = lambda ticks: machine_state.pv_state(
                vcpu_places, vcpus=vcpus, seed=seed, ticks=ticks
            )
        else:
            places = model_boot.hvm_places(n_pages)
            fixed = np.arange(n_pages - 8, n_pages, dtype=np.uint64)
            guest._static = machine_state.policies()
            guest._make_state = lambda ticks: machine_state.hvm_state(
                places, vcpus=vcpus, seed=seed, ticks=ticks
            )
        guest.fixed = fixed
        if holes:
            model_boot.scatter_holes(types, fixed, rng)
        guest.set_types(np.arange(n_pages, dtype=np.uint64), types)
        populated = (types != PageType.XTAB) & (types != PageType.BROKEN)
        for first, end in run_bounds(np.flatnonzero(populated).astype(np.uint64)):
            guest.n_populated += guest.populated_pfns.add_run(first, end - first)
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
    def max_pfn(self) -> int:
        """The highest PFN that the machine has room for."""
        return self.n_pages - 1

    @property
    def vcpu_limit(self) -> int:
        """How many processors may be restored."""
        return VCPU_LIMIT

    def page_types(self, pfns: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
        """Return the types of ``pfns``, uint8[n]; XTAB for those that have no page."""
        return self.types_of(pfns)

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

    def _pages_with_tables(
        self,
        pfns: npt.NDArray[np.uint64],
        tables: npt.NDArray[np.bool_],
        levels: npt.NDArray[np.uint8],
        frames: FrameMap,
    ) -> tuple[Sequence[memoryview], npt.NDArray[np.bool_]]:
        with self.lock:
            self.bounded(pfns)
            copies, in_change = frames.normalise(self.memory.words[pfns[tables]], levels)
            if self.suspended and in_change.any():
                pfn = int(pfns[tables][in_change][0])
                raise GuestError(
                    f"page table {pfn:#x} refers to a frame that is not the guest's, and it is suspended"
                )
        deferred = np.zeros(len(pfns), np.bool_)
        deferred[tables] = in_change
        normalised = np.ascontiguousarray(copies[~in_change]).data.cast("B")
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
        return list(self._static)

    def layout_records(self) -> Sequence[Record]:
        """Return P2M_FRAMES of a PV guest."""
        return list(self._layout)

    def state_records(self) -> Sequence[Record]:
        """Return the machine's state. Raises `GuestError` while it runs."""
        if not self.suspended:
            raise GuestError("the state of a running guest cannot be read; suspend it first")
        return self.state()

    def state(self) -> list[Record]:
        """Return the state as it is at this moment: made, or, in a restored machine, as restored."""
        return list(self._state.values()) if self._make_state is None else self._make_state(self.ticks)

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

    def _start_info_pfn(self) -> int | None:
        for record in self.state():
            if isinstance(record, X86PvVcpuBasic) and record.vcpu_id == 0:
                return PV.vcpu_context.edx.get(record.context)
        return None

    def _translate_start_info(self, *, to_frames: bool) -> None:
        """Turn the rings' PFNs in the start info page into frames, or back."""
        if self.frames is None or (pfn := self._start_info_pfn()) is None:
            return
        page = self.memory.page(pfn)
        translate = self.frames.mfns if to_frames else self.frames.pfns
        for ring in (PV.start_info.store_mfn, PV.start_info.console_mfn):
            ring.set(page, int(translate(np.array([ring.get(page)], np.uint64))[0]))
        self.log.note(np.array([pfn], np.uint64))

    def _write_p2m(self) -> None:
        """Write the guest's list of frames into its P2M_FRAMES pages."""
        for record in self._layout:
            if self.frames is None or not isinstance(record, X86PvP2mFrames):
                continue
            per_frame = PV.p2m_entries_per_frame
            lists = record.p2m_pfns.numpy().astype(np.uint64)
            for i, frame in enumerate(lists.tolist(), record.p2m_start_pfn // per_frame):
                pfns = np.arange(i * per_frame, min((i + 1) * per_frame, self.n_pages), dtype=np.uint64)
                entries = np.where(self.populated_pfns.test(pfns), self.frames.mfns(pfns), INVALID)
                self.memory.words[frame, : len(pfns)] = entries
            self.log.note(lists)

    # The target's side

    def populate(self, pfns: npt.NDArray[np.uint64]) -> None:
        """Give the machine memory at ``pfns``. Raises `GuestError` past the host's limit."""
        self.bounded(pfns)
        with self.lock:
            if self.n_populated + len(pfns) > self.memory_limit:
                raise GuestError(
                    f"the host has no memory left: {self.n_populated} of {self.memory_limit} pages are in "
                    f"use, {len(pfns)} more are needed; give the guest a larger limit"
                )
            self.n_populated += self.populated_pfns.add(pfns)

    def populated(self, pfns: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Return which of ``pfns`` have memory, bool[n]."""
        self.bounded(pfns)
        return self.populated_pfns.test(pfns)

    def set_page_types(self, pfns: npt.NDArray[np.uint64], types: npt.NDArray[np.uint8]) -> None:
        """Note the types of ``pfns``, uint64[n]: ``types``, uint8[n]."""
        self.set_types(pfns, types)

    def localise(self, level: int, page: memoryview) -> None:
        """Put this machine's frames into a page table, in place, and populate what it refers to.

        Raises `GuestError` for an entry past `max_pfn`, or in a machine that is not PV.
        """
        if self.frames is None:
            raise GuestError("an HVM guest's page tables are its own affair: nothing to localise")
        entries = np.frombuffer(page, np.uint64)
        pfns = entry_frames(entries)
        present = entries & PRESENT != 0
        wanted = np.unique(pfns[present])
        if len(wanted) and int(wanted[-1]) > self.max_pfn:
            index = int(np.argmax(present & (pfns == wanted[-1])))
            raise GuestError(
                f"entry {index} of an L{level} page table, {int(entries[index]):#x}, refers to PFN "
                f"{int(wanted[-1]):#x}; the guest's last is {self.max_pfn:#x}"
            )
        self.populate(wanted[~self.populated_pfns.test(wanted)])
        entries[:] = with_frames(entries, self.frames.mfns(np.where(present, pfns, 0)))

    def apply(self, record: Record) -> None:
        """Take over one record; it replaces an earlier one of its kind (and vCPU), parameters one by one."""
        phase = TABLE[type(record)].phase
        if phase is Phase.STATIC:
            self._static = [r for r in self._static if type(r) is not type(record)] + [record]
        elif phase is Phase.MEMORY:
            self._layout.append(record)
        else:
            key = type(record), record.vcpu_id if isinstance(record, VcpuRecord) else 0
            earlier = self._state.get(key)
            if isinstance(earlier, HvmParams) and isinstance(record, HvmParams):
                values = {p.index: p.value for p in [*earlier.params, *record.params]}
                entries = [HvmParamEntry(index=index, value=value) for index, value in values.items()]
                record = HvmParams(params=array_of(HvmParamEntry, entries))
            self._state[key] = record

    def complete(self) -> RestoredRings:
        """Finish; from here on the machine's own writes are logged, which COLO asks for."""
        if not self.log.enabled:
            self.log.enable()
        if self._guest_type is GuestType.PV:
            pfn = self._start_info_pfn()
            if pfn is None or pfn > self.max_pfn:
                return RestoredRings(None, None)
            page = self.memory.page(pfn)
            return RestoredRings(PV.start_info.store_mfn.get(page), PV.start_info.console_mfn.get(page))
        params: dict[int, int] = {}
        for record in self.state():
            if isinstance(record, HvmParams):
                params = {p.index: p.value for p in record.params}
        return RestoredRings(params.get(HvmParam.STORE_PFN), params.get(HvmParam.CONSOLE_PFN))
