"""The records of a version 3 image and its libxl stream that a legacy header and state stand for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from migstream.legacy.header import LegacyHeader, PvHeader
from migstream.legacy.state import GuestState, VcpuState
from migstream.legacy.toolstack import physmap_pairs
from migstream.records import Declaration, PageData, Record, array_of, libxc, libxl
from migstream.records.page_types import TYPE_SHIFT, PageType
from migstream.records.pv_state import CONTEXT_ONLINE

__all__ = [
    "CONVERTER_VERSION",
    "emulator_records",
    "headers",
    "layout_records",
    "shape_records",
    "state_records",
]

CONVERTER_VERSION = 1  # goes into xen_minor, beside a xen_major of 0
XTABS_AT_ONCE = 1024  # entries of a record that tells unmapped PFNs


def headers(header: LegacyHeader) -> tuple[Declaration, ...]:
    """Return the image's headers, which say that it was converted (xen_major is 0)."""
    return libxc.ImageHeader(), libxc.DomainHeader(
        type=header.guest, xen_major=0, xen_minor=CONVERTER_VERSION
    )


def shape_records(header: LegacyHeader) -> Iterator[Record]:
    """Yield the static data that a legacy stream has: X86_PV_INFO of a PV guest."""
    if header.pv is not None:
        layout = header.pv.layout
        yield libxc.X86PvInfo(guest_width=layout.guest_width, pt_levels=layout.pt_levels)


def layout_records(header: LegacyHeader) -> Iterator[Record]:
    """Yield what stands before the pages: X86_PV_P2M_FRAMES of a PV guest."""
    if header.pv is not None:
        yield libxc.X86PvP2mFrames(
            p2m_start_pfn=0, p2m_end_pfn=header.p2m_size - 1, p2m_pfns=array_of(8, header.pv.p2m_frames)
        )


def state_records(header: LegacyHeader, state: GuestState) -> Iterator[Record]:
    """Yield what stands behind the pages, in the order in which Xen's own converter writes it."""
    if state.unmapped is not None:
        for pfns in state.unmapped.batches(XTABS_AT_ONCE):
            yield PageData(entries=array_of(8, np.uint64(PageType.XTAB << TYPE_SHIFT) | pfns))
    if state.tsc is not None:
        yield state.tsc
    if header.pv is None:
        yield from _hvm_records(state)
    else:
        for vcpu in state.vcpus:
            yield from _vcpu_records(vcpu, header.pv, set_online=state.vcpus_online_unknown)
        yield libxc.SharedInfo(shared_info=state.shared_info)


def _hvm_records(state: GuestState) -> Iterator[Record]:
    # Zero is no parameter: a saver of version 3 leaves such out, as restore would act on PFN 0.
    params = [
        libxc.HvmParamEntry(index=index, value=value)
        for index, value in sorted(state.params.items())
        if value
    ]
    if params:
        yield libxc.HvmParams(params=array_of(libxc.HvmParamEntry, params))
    yield libxc.HvmContext(hvm_ctx=state.hvm_context)


def _vcpu_records(vcpu: VcpuState, pv: PvHeader, *, set_online: bool) -> Iterator[Record]:
    basic = bytearray(vcpu.basic)
    if set_online:  # a stream without VCPU_INFO is from a Xen that did not know the flag
        flags = pv.layout.vcpu_context.flags
        flags.set(basic, flags.get(basic) | CONTEXT_ONLINE)
    yield libxc.X86PvVcpuBasic(vcpu_id=vcpu.vcpu_id, context=bytes(basic))
    if vcpu.extended:
        yield libxc.X86PvVcpuExtended(vcpu_id=vcpu.vcpu_id, context=vcpu.extended)
    if vcpu.xsave:
        yield libxc.X86PvVcpuXsave(vcpu_id=vcpu.vcpu_id, context=vcpu.xsave)


def emulator_records(header: LegacyHeader, state: GuestState) -> Iterator[Record]:
    """Yield what a libxl stream has behind the image of an HVM guest. Raises `FormatError`.

    The emulator is given as unknown: a legacy stream does not say which QEMU it was.
    """
    if header.pv is not None:
        return
    emulator = libxl.EmulatorId.UNKNOWN
    if state.toolstack is not None:
        pairs = physmap_pairs(state.toolstack, header.word_size)
        if pairs:
            yield libxl.EmulatorXenstoreData(
                emulator_id=emulator, index=0, data=libxl.EmulatorXenstoreData.pack(pairs)
            )
    if state.device_model is not None and state.device_model.content:
        yield libxl.EmulatorContext(emulator_id=emulator, index=0, emulator_ctx=state.device_model.content)
