"""One libxc record after the other into a target: what each means to a guest that is being made.

`RecordApplier` knows nothing of checkpoints or channels. It takes records in their order, from the stream
itself or from where a checkpoint's records waited, and refuses what Xen refuses: the place by the layout
table, the length by the table of `restore_checks`, then what is in it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from migstream.engines.common import Missing
from migstream.engines.restore_checks import check_length, check_place, refusal
from migstream.engines.restore_pages import PageReceiver
from migstream.engines.restore_pv import CONNECTION, DISCONNECTED, PvState
from migstream.errors import GuestError, StreamError
from migstream.guests.protocols import PAGE_SIZE, RestoredRings, RestoreTarget
from migstream.io.reader import Frame
from migstream.layout import Layout
from migstream.records import PageData, Record, array_of, libxc
from migstream.records.hvm_params import HvmParam
from migstream.records.libxc import GuestType

__all__ = ["RecordApplier"]

#: HVM parameters that name a ring or a request page: both ends start anew on an empty one.
_RESET_PAGES = (HvmParam.STORE_PFN, HvmParam.CONSOLE_PFN, HvmParam.IOREQ_PFN, HvmParam.BUFIOREQ_PFN)

#: Policies that must be in the static data, and what is missing without them, in the order to apply them.
_POLICIES: tuple[tuple[type[Record], Missing], ...] = (
    (libxc.X86CpuidPolicy, Missing.CPUID),
    (libxc.X86MsrPolicy, Missing.MSR),
)


class RecordApplier:
    """Applies the records of one image to ``target``.

    ``static_data_done`` is called once, at the end of the static data; what it returns, other than 0,
    ends the restore. ``reset_rings``: empty the guest's rings to its host, as Xen's restore does.
    """

    def __init__(
        self,
        target: RestoreTarget,
        layout: Layout,
        static_data_done: Callable[[Missing], int] | None,
        *,
        reset_rings: bool,
    ) -> None:
        self.target = target
        self.layout = layout
        self.memory = PageReceiver(target, localises=layout.guest is GuestType.PV)
        self.missing = Missing.NONE
        self.warnings: list[str] = []
        self._static_data_done = static_data_done
        self._reset_rings = reset_rings
        self._policies: dict[type[Record], Record] = {}
        self._hvm_context: libxc.HvmContext | None = None
        self._pv = PvState(target)

    def apply(self, frame: Frame) -> None:
        """Take one record other than END and CHECKPOINT; its body is consumed.

        Raises `FormatError` for what is refused, with its place, also where the target refuses it.
        """
        kind = frame.record_class
        if kind is None:
            if not frame.optional:
                raise refusal(frame, "a record of unknown type that may not be ignored")
            return
        try:
            if self.layout.infers_static_data_end(kind):
                self.layout.inferred = True
                self.end_static_data()
            self.warnings += check_place(frame, kind, self.layout)
            check_length(frame, kind)
            _HANDLERS[kind](self, frame)
            self.layout.note(kind)
        except GuestError as exc:
            raise StreamError(
                str(exc), offset=frame.offset, layer=frame.layer.name, record=frame.ref
            ) from exc
        except StreamError as exc:
            raise (
                exc
                if exc.record
                else exc.located(base=frame.offset, layer=frame.layer.name, record=frame.ref)
            ) from None

    def end_static_data(self) -> None:
        """Apply the CPU policies, last one of each, and tell the caller which are missing.

        They are Xen's: what names another origin misses none.
        """
        self.layout.note(libxc.StaticDataEnd)
        for kind, flag in _POLICIES:
            if kind in self._policies:
                self.target.apply(self._policies[kind])
            elif libxc.Origin not in self.layout.seen:
                self.missing |= flag
        if self._static_data_done is not None:
            answer = self._static_data_done(self.missing)
            if answer != 0:
                raise StreamError(f"static_data_done refused the guest: it returned {answer}")

    def complete(self) -> RestoredRings:
        """Do what is left when every record is there: processors, then whatever the target has to.

        A stream with neither STATIC_DATA_END nor a record that implies it is told of here, which Xen
        never does.
        """
        if not self.layout.static_data_ended:
            self.end_static_data()
        if self.layout.guest is GuestType.HVM:
            if self._hvm_context is not None:
                self.target.apply(self._hvm_context)
            return self.target.complete()
        for record in self._pv.vcpu_records():
            self.target.apply(record)
        self._pv.check_p2m()
        rings = self.target.complete()
        if self._reset_rings and rings.console_pfn is not None:
            self._pv.disconnect_console(rings.console_pfn)
        return rings

    # What each type does; the layout and the length have been checked

    def _page_data(self, frame: Frame) -> None:
        self.memory.receive(frame)

    def _static_data_end(self, frame: Frame) -> None:
        frame.finish()
        self.end_static_data()

    def _verify(self, frame: Frame) -> None:
        frame.finish()
        self.memory.verifying = True

    def _policy(self, frame: Frame) -> None:
        if not self.layout.static_data_ended:
            record = frame.record()
            self._policies[type(record)] = record

    def _state(self, frame: Frame) -> None:
        self.target.apply(frame.record())

    def _context(self, frame: Frame) -> None:
        record = frame.record()
        assert isinstance(record, libxc.HvmContext)
        self._hvm_context = record

    def _params(self, frame: Frame) -> None:
        record = frame.record()
        assert isinstance(record, libxc.HvmParams)
        expected = record.head_size + libxc.HvmParamEntry.head_size * record.count
        if frame.length != expected:
            raise refusal(
                frame,
                f"{record.count} parameters need {expected} octets, the body has {frame.length}",
                field="length",
                at=-4,
            )
        entries = record.params.numpy()
        if self._reset_rings:
            for entry in np.unique(entries[np.isin(entries["index"], _RESET_PAGES)]):
                self._reset_page(HvmParam(entry["index"]), int(entry["value"]))
        # It only ever carried a hint for building the CPUID policy (xg_sr_restore_x86_hvm.c).
        obsolete = entries["index"] == HvmParam.PAE_ENABLED
        if obsolete.any():
            kept = array_of(libxc.HvmParamEntry, entries[~obsolete])
            record = libxc.HvmParams(params=kept, reserved1=record.reserved1)
        if record.count:
            self.target.apply(record)

    def _reset_page(self, param: HvmParam, pfn: int) -> None:
        """Empty a ring; one that the guest has no memory for is let be, as it is by Xen."""
        if pfn > self.target.max_pfn:
            return
        pfns = np.array([pfn], np.uint64)
        if not self.target.populated(pfns)[0]:
            return
        page = self.target.pages(pfns)[0].cast("B")
        page[:] = bytes(PAGE_SIZE)
        if param is HvmParam.CONSOLE_PFN:
            page[CONNECTION] = DISCONNECTED

    def _pv_info(self, frame: Frame) -> None:
        record = frame.record()
        assert isinstance(record, libxc.X86PvInfo)
        self._pv.pv_info(frame, record)
        self.target.apply(record)

    def _p2m_frames(self, frame: Frame) -> None:
        record = frame.record()
        assert isinstance(record, libxc.X86PvP2mFrames)
        self._pv.p2m_frames(frame, record)
        self.memory.highest_pfn = self._pv.highest_pfn
        self.target.apply(record)

    def _vcpu(self, frame: Frame) -> None:
        record = frame.record()
        assert isinstance(record, libxc.VcpuRecord)
        self._pv.vcpu(frame, record)


#: What to do with each type of record. END and CHECKPOINT are the engine's own.
_HANDLERS: dict[type[Record], Callable[[RecordApplier, Frame], None]] = {
    PageData: RecordApplier._page_data,
    libxc.StaticDataEnd: RecordApplier._static_data_end,
    libxc.Verify: RecordApplier._verify,
    libxc.X86CpuidPolicy: RecordApplier._policy,
    libxc.X86MsrPolicy: RecordApplier._policy,
    libxc.Origin: RecordApplier._state,
    libxc.X86TscInfo: RecordApplier._state,
    libxc.SharedInfo: RecordApplier._state,
    libxc.HvmContext: RecordApplier._context,
    libxc.HvmParams: RecordApplier._params,
    libxc.X86PvInfo: RecordApplier._pv_info,
    libxc.X86PvP2mFrames: RecordApplier._p2m_frames,
    libxc.X86PvVcpuBasic: RecordApplier._vcpu,
    libxc.X86PvVcpuExtended: RecordApplier._vcpu,
    libxc.X86PvVcpuXsave: RecordApplier._vcpu,
    libxc.X86PvVcpuMsrs: RecordApplier._vcpu,
}
