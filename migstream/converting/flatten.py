"""A stream of many passes, or many checkpoints, written as a plain save: each page once, in PFN order.

Theory of operation. A first walk over the record headers (`survey`) says which state is wanted and where
it ends. A second walk notes for each PFN its last type and where its last copy lies, in nine octets a page
(`PageIndex`). Then the output is written from the input, page by page in the order of PFNs, where pages
that lie behind each other in the input are moved by one call. No page's content is held.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from migstream.converting.envelope import Envelope
from migstream.converting.losses import Losses, keeps
from migstream.converting.options import DEFAULT_BATCH, Options, Target
from migstream.converting.page_mover import PageMover
from migstream.converting.survey import KeptRecord, Survey, survey
from migstream.io.inputs import FileInput
from migstream.io.reader import Stream
from migstream.io.writer import StreamWriter
from migstream.page_index import PageIndex
from migstream.records import PageData, libxc, libxl
from migstream.records.page_types import TYPE_SHIFT

__all__ = ["flatten"]


def flatten(
    stream: Stream, writer: StreamWriter, target: Target, options: Options, tell: Callable[[str], None]
) -> None:
    """Write the last complete state of ``stream`` as a plain stream; ``tell`` as `pass_through`.

    The input has to be a `FileInput`, from which nothing but the beginning was read. Raises `StreamError`
    and `ConvertError`, before anything is written.
    """
    source = stream.input
    assert isinstance(source, FileInput)
    found = survey(stream, options.checkpoint)
    losses = Losses(target)
    for record in found.all_records():
        losses.note(record.layer, record.code, record.offset, record.octets)
    if not options.lossy:
        losses.refuse()
    source.rewind()
    index = PageIndex.of(Stream(source), checkpoint=found.checkpoint or None, max_memory=options.max_memory)
    _Flattened(found, index, source, writer, target, options).write(tell)
    for line in losses.lines():
        tell(f"lost: {line}")


class _Flattened:
    """The output: what of the input goes where."""

    def __init__(
        self,
        found: Survey,
        index: PageIndex,
        source: FileInput,
        writer: StreamWriter,
        target: Target,
        options: Options,
    ) -> None:
        self._found = found
        self._index = index
        self._source = source
        self._writer = writer
        self._target = target
        self._envelope = Envelope(writer, target, options)
        self._mover = PageMover(
            writer, source, batch=options.batch or DEFAULT_BATCH, drop_zero=options.drop_zero
        )
        self._drops_zero = options.drop_zero

    def write(self, tell: Callable[[str], None]) -> None:
        for layer in self._found.layers:
            self._envelope.layer(layer)
            if layer.name == "libxl":
                self._envelope.record(libxl.LibxcContext, within="libxl")
        self._libxc()
        self._libxl()
        self._tell(tell)

    def _libxc(self) -> None:
        for record in self._found.static:
            self._copy(record)
        state = list(self._found.records("libxc"))
        for record in state:
            if record.record_class is libxc.X86PvP2mFrames:
                self._copy(record)
        self._pages()
        for record in state:
            if record.record_class is not libxc.X86PvP2mFrames:
                self._copy(record)
        self._envelope.before(libxc.End)
        self._writer.record(libxc.End())

    def _pages(self) -> None:
        self._envelope.before(PageData)
        for pfns, types, offsets in self._index.batches():
            self._mover.add(types.astype(np.uint64) << np.uint64(TYPE_SHIFT) | pfns, offsets)
        self._mover.flush()

    def _libxl(self) -> None:
        if "libxl" not in self._target.layers:
            return
        enclosing = next((layer for layer in self._found.layers if layer.name == "libxl"), None)
        if enclosing is not None:
            self._writer.order = enclosing.order
        for record in self._found.records("libxl"):
            self._copy(record)
        self._writer.record(libxl.LibxlEnd())

    def _copy(self, record: KeptRecord) -> None:
        stays = self._envelope.before(record.record_class) if record.layer == "libxc" else True
        if stays and keeps(record.layer, record.code, self._target):
            self._writer.copy_range(self._source, record.offset, record.octets)

    def _tell(self, tell: Callable[[str], None]) -> None:
        for line in self._envelope.left_out():
            tell(line)
        if self._found.checkpoint:
            tell(f"this is the state at checkpoint {self._found.checkpoint}")
        if self._found.broken_off:
            tell(f"what follows that checkpoint is void: {self._found.broken_off}")
        if self._drops_zero:
            tell(f"{self._mover.dropped} pages without content are allocate-only now")
