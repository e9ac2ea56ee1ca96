"""The state behind the pages of a legacy stream: tails of PV and HVM guests, QEMU's record.

Source: xc_domain_restore.c of Xen 4.4, buffer_tail_pv, buffer_tail_hvm, buffer_qemu, compat_buffer_qemu.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from migstream.bitmap import PfnBitmap
from migstream.errors import RecordRef, TruncatedError
from migstream.legacy.header import XSAVE_HEADER, LegacyHeader, PvHeader
from migstream.legacy.source import LAYER, ChunkSource
from migstream.records import MAX_RECORD_LENGTH
from migstream.records.hvm_params import HvmParam
from migstream.records.libxc import X86TscInfo

__all__ = ["Collected", "DeviceModel", "GuestState", "Qemu", "ToolstackData", "VcpuState", "read_tail"]

PAGE_SIZE = 4096
EXTENDED_SIZE = 128  # octets of xen_domctl_ext_vcpucontext
LARGEST_STATE = MAX_RECORD_LENGTH - 64  # octets that still fit a record of libxc or libxl
UNMAPPED_AT_ONCE = 8192  # PFNs of the unmapped list read at a time

#: Signatures of QEMU's record: whether its content goes to the end of the input, or has a length before it.
SIGNATURES: dict[bytes, bool] = {
    b"QemuDeviceModelRecord": True,
    b"DeviceModelRecord0002": False,
    b"RemusDeviceModelState": False,
}
SIGNATURE_LENGTH = 21


@dataclass(frozen=True)
class ToolstackData:
    """A TOOLSTACK chunk's content, and where in the stream it stood."""

    octets: bytes
    offset: int
    record: RecordRef | None


@dataclass
class Collected:
    """What the chunks told so far. It stays over checkpoints: a saver sends some of it only once.

    ``flags`` are the names of those chunks that have no body.
    """

    vcpu_ids: list[int] = field(default_factory=lambda: [0])
    vcpu_info_seen: bool = False
    tsc: X86TscInfo | None = None
    params: dict[int, int] = field(default_factory=dict)
    toolstack: ToolstackData | None = None
    flags: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class VcpuState:
    """One PV vCPU: register context, extended context and xsave state (empty: absent)."""

    vcpu_id: int
    basic: bytes
    extended: bytes
    xsave: bytes


@dataclass(frozen=True)
class DeviceModel:
    """QEMU's record: its signature and QEMU's own octets. ``to_end``: the input ends with it."""

    signature: str
    content: bytes
    to_end: bool


@dataclass(frozen=True)
class GuestState:
    """One consistent state: everything that belongs to the pages so far.

    ``offset`` is where the tail starts in the input; ``params`` are HVM parameters by index; ``unmapped``
    the PFNs of a PV guest that have no page.
    """

    offset: int
    tsc: X86TscInfo | None
    toolstack: ToolstackData | None
    params: dict[int, int] = field(default_factory=dict)
    hvm_context: bytes = b""
    device_model: DeviceModel | None = None
    unmapped: PfnBitmap | None = None
    vcpus: tuple[VcpuState, ...] = ()
    vcpus_online_unknown: bool = False
    shared_info: bytes = b""


class Qemu(Enum):
    """What may stand behind an HVM guest's tail."""

    OR_ANYTHING = "QEMU's record, or what belongs to the envelope"
    OR_END = "QEMU's record, or the end of the input"
    REQUIRED = "QEMU's record, as behind the state before"


def read_tail(source: ChunkSource, header: LegacyHeader, collected: Collected, qemu: Qemu) -> GuestState:
    """Read what stands behind a body."""
    source.enter("TAIL")
    if header.pv is None:
        return _hvm_tail(source, collected, qemu)
    offset = source.position
    return GuestState(
        offset=offset,
        tsc=collected.tsc,
        toolstack=collected.toolstack,
        unmapped=_unmapped(source, header.p2m_size),
        vcpus=tuple(_vcpu(source, header.pv, vcpu_id) for vcpu_id in collected.vcpu_ids),
        vcpus_online_unknown=not collected.vcpu_info_seen,
        shared_info=source.take(PAGE_SIZE, "the shared info page"),
    )


