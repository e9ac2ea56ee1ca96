"""The records that a restored guest has taken over, and what they say of it."""

from __future__ import annotations

from collections.abc import Callable

from migstream.guests.protocols import RestoredRings
from migstream.layout import TABLE, Phase
from migstream.records import Record, array_of
from migstream.records.hvm_params import HvmParam
from migstream.records.libxc import (
    HvmParamEntry,
    HvmParams,
    VcpuRecord,
    X86PvInfo,
    X86PvP2mFrames,
    X86PvVcpuBasic,
)
from migstream.records.pv_state import PV_LAYOUTS, PvLayout

__all__ = ["StateBook"]


class StateBook:
    """A guest's records, the last of each kind (and vCPU, or part of the p2m); HVM parameters one by one.

    So it stays small over any number of checkpoints. ``static``, ``layout`` and ``state`` are in the order
    in which the first of each kind came.
    """

    def __init__(self) -> None:
        self._by_phase: dict[Phase, dict[tuple[type[Record], int], Record]] = {phase: {} for phase in Phase}

    def apply(self, record: Record) -> None:
        """Take over one record."""
        book = self._by_phase[TABLE[type(record)].phase]
        key = type(record), _part(record)
        earlier = book.get(key)
        if isinstance(earlier, HvmParams) and isinstance(record, HvmParams):
            values = {p.index: p.value for p in [*earlier.params, *record.params]}
            entries = [HvmParamEntry(index=index, value=value) for index, value in values.items()]
            record = HvmParams(params=array_of(HvmParamEntry, entries))
        book[key] = record

    @property
    def static(self) -> list[Record]:
        """What does not change while the guest runs."""
        return list(self._by_phase[Phase.STATIC].values())

    @property
    def layout(self) -> list[Record]:
        """What stands between the static data and the pages."""
        return list(self._by_phase[Phase.MEMORY].values())

    @property
    def state(self) -> list[Record]:
        """The state behind the pages."""
        return list(self._by_phase[Phase.STATE].values())

    @property
    def pv_layout(self) -> PvLayout:
        """Where things lie in a PV guest's state: as for 64 bits unless X86_PV_INFO says otherwise."""
        for record in self.static:
            if isinstance(record, X86PvInfo) and record.guest_width in PV_LAYOUTS:
                return PV_LAYOUTS[record.guest_width]
        return PV_LAYOUTS[8]

    @property
    def start_info_pfn(self) -> int | None:
        """PFN of a suspended PV guest's start info page, which its vCPU 0 holds, if there is one."""
        basic = self._by_phase[Phase.STATE].get((X86PvVcpuBasic, 0))
        if not isinstance(basic, X86PvVcpuBasic):
            return None
        return self.pv_layout.vcpu_context.edx.get(basic.context)

    def rings(self, page: Callable[[int], memoryview | None]) -> RestoredRings:
        """Return the PFNs of the rings: from HVM parameters, or from a PV guest's start info page.

        ``page`` gives the memory of a PFN, or ``None`` where there is none.
        """
        params = self._by_phase[Phase.STATE].get((HvmParams, 0))
        if isinstance(params, HvmParams):
            values = {p.index: p.value for p in params.params}
            return RestoredRings(values.get(HvmParam.STORE_PFN), values.get(HvmParam.CONSOLE_PFN))
        pfn = self.start_info_pfn
        start_info = None if pfn is None else page(pfn)
        if start_info is None:
            return RestoredRings(None, None)
        where = self.pv_layout.start_info
        return RestoredRings(where.store_mfn.get(start_info), where.console_mfn.get(start_info))


def _part(record: Record) -> int:
    """Return what tells two records of one kind apart."""
    if isinstance(record, VcpuRecord):
        return record.vcpu_id
    return record.p2m_start_pfn if isinstance(record, X86PvP2mFrames) else 0
