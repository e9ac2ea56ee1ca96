"""What stands before the chunks: p2m_size, and of a PV guest its extended info and p2m frames.

Source: xc_domain_save.c and xc_domain_restore.c of Xen 4.4, map_and_save_p2m_table and load_p2m_frame_list.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from migstream.errors import FormatError, TruncatedError
from migstream.io.inputs import Input
from migstream.legacy.source import LAYER, ChunkSource
from migstream.records.legacy import MAX_P2M_SIZE, SHAPE_LENGTH, is_legacy, word_size_of
from migstream.records.libxc import GuestType
from migstream.records.pv_state import PV_LAYOUTS, PvLayout

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["LegacyHeader", "PvHeader", "read_header"]

XSAVE_HEADER = 16  # octets before the xsave state of a vCPU: u64 feature mask, u64 length
MAX_XSAVE = 64 << 10  # octets of a vCPU's xsave state; the largest processors have 11 KiB


@dataclass(frozen=True)
class PvHeader:
    """What only a PV guest has. ``xsave_size`` is in octets, header included; 0: there is none."""

    layout: PvLayout
    p2m_frames: npt.NDArray[np.uint64]
    extended: bool
    xsave_size: int


@dataclass(frozen=True)
class LegacyHeader:
    """What is known before the first chunk. ``pv`` is ``None`` for an HVM guest."""

    guest: GuestType
    word_size: int
    p2m_size: int
    pv: PvHeader | None
    warnings: list[str] = field(default_factory=list)


@dataclass
class _ExtendedInfo:
    """What the blocks of the extended info told so far; the defaults hold where a block is absent."""

    guest_width: int
    extended: bool = False
    xsave_size: int = 0
    warnings: list[str] = field(default_factory=list)


def read_header(source: Input, guest: GuestType | None) -> tuple[ChunkSource, LegacyHeader]:
    """Read up to the first chunk. ``guest`` overrides what the octets look like.

    Raises `FormatError` for what is no legacy stream, or lies, and `TruncatedError`.
    """
    offset = source.position
    start = source.peek(SHAPE_LENGTH)
    if len(start) < SHAPE_LENGTH:
        raise TruncatedError(
            f"the input ends inside the start of a legacy stream: expected {SHAPE_LENGTH} octets, "
            f"found {len(start)}",
            offset=offset + len(start),
            layer=LAYER,
        )
    shape = is_legacy(start)
    if guest is None:
        if shape is None:
            raise FormatError(
                f"expected a legacy stream: p2m_size, then extended info or a chunk; found {start.hex(' ')}",
                offset=offset,
                layer=LAYER,
            )
        guest = shape.guest
    chunks = ChunkSource(source, word_size_of(start))
    chunks.enter("HEADER")
    p2m_size = chunks.word("p2m_size")
    if not 2 <= p2m_size <= MAX_P2M_SIZE:
        raise chunks.fault(f"p2m_size is {p2m_size}, expected 2 to {MAX_P2M_SIZE}", offset, field="p2m_size")
    if guest is GuestType.HVM:
        return chunks, LegacyHeader(guest, chunks.word_size, p2m_size, None)
    return chunks, _pv_header(chunks, p2m_size)


def _pv_header(source: ChunkSource, p2m_size: int) -> LegacyHeader:
    info = _ExtendedInfo(guest_width=source.word_size)
    if source.input.peek(source.word_size) == b"\xff" * source.word_size:
        source.skip(source.word_size, "the mark of the extended info")
        _read_extended_info(source, info)
    layout = PV_LAYOUTS[info.guest_width]
    source.enter("P2M_FRAMES")
    offset = source.position
    count = -(-p2m_size // layout.p2m_entries_per_frame)
    frames = source.words(count, "the list of p2m frames")
    if int(frames.max()) >= p2m_size:
        at = int((frames >= p2m_size).argmax())
        raise source.fault(
            f"p2m frame {at} is PFN {int(frames[at]):#x}, not below p2m_size {p2m_size:#x}",
            offset + at * source.word_size,
        )
    pv = PvHeader(layout, frames, info.extended, info.xsave_size)
    return LegacyHeader(GuestType.PV, source.word_size, p2m_size, pv, info.warnings)


def _read_extended_info(source: ChunkSource, info: _ExtendedInfo) -> None:
    source.enter("EXTENDED_INFO")
    left = source.integer(4, "the length of the extended info")
    while left:
        offset = source.position
        head = source.take(8, "the head of an extended-info block")
        name, length = head[:4], int.from_bytes(head[4:], "little")
        if length + 8 > left:
            raise source.fault(
                f"block {name!r} has {length} octets; the extended info has {left - 8} left", offset + 4
            )
        read = _BLOCKS.get(name)
        if read is None:
            info.warnings.append(f"extended-info block {name!r} is not known and was left out")
        consumed = read(source, info, length) if read else 0
        source.skip(length - consumed, f"extended-info block {name!r}")
        left -= 8 + length


def _vcpu(source: ChunkSource, info: _ExtendedInfo, length: int) -> int:
    """Take the guest's word size from the size of a vCPU's context; what is in it is of an older state."""
    widths = {layout.vcpu_context.size: width for width, layout in PV_LAYOUTS.items()}
    if length not in widths:
        raise source.fault(
            f"block 'vcpu' has {length} octets, expected 2800 (32-bit guest) or 5168 (64-bit)",
            source.position - 4,
        )
    info.guest_width = widths[length]
    return 0


def _extv(source: ChunkSource, info: _ExtendedInfo, length: int) -> int:
    info.extended = True
    return 0


def _xcnt(source: ChunkSource, info: _ExtendedInfo, length: int) -> int:
    offset = source.position
    if length < 4:
        raise source.fault(f"block 'xcnt' has {length} octets, expected 4", offset - 4)
    size = source.integer(4, "the size of xsave state")
    if size and not XSAVE_HEADER < size <= MAX_XSAVE:
        raise source.fault(
            f"a vCPU's xsave state takes {size} octets, expected {XSAVE_HEADER + 1} to {MAX_XSAVE}", offset
        )
    info.xsave_size = size
    return 4


#: Block identifier -> what reads it and returns how many octets of the block it consumed.
_BLOCKS = {b"vcpu": _vcpu, b"extv": _extv, b"xcnt": _xcnt}
