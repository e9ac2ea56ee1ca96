"""The reader: a stream as a sequence of layers and frames, understood but not judged.

Theory of operation. A stream is a nest: an envelope, such as an xl file, holds a libxl stream, whose
LIBXC_CONTEXT record announces a libxc image with headers of its own. `Stream.items` walks it and hands
out, in the order of the bytes,

* a `Layer` for each header found (xl, libvirt, xend, xapi1, xapi, libxl, libxc),
* a `Frame` for each record, *before* its body is read; for each segment of xapi's image a `Segment`,
* a `Trailer`, if anything follows the end of the outermost layer.

The consumer decides what happens to a body: decode it, read it into buffers, move it to a descriptor,
or nothing. What nobody consumed is skipped when the next item is asked for: a file is seeked over, a
pipe is drained.

Which layer the next record belongs to follows from the one before it, as a table says (`_NEXT`): an END
hands back to the layer around; CHECKPOINT to libxl, whose CHECKPOINT_END hands to libxc again, without
new headers. A xapi segment that is a stream opens a layer, as LIBXC_CONTEXT does. Where the layer that
should go on is not open, the present one stays.

A legacy (version 1) libxc stream, bare or inside an envelope, is not walked: reading raises a `FormatError`
that names it, `Stream.legacy` is true from then on, and nothing of it was consumed: `Stream.input` stands at
its first octet, for who can convert it. The layers around it, with their config, were handed out before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from migstream.errors import FormatError, TruncatedError
from migstream.io.detect import open_input
from migstream.io.frame import Frame, PageHead, Payload, Segment, Trailer
from migstream.io.inputs import Input, MemoryInput
from migstream.io.layers import Layer, read_layer
from migstream.records import envelopes, libxc, libxl, record_class
from migstream.records.legacy import SHAPE_LENGTH, is_legacy
from migstream.records.page_data import RunTemplates

__all__ = [
    "Frame",
    "Item",
    "Layer",
    "PageHead",
    "Payload",
    "Segment",
    "Stream",
    "Trailer",
    "open",
    "open_memory",
]

MAX_LAYERS = 64  # headers in one input; a real stream has three layers, and each is remembered
MAX_SEGMENT = 1 << 63  # octets from which on a segment's length is negative: xapi's are signed

_HEADER = {"little": libxc.RecordHeader.struct("little"), "big": libxc.RecordHeader.struct("big")}
_HEADER_SIZE = libxc.RecordHeader.head_size

Item = Layer | Frame | Trailer

#: The layer of the record after one of these, by (layer, type code); after any other it stays.
#: ``header``: headers follow, of a layer inside this one; ``end``: the layer around it goes on.
_NEXT = {
    ("xapi", envelopes.Libxc.code): "header",
    ("xapi", envelopes.Libxl.code): "header",
    ("xapi", envelopes.LibxcLegacy.code): "header",
    ("xapi", envelopes.EndOfImage.code): "end",
    ("libxl", libxl.LibxcContext.code): "header",
    ("libxl", libxl.CheckpointEnd.code): "libxc",
    ("libxl", libxl.CheckpointState.code): "libxl",
    ("libxl", libxl.LibxlEnd.code): "end",
    ("libxc", libxc.Checkpoint.code): "libxl",
    ("libxc", libxc.End.code): "end",
}
_AROUND = {"libxc": ("libxl", "xapi"), "libxl": ("xapi",), "xapi": ()}
_ENVELOPES = ("xl", "libvirt", "xend", "xapi1")  # whose header something else follows at once


class Stream:
    """A migration stream being read. Iterating gives its frames and leaves the input behind the last one.

    `items` gives layers and trailer too, for which it looks at the octet behind the end, so on a
    descriptor it waits for that octet or for the end of input.

    ``layers`` grows as headers are met, ``checkpoints`` as they are completed; ``checkpoint_offset`` is
    where the last of them ends. After the last frame, ``ending`` says how the stream ended: ``end`` (an
    END record) or ``checkpoint`` (the input ended between two records behind a complete checkpoint, as
    it does when the sender of a checkpointed stream dies: what follows the checkpoint is void).

    ``legacy`` is true once a legacy stream was met, at which ``input`` then stands.
    """

    def __init__(self, source: Input) -> None:
        self.input = source
        self.layers: list[Layer] = []
        self.checkpoints = 0
        self.checkpoint_offset = 0
        self.run_templates = RunTemplates()  # for recognising PAGE_DATA's runs, frame after frame
        self.ending: str | None = None
        self.legacy = False
        self._open: dict[str, Layer] = {}  # by name: the layers whose records may go on
        self._at_checkpoint = False
        self._unmeasured_vgpu = False
        self._walker: Iterator[Layer | Frame] | None = None
        self._trailer_given = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close what the stream opened; a descriptor that was passed in stays open."""
        self.input.close()

    @property
    def position(self) -> int:
        """Octets of the input that have been consumed."""
        return self.input.position

    def layer(self, name: str) -> Layer | None:
        """Return the layer ``name``, if its header was met already."""
        return next((layer for layer in self.layers if layer.name == name), None)

    def __iter__(self) -> Iterator[Frame]:
        return (item for item in self._once() if isinstance(item, Frame))

    def items(self) -> Iterator[Item]:
        """Yield every `Layer`, `Frame` and `Trailer` in the order of the bytes; one pass over the input.

        Raises `TruncatedError` where the input ends early and `FormatError` where it cannot be framed,
        after everything before that place was yielded.
        """
        # Not `yield from`, which would end the walk when a consumer drops this generator and asks again.
        for item in self._once():  # noqa: UP028
            yield item
        if self.ending == "end" and not self._trailer_given and self.input.peek(1):
            self._trailer_given = True
            yield Trailer(self, self.position)

    def _once(self) -> Iterator[Layer | Frame]:
        if self._walker is None:
            self._walker = self._walk()
        return self._walker

    def _walk(self) -> Iterator[Layer | Frame]:
        layer = self._open_layer(None)
        yield layer
        if layer.name in _ENVELOPES:
            layer = self._open_layer(layer.name)
            yield layer
        index = 0
        while True:
            in_segments = layer.name == "xapi"
            frame = self._next_segment(layer, index) if in_segments else self._next_frame(layer, index)
            if frame is None:
                self.ending = "checkpoint"
                return
            layer = frame.layer
            yield frame
            frame.finish()
            index += 1
            if (layer.name, frame.code) not in _NEXT:  # as nearly always
                self._at_checkpoint = False
                continue
            step = self._step(layer.name, frame.code)
            if step == "end":
                break
            if step == "header":
                layer = self._open_layer(layer.name)
                yield layer
            else:
                layer = self._open.get(step, layer)
        self.ending = "end"

    def _step(self, name: str, code: int) -> str:
        """Return what follows a record of `_NEXT`: a layer's name, ``header`` or ``end``."""
        step = _NEXT[name, code]
        if (name, code) == ("libxl", libxl.CheckpointState.code):
            return "libxc" if self._at_checkpoint else "libxl"
        bare = "libxl" not in self._open
        completes = ("libxc", libxc.Checkpoint.code) if bare else ("libxl", libxl.CheckpointEnd.code)
        if step == "end":
            del self._open[name]
            step = next((around for around in _AROUND[name] if around in self._open), "end")
        # Without an image that goes on, a CHECKPOINT_END completes nothing.
        self._at_checkpoint = (name, code) == completes and "libxc" in self._open
        if self._at_checkpoint:
            self.checkpoints += 1
            self.checkpoint_offset = self.position
        return step

    def _next_frame(self, layer: Layer, index: int) -> Frame | None:
        source = self.input
        offset = source.position
        head = source.read(_HEADER_SIZE)
        if len(head) < _HEADER_SIZE:
            if not head and self.checkpoints:
                return None
            raise self._cut(layer, offset, head)
        code, length = _HEADER[layer.order].unpack(head)
        if self._at_checkpoint and layer.name == "libxc":
            layer = self._colo_state(layer, code, length)
        return Frame(self, layer, code=code, length=length, offset=offset, index=index)

    def _next_segment(self, layer: Layer, index: int) -> Segment:
        offset = self.position
        if self._unmeasured_vgpu:
            self._check_behind_vgpu(offset)
        size = envelopes.SegmentHeader.head_size
        octets = self.input.read(size)
        if len(octets) < size:
            where = "inside a segment header" if octets else "without xapi's End segment"
            raise TruncatedError(
                f"the input ends {where}: expected the {size} octets of a segment header, "
                f"found {len(octets)}",
                offset=offset + len(octets),
                layer=layer.name,
            )
        head = envelopes.SegmentHeader.parse(octets, layer.order)
        kind = record_class(layer.name, head.type)
        measured = kind is None or (issubclass(kind, envelopes.XapiSegment) and kind.measured)
        length = head.length if measured else 0
        if length >= MAX_SEGMENT:
            raise FormatError(
                f"a segment of type {head.type:#x} has the negative length {length - (1 << 64)}",
                offset=offset + 8,
                layer=layer.name,
                field="length",
            )
        self._unmeasured_vgpu = kind is envelopes.VgpuState and not length
        frame = Segment(self, layer, code=head.type, length=length, offset=offset, index=index)
        frame.announced = head.length
        return frame

    def _check_behind_vgpu(self, offset: int) -> None:
        """Refuse to take a vGPU's state, whose length xapi leaves out, for segments."""
        start = self.input.peek(8)
        if len(start) == 8 and record_class("xapi", int.from_bytes(start, "little")) is None:
            raise FormatError(
                "the state of a virtual GPU stands here, without its length: what follows cannot be found",
                offset=offset,
                layer="xapi",
            )

    def _colo_state(self, layer: Layer, code: int, length: int) -> Layer:
        """COLO puts a libxl CHECKPOINT_STATE between CHECKPOINT_END and the libxc records.

        Its type code is libxc's X86_PV_VCPU_EXTENDED, which never comes first after a checkpoint.
        """
        enclosing = self._open.get("libxl")
        state = libxl.CheckpointState
        if enclosing is not None and code == state.code and length in (state.head_size, 8):
            return enclosing
        return layer

    @property
    def failover_hint(self) -> str | None:
        """What a restore would make of an input that ends here, where it would make something of it."""
        if not self.checkpoints:
            return None
        return f"a restore would fail over to checkpoint {self.checkpoints}, the last complete one"

    def _cut(self, layer: Layer, offset: int, head: bytes) -> TruncatedError:
        where = "inside a record header" if head else f"without {layer.name}'s END record"
        return TruncatedError(
            f"the input ends {where}: expected the {_HEADER_SIZE} octets of a record header, "
            f"found {len(head)}",
            offset=offset + len(head),
            layer=layer.name,
            hint=self.failover_hint,
        )

    def _open_layer(self, inside: str | None) -> Layer:
        if len(self.layers) == MAX_LAYERS:
            raise FormatError(
                f"header number {MAX_LAYERS + 1}: a stream has at most one of each layer",
                offset=self.position,
                layer=inside,
            )
        try:
            layer = read_layer(self.input, inside)
        except FormatError:
            self.legacy = is_legacy(self.input.peek(SHAPE_LENGTH)) is not None
            raise
        self.layers.append(layer)
        self._open[layer.name] = layer
        return layer


def open(source: str | os.PathLike[str] | int, *, timeout_s: float | None = None) -> Stream:
    """Open a migration stream: a path, or a descriptor, which stays the caller's.

    Layers are detected; data compressed by zstd, gzip or xz are unpacked on the way. From a pipe or a
    socket no octet is taken that the stream does not need. ``timeout_s`` bounds each wait for a
    descriptor that is not a file; past it, reading raises `DeadlineError`.

    Raises `OSError` for what cannot be opened; what is not a stream is told by the first step.
    """
    return Stream(open_input(source, timeout_s))


def open_memory(octets: bytes | bytearray | memoryview) -> Stream:
    """Open a stream that is in memory."""
    return Stream(MemoryInput(octets))
