"""What holds a PV guest together, checked before it may run.

A PV guest's registers, start info and page tables name frames. In a stream they are PFNs, and each must be
a page that the stream brought, of the right type, or the guest dies in its first instructions. vCPU records
are kept until the end of the stream, as the pages that they refer to may come after them.

Source: xg_sr_restore_x86_pv.c (handle_x86_pv_p2m_frames, handle_x86_pv_vcpu_blob, process_vcpu_basic,
process_start_info, update_guest_p2m).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from migstream.engines.restore_checks import CONTEXT_RULES, refusal
from migstream.errors import FormatError, RecordRef, StreamError
from migstream.guests.protocols import RestoreTarget
from migstream.io.reader import Frame
from migstream.records import libxc
from migstream.records.page_types import PageType, type_name
from migstream.records.pv_state import GDT_ENTRIES_MAX, PV_LAYOUTS, PvLayout

__all__ = ["PvState"]

PFNS = 1 << 32  # P2M_FRAMES names PFNs by 32 bits
FRAMES_AT_ONCE = 1 << 16
CONNECTION = 3088  # offset of the connection flag in a console ring (xen/include/public/io/console.h)
DISCONNECTED = 1

#: The four VCPU records in the order in which Xen is given them.
VCPU_ORDER: tuple[type[libxc.VcpuRecord], ...] = (
    libxc.X86PvVcpuBasic,
    libxc.X86PvVcpuExtended,
    libxc.X86PvVcpuXsave,
    libxc.X86PvVcpuMsrs,
)


@dataclass(frozen=True)
class _Kept:
    """A vCPU's record, and where it stood."""

    record: libxc.VcpuRecord
    offset: int
    ref: RecordRef


