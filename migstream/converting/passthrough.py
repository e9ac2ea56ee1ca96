"""A stream written again record by record, in other layers or another version; pages pass uncopied."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from migstream.bitmap import PfnBitmap
from migstream.converting.envelope import Envelope
from migstream.converting.losses import Losses, keeps
from migstream.converting.options import MAX_BATCH, Options, Target
from migstream.converting.page_mover import PageMover, page_blocks
from migstream.errors import FormatError
from migstream.guests.protocols import PAGE_SIZE
from migstream.io.inputs import FileInput
from migstream.io.reader import Frame, Layer, Stream, Trailer
from migstream.io.writer import StreamWriter
from migstream.page_index import DEFAULT_MAX_MEMORY, implied_memory
from migstream.records import libxc, libxl
from migstream.records.page_types import PFN_MASK

__all__ = ["pass_through"]


def pass_through(
    stream: Stream, writer: StreamWriter, target: Target, options: Options, tell: Callable[[str], None]
) -> None:
    """Write ``stream`` to ``writer`` as ``target``; ``tell`` is given what a person should know.

    With ``batch`` or ``drop_zero`` the stream's input has to be a `FileInput`. Raises `StreamError`.
    """
    walk = _PassThrough(stream, writer, target, options)
    for item in stream.items():
        match item:
            case Layer():
                walk.layer(item)
            case Frame():
                walk.frame(item)
            case Trailer():
                walk.trailer(item, tell)
    walk.flush()
    for line in walk.envelope.left_out():
        tell(line)
    for line in walk.losses.lines():
        tell(f"lost: {line}")
    if walk.mover is not None and options.drop_zero:
        tell(f"{walk.mover.dropped} pages without content are allocate-only now")


class _PassThrough:
    def __init__(self, stream: Stream, writer: StreamWriter, target: Target, options: Options) -> None:
        self.envelope = Envelope(writer, target, options)
        self.losses = Losses(target)
        self.mover: PageMover | None = None
        if options.seeks:
            assert isinstance(stream.input, FileInput)
            self.mover = PageMover(
                writer, stream.input, batch=options.batch or MAX_BATCH, drop_zero=options.drop_zero
            )
        self._writer = writer
        self._target = target
        self._options = options
        self._regroups = options.batch is not None
        self._layers: list[Layer] = []
        self._sent: PfnBitmap | None = None

    def flush(self) -> None:
        if self.mover is not None:
            self.mover.flush()

    def layer(self, layer: Layer) -> None:
        self.flush()
        self.envelope.layer(layer)
        self._layers.append(layer)

    def frame(self, frame: Frame) -> None:
        if frame.layer.name == "xapi":
            self.losses.note_frame(frame)
        elif frame.layer.name == "libxl":
            self._libxl(frame)
        elif frame.is_page_data and self.mover is not None:
            self.envelope.before(frame.record_class)
            self._writer.order = frame.layer.order
            self._pages(frame)
        else:
            self._libxc(frame)

    def _libxl(self, frame: Frame) -> None:
        self.flush()
        self.losses.note_frame(frame)
        if "libxl" in self._target.layers:
            self._copy(frame)
        elif frame.record_class is libxl.CheckpointEnd:
            # Only now is the checkpoint complete, of which libxc's own record told.
            self._writer.record(libxc.Checkpoint())

    def _libxc(self, frame: Frame) -> None:
        self.flush()
        self.losses.note_frame(frame)
        self._writer.order = frame.layer.order
        stays = self.envelope.before(frame.record_class) and keeps("libxc", frame.code, self._target)
        waits = (
            frame.record_class is libxc.Checkpoint
            and "libxl" in self.envelope.source_layers
            and "libxl" not in self._target.layers
        )
        if stays and not waits:
            self._copy(frame)
        if self.envelope.made_libxl and frame.record_class is libxc.Checkpoint:
            self._writer.record(libxl.CheckpointEnd())
        if self.envelope.made_libxl and frame.record_class is libxc.End:
            self._writer.record(libxl.LibxlEnd())

    def _copy(self, frame: Frame) -> None:
        self._writer.order = frame.layer.order
        self._writer.copy(frame)

    def _pages(self, frame: Frame) -> None:
        """Move a record's pages, in records of the size asked for.

        Records are joined only while PFNs ascend, so that no PFN stands in one record twice.
        """
        assert self.mover is not None
        first = True
        for entries, offsets in page_blocks(frame):
            pfns = entries & np.uint64(PFN_MASK)
            if first and int(pfns[0]) <= self.mover.last_pfn:
                self.mover.flush()
            first = False
            keep = self._sent_before(frame, pfns) if self._options.drop_zero else None
            self.mover.add(entries, offsets, keep)
        if not self._regroups:
            self.mover.flush()

    def _sent_before(self, frame: Frame, pfns: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Return which PFNs were sent before, bool[n]: there a zero page has something to replace."""
        if self._sent is None:
            limit = self._options.max_memory or implied_memory(self._layers) or DEFAULT_MAX_MEMORY
            self._sent = PfnBitmap(limit // PAGE_SIZE)
        highest = int(pfns.max())
        if highest >= self._sent.size:
            octets = self._sent.size * PAGE_SIZE
            raise FormatError(
                f"PFN {highest:#x} is past the {octets:,} octets that the guest may have",
                offset=frame.offset,
                layer=frame.layer.name,
                record=frame.ref,
                field="entries",
                hint="--max-memory allows more",
            )
        before = self._sent.test(pfns)
        self._sent.add(pfns)
        return before

    def trailer(self, trailer: Trailer, tell: Callable[[str], None]) -> None:
        if self.envelope.changed:
            tell(f"left out: {trailer.left or 'some'} octets behind the stream's end, at {trailer.offset}")
        else:
            self._writer.written += trailer.splice_to(self._writer.fd)
