"""The writer: headers, records and page batches onto a descriptor, byte for byte as specified.

Small pieces are built from their declarations; pages are handed to the kernel where they lie, by
writev, and what another stream's frame still holds is moved without passing through Python.
"""

from __future__ import annotations

from collections.abc import Sequence

from migstream.errors import TruncatedError
from migstream.io import fd as fdio
from migstream.io.inputs import FileInput
from migstream.io.reader import Frame, Layer, Segment, Stream, Trailer
from migstream.records import (
    ByteOrder,
    Declaration,
    PageData,
    Record,
    envelopes,
    libxc,
    libxl,
    padding_length,
)
from migstream.records.array import Array

__all__ = ["StreamWriter", "copy_stream"]

Buffer = bytes | bytearray | memoryview

_BIG_ENDIAN = libxc.ImageHeader | libxl.LibxlHeader | envelopes.XendHeader  # in every stream


class StreamWriter:
    """Writes a stream to the descriptor ``fd``, which stays the caller's.

    ``order`` is the byte order of domain header and records. ``timeout_s`` bounds each wait for a
    reader that does not read; past it, `DeadlineError`. A reader that is gone: `BrokenPipeError`.
    """

    def __init__(self, fd: int, *, order: ByteOrder = "little", timeout_s: float | None = None) -> None:
        self.fd = fd
        self.order = order
        self.timeout_s = timeout_s
        self.written = 0
        fdio.widen_pipe(fd)

    def write(self, *buffers: Buffer) -> None:
        """Write octets as they are, gathered by one writev."""
        self.written += fdio.write_vectors(self.fd, buffers, self.timeout_s)

    def header(self, *headers: Declaration) -> None:
        """Write headers. Libxl's, libxc's image header and xend's are big-endian in every stream."""
        self.write(*(h.build("big" if isinstance(h, _BIG_ENDIAN) else self.order) for h in headers))

    def record(self, record: Record, *, padding: bytes | None = None) -> None:
        """Write one record with its header. ``padding`` replaces the zeros that the format asks for.

        Of xapi's segments, which have none, the length 0 is written where xapi does not measure the body.
        """
        body = record.build(self.order)
        if record.layer == "xapi":
            self.write(self._segment(record.type_code, len(body)), body)
            return
        self.write(self._frame(record.type_code, len(body)), body, self._padding(len(body), padding))

    def pages(self, entries: Array[int], pages: Sequence[Buffer], *, reserved1: int = 0) -> None:
        """Write one PAGE_DATA record.

        ``entries`` are u64[n], type and PFN as the record has them; ``pages`` together are the page of
        each entry whose type has data, in order, as many buffers as it takes: contiguous pages in one
        buffer cost one vector. They are not copied.
        """
        head = PageData.struct(self.order).pack(len(entries), reserved1)
        octets = entries.in_order(self.order)
        length = len(head) + len(octets) + sum(memoryview(page).nbytes for page in pages)
        self.write(self._frame(PageData.code, length) + head, octets, *pages, self._padding(length, None))

    def copy(self, frame: Frame) -> None:
        """Write another stream's frame, of the same byte order, as it is, moved within the kernel.

        Nothing of its body may have been consumed; its padding is kept.
        """
        if frame.left != frame.length or frame.layer.order != self.order:
            raise ValueError(f"{frame!r} was consumed already, or is of the other byte order")
        self.write(self._head(frame))
        self._splice_rest(frame)

    def rebuild(self, frame: Frame) -> None:
        """Write another stream's frame from its decoded fields; only pages are moved as they are.

        Raises `FormatError` for a body that does not fit its declaration.
        """
        record = frame.record()
        prefix = record.build(self.order)
        self.write(self._head(frame), prefix)
        self._splice_rest(frame)

    def copy_range(self, source: FileInput, offset: int, length: int) -> None:
        """Write ``length`` octets that lie at ``offset`` of a file, moved within the kernel.

        Raises `TruncatedError` where the file ends before.
        """
        moved = source.splice_at(self.fd, offset, length, self.timeout_s)
        self.written += moved
        if moved < length:
            raise TruncatedError(
                f"the input ends after {moved} of the {length} octets that should follow here",
                offset=offset + moved,
            )

    def _splice_rest(self, frame: Frame) -> None:
        self.written += frame.splice_to(self.fd, timeout_s=self.timeout_s)
        frame.finish()
        self.write(frame.padding)

    def end(self) -> None:
        """Write libxc's or libxl's END record; they are the same octets."""
        self.record(libxc.End())

    def _head(self, frame: Frame) -> bytes:
        if isinstance(frame, Segment):
            return self._segment(frame.code, frame.announced)
        return self._frame(frame.code, frame.length)

    def _segment(self, code: int, length: int) -> bytes:
        return envelopes.SegmentHeader(type=code, length=length).build("little")

    def _frame(self, code: int, length: int) -> bytes:
        return libxc.RecordHeader.struct(self.order).pack(code, length)

    def _padding(self, length: int, given: bytes | None) -> bytes:
        return bytes(padding_length(length)) if given is None else given


def copy_stream(stream: Stream, writer: StreamWriter, *, rebuild: bool = False) -> None:
    """Write a whole stream again, octet for octet, with whatever follows its end.

    With ``rebuild`` every header and record is decoded and built anew, which proves the declarations
    lossless; without, bodies pass as they are.
    """
    for item in stream.items():
        match item:
            case Layer():
                writer.order = item.order
                writer.header(*item.headers)
            case Frame():
                writer.order = item.layer.order  # a libxl stream may hold an image of the other order
                write = writer.rebuild if rebuild else writer.copy
                write(item)
            case Trailer():
                writer.written += item.splice_to(writer.fd, timeout_s=writer.timeout_s)