def _unmapped(source: ChunkSource, p2m_size: int) -> PfnBitmap:
    offset = source.position
    count = source.integer(4, "the number of unmapped PFNs")
    if count > p2m_size:
        raise source.fault(f"{count} PFNs are unmapped, of a guest of {p2m_size}", offset)
    unmapped = PfnBitmap(p2m_size)
    while count:
        offset = source.position
        pfns = source.words(min(count, UNMAPPED_AT_ONCE), "the unmapped PFNs")
        if int(pfns.max()) >= p2m_size:
            at = int((pfns >= p2m_size).argmax())
            raise source.fault(
                f"unmapped PFN {int(pfns[at]):#x} is not below p2m_size {p2m_size:#x}",
                offset + at * source.word_size,
            )
        unmapped.add(pfns)
        count -= len(pfns)
    return unmapped


def _vcpu(source: ChunkSource, pv: PvHeader, vcpu_id: int) -> VcpuState:
    basic = source.take(pv.layout.vcpu_context.size, f"the context of vCPU {vcpu_id}")
    extended = source.take(EXTENDED_SIZE, f"the extended context of vCPU {vcpu_id}") if pv.extended else b""
    xsave = _xsave(source, pv.xsave_size, vcpu_id) if pv.xsave_size else b""
    return VcpuState(vcpu_id, basic, extended, xsave)


def _xsave(source: ChunkSource, announced: int, vcpu_id: int) -> bytes:
    """Feature mask, length, state; of these only the state goes on, as it has the mask inside."""
    what = f"the xsave state of vCPU {vcpu_id}"
    source.skip(8, what)
    offset = source.position
    length = source.integer(8, what)
    if length != announced - XSAVE_HEADER:
        raise source.fault(
            f"{what} has {length} octets; the extended info announced {announced - XSAVE_HEADER}", offset
        )
    return source.take(length, what)


def _hvm_tail(source: ChunkSource, collected: Collected, qemu: Qemu) -> GuestState:
    offset = source.position
    magic = {
        param: source.integer(8, f"the magic PFN {param.name}")
        for param in (HvmParam.IOREQ_PFN, HvmParam.BUFIOREQ_PFN, HvmParam.STORE_PFN)
    }
    context_offset = source.position
    context = _sized(source, "the HVM context")
    if not context:
        raise source.fault(
            "the HVM context is empty: the state of the guest's processors is missing", context_offset
        )
    return GuestState(
        offset=offset,
        tsc=collected.tsc,
        toolstack=collected.toolstack,
        params=collected.params | magic,
        hvm_context=context,
        device_model=_device_model(source, qemu),
    )


def _sized(source: ChunkSource, what: str, order: Literal["little", "big"] = "little") -> bytes:
    """Read a u32 length and so many octets."""
    offset = source.position
    length = int.from_bytes(source.take(4, f"the length of {what}"), order)
    if length > LARGEST_STATE:
        raise source.fault(f"{what} has {length} octets; more than {LARGEST_STATE} fit no record", offset)
    return source.take(length, what)


def _device_model(source: ChunkSource, qemu: Qemu) -> DeviceModel | None:
    """Read QEMU's record, ``None`` where ``qemu`` allows what is there instead."""
    offset = source.position
    start = source.input.peek(SIGNATURE_LENGTH)
    if start not in SIGNATURES and (qemu is Qemu.OR_ANYTHING or (not start and qemu is Qemu.OR_END)):
        return None
    source.enter("DEVICE_MODEL")
    if start not in SIGNATURES:
        if any(signature.startswith(start) for signature in SIGNATURES):
            source.skip(len(start), "the device model's signature")
            raise source.short("the device model's signature", SIGNATURE_LENGTH, len(start))
        expected = ", ".join(signature.decode() for signature in SIGNATURES)
        raise source.fault(f"expected QEMU's record ({expected}), found {start!r}", offset)
    source.skip(SIGNATURE_LENGTH, "the device model's signature")
    to_end = SIGNATURES[start]
    content = _to_end(source) if to_end else _sized(source, "QEMU's state")
    return DeviceModel(start.decode(), content, to_end)


def _to_end(source: ChunkSource) -> bytes:
    ahead = source.input.peek(9)
    if ahead[:1] == b"\n" and ahead[5:] == b"QEVM":
        # xapi's first suspend image: its signature ends with a line feed, and a big-endian length follows
        # (xapi doc/suspend-image-considerations.md).
        source.skip(1, "the device model's signature")
        return _sized(source, "QEMU's state", "big")
    offset = source.position
    content = source.input.read(LARGEST_STATE + 1)
    if not content:
        raise TruncatedError(
            "the input ends where QEMU's state should start",
            offset=offset,
            layer=LAYER,
            record=source.record,
        )
    if len(content) > LARGEST_STATE:
        raise source.fault(f"QEMU's state has more than {LARGEST_STATE} octets, which fit no record", offset)
    return content
