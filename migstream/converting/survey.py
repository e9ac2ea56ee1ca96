"""What of a stream goes into one consistent state: found by walking over its record headers.

A stream with checkpoints describes one state after the other, and may break off in the middle of the next.
The survey says where the wanted state ends, and which records make it up: of each kind those that came
last, as a restore would have them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from migstream.converting.options import ConvertError
from migstream.errors import FormatError, TruncatedError
from migstream.io.reader import Frame, Layer, Stream
from migstream.records import PageData, Record, libxc, libxl, padding_length, record_class

__all__ = ["KeptRecord", "Survey", "survey"]

MAX_KEPT = 1 << 16  # records beside pages that one state may have; a real one has a few for each vCPU

#: How many octets of a body tell records of one type apart: the vCPU, or the emulator and its index.
_KEY_OCTETS: dict[type[Record], int] = {
    libxc.X86PvVcpuBasic: 4,
    libxc.X86PvVcpuExtended: 4,
    libxc.X86PvVcpuXsave: 4,
    libxc.X86PvVcpuMsrs: 4,
    libxl.EmulatorXenstoreData: 8,
    libxl.EmulatorContext: 8,
}
#: Records that bind a stream together; the flattened stream has its own.
_STRUCTURE: frozenset[type[Record]] = frozenset(
    {
        libxc.End,
        libxc.Checkpoint,
        libxc.Verify,
        libxl.LibxcContext,
        libxl.LibxlEnd,
        libxl.CheckpointEnd,
        libxl.CheckpointState,
    }
)


class KeptRecord(NamedTuple):
    """A record that stays: where its header lies, and how many octets it has with header and padding."""

    layer: str
    code: int
    offset: int
    octets: int

    @property
    def record_class(self) -> type[Record] | None:
        """The type's declaration, or ``None`` for a type that is not known."""
        return record_class(self.layer, self.code)


_Key = tuple[str, int, bytes]


@dataclass
class Survey:
    """The wanted state of a stream.

    ``static`` are the libxc records up to the end of static data; ``records`` all others but pages, in the
    order of the input. Pages count up to ``until``, and up to ``verify_at`` where verify mode begins.
    ``checkpoint`` is the number of the checkpoint that the state is of, 0 for a stream without any.
    ``broken_off`` says why what follows the state is void.
    """

    layers: list[Layer] = field(default_factory=list)
    static: list[KeptRecord] = field(default_factory=list)
    until: int = 0
    verify_at: int | None = None
    checkpoint: int = 0
    broken_off: str | None = None
    _complete: dict[_Key, list[KeptRecord]] = field(default_factory=dict)
    _current: dict[_Key, list[KeptRecord]] = field(default_factory=dict)
    _kept: int = 0

    def records(self, layer: str) -> Iterator[KeptRecord]:
        """Yield the state's records of ``layer`` behind the static data, in the order of the input."""
        kept = [record for group in self._complete.values() for record in group if record.layer == layer]
        yield from sorted(kept, key=lambda record: record.offset)

    def all_records(self) -> Iterator[KeptRecord]:
        """Yield every record beside pages that the state consists of."""
        yield from self.static
        yield from self.records("libxc")
        yield from self.records("libxl")
        yield from self.records("xapi")

    def take(self, frame: Frame) -> None:
        """Take one frame into account."""
        declared = frame.record_class
        if declared is PageData or declared in _STRUCTURE:
            if declared is libxc.Verify and self.verify_at is None:
                self.verify_at = frame.offset
            return
        octets = libxc.RecordHeader.head_size + frame.length + padding_length(frame.length)
        kept = KeptRecord(frame.layer.name, frame.code, frame.offset, octets)
        self._kept += 1
        if self._kept > MAX_KEPT:
            raise FormatError(
                f"more than {MAX_KEPT} records beside pages in one state",
                offset=frame.offset,
                layer=frame.layer.name,
                record=frame.ref,
            )
        if self._in_static_data(frame):
            self.static.append(kept)
            return
        head = frame.read(min(frame.length, _KEY_OCTETS.get(declared, 0))) if declared else b""
        self._current.setdefault((kept.layer, kept.code, head), []).append(kept)

    def _in_static_data(self, frame: Frame) -> bool:
        if frame.layer.name != "libxc" or self._static_ended:
            return False
        if frame.record_class is libxc.X86PvP2mFrames:
            self._static_ended = True
            return False
        self._static_ended = frame.record_class is libxc.StaticDataEnd
        return True

    _static_ended: bool = False

    def pages(self) -> None:
        """Note that pages have begun, which end the static data of a version 2 image."""
        self._static_ended = True

    def complete(self, until: int) -> None:
        """Let the records of a state that is complete replace those of the same kind before it."""
        self._complete |= self._current
        self._current = {}
        self._kept = len(self._complete)
        self.until = until


def survey(stream: Stream, checkpoint: int | None = None) -> Survey:
    """Walk over ``stream`` and return its last complete state, or that of checkpoint number ``checkpoint``.

    Raises `StreamError` where the stream is damaged before that state is complete, and `ConvertError`
    where it has no such checkpoint.
    """
    found = Survey()
    try:
        for item in stream.items():
            if found.checkpoint < stream.checkpoints:
                _checkpoint(found, stream)
                if found.checkpoint == checkpoint:
                    return found
            match item:
                case Layer():
                    _layer(found, item)
                case Frame() if item.is_page_data:
                    found.pages()
                case Frame():
                    found.take(item)
    except TruncatedError as exc:
        if not stream.checkpoints:
            raise
        found.broken_off = str(exc)
    if found.checkpoint < stream.checkpoints:
        _checkpoint(found, stream)
    if checkpoint is not None and found.checkpoint != checkpoint:
        has = f"{found.checkpoint} complete checkpoints" if found.checkpoint else "no checkpoints"
        raise ConvertError(f"there is no checkpoint {checkpoint}: the stream has {has}")
    if not found.checkpoint:
        found.complete(stream.position)
    return found


def _checkpoint(found: Survey, stream: Stream) -> None:
    found.checkpoint = stream.checkpoints
    found.complete(stream.checkpoint_offset)


def _layer(found: Survey, layer: Layer) -> None:
    if layer.name in [known.name for known in found.layers]:
        raise FormatError(f"a second {layer.name} header: only one can be flattened", offset=layer.offset)
    domain = layer.header(libxc.DomainHeader)
    if domain is not None and domain.page_shift != 12:
        raise FormatError(
            f"pages of 2^{domain.page_shift} octets; only 4096 are known",
            offset=layer.offset + libxc.ImageHeader.head_size + 4,
            layer="libxc",
            field="page_shift",
        )
    found.layers.append(layer)