class PvState:
    """What the stream has told of a PV guest's own make-up so far."""

    def __init__(self, target: RestoreTarget) -> None:
        self.target = target
        self.highest_pfn = 0  # as P2M_FRAMES say; 0 before they came
        self._layout = PV_LAYOUTS[8]  # PV domains are 64-bit until X86_PV_INFO says otherwise
        self._p2m: npt.NDArray[np.uint64] | None = None  # PFN + 1 of each frame of the list, 0: not told
        self._p2m_place: tuple[int, RecordRef] | None = None
        self._vcpus: dict[int, dict[type[libxc.VcpuRecord], _Kept]] = {}

    # Records

    def pv_info(self, frame: Frame, info: libxc.X86PvInfo) -> None:
        """Take X86_PV_INFO: the word size decides every layout."""
        layout = PV_LAYOUTS.get(info.guest_width)
        if layout is None or layout.pt_levels != info.pt_levels:
            raise refusal(
                frame,
                "expected a width of 4 with 3 levels of page tables, or 8 with 4; "
                f"found {info.guest_width} with {info.pt_levels}",
                field="guest_width",
            )
        self._layout = layout

    def p2m_frames(self, frame: Frame, record: libxc.X86PvP2mFrames) -> None:
        """Take P2M_FRAMES; a later one with a higher end makes the guest larger."""
        start, end = record.p2m_start_pfn, record.p2m_end_pfn
        if start > end:
            raise refusal(
                frame, f"the first PFN, {start:#x}, is above the last, {end:#x}", field="p2m_start_pfn"
            )
        per_frame = self._layout.p2m_entries_per_frame
        first, stop = start // per_frame, end // per_frame + 1
        expected = 8 + 8 * (stop - first)
        if frame.length != expected:
            raise refusal(
                frame,
                f"PFNs {start:#x} to {end:#x} take {stop - first} frames of {per_frame} entries, which is "
                f"{expected} octets; the body has {frame.length}",
                field="length",
                at=-4,
            )
        if end == 0 and self._p2m is None:
            raise refusal(frame, "a guest of one page cannot exist", field="p2m_end_pfn", at=4)
        if self._p2m is None:
            # Untouched zeros cost no memory, so the largest guest's list may stand here from the start.
            self._p2m = np.zeros(PFNS // per_frame, np.uint64)
        self._p2m[first:stop] = record.p2m_pfns.numpy() + np.uint64(1)
        self._p2m_place = frame.offset, frame.ref
        self.highest_pfn = max(self.highest_pfn, end)

    def vcpu(self, frame: Frame, record: libxc.VcpuRecord) -> None:
        """Keep a vCPU's record; the last of each type counts. An empty one is skipped, as old savers do."""
        if not record.context:
            return
        if record.vcpu_id >= self.target.vcpu_limit:
            raise refusal(
                frame,
                f"vCPU {record.vcpu_id} is above the target's highest, {self.target.vcpu_limit - 1}",
                field="vcpu_id",
            )
        kind = type(record)
        length = len(record.context)
        if kind is libxc.X86PvVcpuBasic:
            size = self._layout.vcpu_context.size
            problem = None if length == size else f"expected exactly {size} octets, found {length}"
        else:
            problem = CONTEXT_RULES[kind].problem(length)
        if problem:
            raise refusal(frame, f"the vCPU's state: {problem}", field="context", at=record.head_size)
        self._vcpus.setdefault(record.vcpu_id, {})[kind] = _Kept(record, frame.offset, frame.ref)

    # The end of the stream

    def vcpu_records(self) -> Iterator[libxc.VcpuRecord]:
        """Yield each vCPU's records in the order to apply them, its frames checked beforehand.

        Raises `FormatError` for a vCPU that could not run.
        """
        if libxc.X86PvVcpuBasic not in self._vcpus.get(0, {}):
            raise FormatError(
                "the image ends without X86_PV_VCPU_BASIC of vCPU 0: the guest has no processor to run on",
                layer="libxc",
            )
        for vcpu_id in sorted(self._vcpus):
            kept = self._vcpus[vcpu_id]
            if libxc.X86PvVcpuBasic in kept:
                self._check_basic(kept[libxc.X86PvVcpuBasic])
            for kind in VCPU_ORDER:
                if kind in kept:
                    yield kept[kind].record

    def check_p2m(self) -> None:
        """Check that each frame of the guest's own p2m is an ordinary page that it has; vCPUs come first."""
        assert self._p2m is not None  # or vCPU 0's start info page would have had no memory
        assert self._p2m_place is not None
        count = self.highest_pfn // self._layout.p2m_entries_per_frame + 1
        for start in range(0, count, FRAMES_AT_ONCE):
            # What was not told, 0, becomes the highest of all numbers, so it is out of range too.
            pfns = self._p2m[start : min(count, start + FRAMES_AT_ONCE)] - np.uint64(1)
            try:
                self._check_frames(pfns, "frame {} of the p2m", start)
            except StreamError as exc:
                raise self._located(exc, self._p2m_place) from None

    def disconnect_console(self, pfn: int) -> None:
        """Mark the console ring as not connected, so that the guest waits for its new host."""
        self._page(pfn)[CONNECTION] = DISCONNECTED

    def _check_basic(self, kept: _Kept) -> None:
        try:
            self._check_context(kept.record.vcpu_id, kept.record.context)
        except StreamError as exc:
            raise self._located(exc, (kept.offset, kept.ref)) from None

    def _check_context(self, vcpu_id: int, context: bytes) -> None:
        layout: PvLayout = self._layout
        state = layout.vcpu_context
        if len(context) != state.size:
            raise FormatError(
                f"expected the state of a {8 * layout.guest_width}-bit vCPU, {state.size} octets, found "
                f"{len(context)}: X86_PV_INFO came after it",
                field="context",
            )
        if vcpu_id == 0:
            self._check_start_info(state.edx.get(context))
        entries = state.gdt_ents.get(context)
        if entries > GDT_ENTRIES_MAX:
            raise FormatError(
                f"the GDT has {entries} entries, more than the {GDT_ENTRIES_MAX} that are a guest's",
                field="gdt_ents",
            )
        gdt = np.array([f.get(context) for f in state.used_gdt_frames(context)], np.uint64)
        self._check_frames(gdt, "GDT frame {}")
        self._check_table("cr3", layout.cr3_to_pfn(state.ctrlreg[3].get(context)))
        cr1 = state.ctrlreg[1].get(context)
        if layout.pt_levels == 4 and cr1 & 1:
            self._check_table("cr1", cr1 >> 12)

    def _check_start_info(self, pfn: int) -> None:
        self._check_frames(np.array([pfn], np.uint64), "the start info page")
        page = self._page(pfn)
        start_info = self._layout.start_info
        rings = (("xenstore", start_info.store_mfn), ("console", start_info.console_mfn))
        for name, where in rings:
            self._check_present(np.array([where.get(page)], np.uint64), f"the {name} page")

    def _check_table(self, register: str, pfn: int) -> None:
        pfns = np.array([pfn], np.uint64)
        self._check_present(pfns, register)
        found, expected = int(self.target.page_types(pfns)[0]), self._layout.pt_levels
        if found not in set(PageType) or PageType(found).page_table_level != expected:
            raise FormatError(
                f"{register} (PFN {pfn:#x}) is of type {type_name(found)}, expected a page table of level "
                f"{expected}"
            )

    def _check_present(self, pfns: npt.NDArray[np.uint64], name: str, first: int = 0) -> None:
        """Check that each PFN is in the guest's range and has memory.

        ``name`` says what they are to the guest; ``{}`` in it is replaced by the number, from ``first``.
        """
        beyond = pfns > self.highest_pfn
        if beyond.any():
            i = int(beyond.argmax())
            told = int(pfns[i])
            raise FormatError(
                f"{name.format(first + i)} (PFN {told:#x}) is above the highest PFN, {self.highest_pfn:#x}"
            )
        absent = pfns > self.target.max_pfn
        absent[~absent] = ~self.target.populated(pfns[~absent])
        if absent.any():
            i = int(absent.argmax())
            raise FormatError(
                f"{name.format(first + i)} (PFN {int(pfns[i]):#x}) has no memory: the stream never sent it"
            )

    def _check_frames(self, pfns: npt.NDArray[np.uint64], name: str, first: int = 0) -> None:
        """As `_check_present`, and that each is an ordinary page."""
        self._check_present(pfns, name, first)
        types = self.target.page_types(pfns)
        wrong = types != PageType.NOTAB
        if wrong.any():
            i = int(wrong.argmax())
            found = type_name(int(types[i]))
            raise FormatError(
                f"{name.format(first + i)} (PFN {int(pfns[i]):#x}) is of type {found}, expected NOTAB"
            )

    def _page(self, pfn: int) -> memoryview:
        return self.target.pages(np.array([pfn], np.uint64))[0].cast("B")

    def _located(self, error: StreamError, place: tuple[int, RecordRef]) -> StreamError:
        return error.located(base=place[0], layer="libxc", record=place[1])
