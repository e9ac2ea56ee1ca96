"""Frames: records as they are found, whose bodies wait to be consumed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

from migstream.errors import FormatError, RecordRef, StreamError, TruncatedError
from migstream.io.inputs import Input
from migstream.io.layers import Layer
from migstream.records import (
    MAX_RECORD_LENGTH,
    RECORD_ALIGNMENT,
    OpaqueRecord,
    PageData,
    Record,
    envelopes,
    is_optional,
    libxc,
    padding_length,
    record_class,
    record_name,
)
from migstream.records.page_data import Entries, RunTemplates

__all__ = ["Frame", "PageHead", "Payload", "Segment", "Trailer"]

EVERYTHING = 1 << 62  # more octets than any input has
ENTRIES_AT_ONCE = 1 << 16  # PAGE_DATA entries decoded at a time: 512 KiB, however long the record

_HEADER_SIZE = libxc.RecordHeader.head_size
_PAGE_HEAD = PageData.head_size
_PAGE_STRUCT = {"little": PageData.struct("little"), "big": PageData.struct("big")}


class Walk(Protocol):
    """What a frame needs of the stream that it stands in."""

    input: Input
    run_templates: RunTemplates

    @property
    def position(self) -> int:
        """Octets of the input that have been consumed."""

    @property
    def failover_hint(self) -> str | None:
        """What a restore would make of an input that ends here, where it would make something of it."""


class PageHead(NamedTuple):
    """What stands before the entries of PAGE_DATA: how many they are, and the reserved field."""

    entries: int
    reserved1: int


class Payload:
    """Octets of the stream that are consumed in sequence, or else skipped."""

    def __init__(self, stream: Walk, length: int | None) -> None:
        self._stream = stream
        self._left = length

    @property
    def left(self) -> int | None:
        """Octets not consumed yet; ``None`` for a trailer of unknown length."""
        return self._left

    def _place(self) -> tuple[str | None, RecordRef | None]:
        return None, None

    def _within(self, length: int) -> int:
        """Check that ``length`` octets are left, so that no consumer reads into the next record."""
        if length < 0 or (self._left is not None and length > self._left):
            raise ValueError(f"{length} octets asked for, {self._left} are left")
        return length

    def _taken(self, wanted: int | None, done: int) -> None:
        if self._left is not None:
            self._left -= done
        if wanted is not None and done < wanted:
            layer, record = self._place()
            raise TruncatedError(
                f"the input ends after {done} of the {wanted} octets that should follow here",
                offset=self._stream.position,
                layer=layer,
                record=record,
                hint=self._stream.failover_hint,
            )

    def read(self, length: int) -> bytes:
        """Read the next ``length`` octets; no more than are left may be asked for."""
        piece = self._stream.input.read(self._within(length))
        if self._left is not None and len(piece) == length:  # as nearly always: spare a call
            self._left -= length
        else:
            self._taken(None if self._left is None else length, len(piece))
        return piece

    def readv_into(self, buffers: Iterable[memoryview]) -> int:
        """Read straight into writable ``buffers``, in turn; return the octets read.

        Together they may be no longer than what is left. Raises `TruncatedError` at the end of input.
        """
        vectors = list(buffers)
        wanted = self._within(sum(view.nbytes for view in vectors))
        done = self._stream.input.readv_into(vectors)
        self._taken(None if self._left is None else wanted, done)
        return done

    def splice_to(self, target: int, length: int | None = None, *, timeout_s: float | None = None) -> int:
        """Move ``length`` octets (default: all that are left) to the descriptor ``target``, uncopied.

        ``timeout_s`` bounds each wait for ``target``; past it, `DeadlineError`.
        """
        wanted = self._left if length is None else self._within(length)
        done = self._stream.input.splice_to(target, EVERYTHING if wanted is None else wanted, timeout_s)
        self._taken(wanted, done)
        return done

    def skip(self, length: int | None = None) -> int:
        """Pass over ``length`` octets (default: all that are left); return how many."""
        wanted = self._left if length is None else self._within(length)
        if wanted == 0:
            return 0
        done = self._stream.input.skip(EVERYTHING if wanted is None else wanted)
        self._taken(wanted, done)
        return done


class Frame(Payload):
    """One record as it was found: its place, type and length. Its body waits to be consumed.

    ``offset`` is that of the record header, ``length`` the body's without padding, ``index`` the number
    of the record in the whole stream, from 0. ``padding`` is known once the frame is finished.
    """

    def __init__(
        self, stream: Walk, layer: Layer, *, code: int, length: int, offset: int, index: int
    ) -> None:
        super().__init__(stream, length)
        self.layer = layer
        self.code = code
        self.length = length
        self.offset = offset
        self.index = index
        self.padding = b""
        self._decoded: Record | StreamError | None = None

    def __repr__(self) -> str:
        return (
            f"<Frame {self.index} {self.layer.name} {self.type_name} at {self.offset}, {self.length} octets>"
        )

    @property
    def type_name(self) -> str:
        """The type's name, such as ``PAGE_DATA``."""
        return record_name(self.layer.name, self.code)

    @property
    def record_class(self) -> type[Record] | None:
        """The type's declaration, or ``None`` for a type that is not known."""
        return record_class(self.layer.name, self.code)

    @property
    def optional(self) -> bool:
        """Whether a reader that does not know the type may ignore it."""
        return is_optional(self.layer.name, self.code)

    @property
    def body_offset(self) -> int:
        """Where the body starts."""
        return self.offset + _HEADER_SIZE

    @property
    def ref(self) -> RecordRef:
        """The record's number and type, for errors and findings."""
        return RecordRef(self.index, self.type_name)

    @property
    def is_page_data(self) -> bool:
        """Whether this is libxc's PAGE_DATA."""
        return self.code == PageData.code and self.layer.name == PageData.layer

    def _place(self) -> tuple[str | None, RecordRef | None]:
        return self.layer.name, self.ref

    def body(self) -> bytes:
        """Read what is left of the body. Raises `FormatError` beyond 128 MiB, Xen's own limit."""
        left = self._left or 0
        self._refuse_beyond_limit(left)
        return self.read(left)

    def _refuse_beyond_limit(self, octets: int) -> None:
        if octets > MAX_RECORD_LENGTH:
            raise FormatError(
                f"a body of {octets} octets is not read into memory: the limit is {MAX_RECORD_LENGTH}",
                offset=(self.offset + self.body_offset) // 2,  # the header's second half
                layer=self.layer.name,
                record=self.ref,
                field="length",
            )

    def record(self) -> Record:
        """Decode the body (of PAGE_DATA, all but the pages). May be called again.

        Raises `FormatError` with the field where the body does not fit the declaration,
        `TruncatedError` at the end of input, and `ValueError` when part of the body was read otherwise.
        """
        if self._decoded is None:
            self._check_unread()
            try:
                self._decoded = self._decode()
            except StreamError as exc:
                self._decoded = self._located(exc)
        if isinstance(self._decoded, StreamError):
            raise self._decoded
        return self._decoded

    def _check_unread(self) -> None:
        if self._left != self.length:
            raise ValueError(f"{self!r} is decoded from its start, but part of it was consumed")

    def _located(self, exc: StreamError) -> StreamError:
        """Turn an offset within the body, as declarations give it, into one of the stream."""
        if exc.record is None:
            exc.located(base=self.body_offset, layer=self.layer.name, record=self.ref)
        return exc

    def _decode(self) -> Record:
        declared = self.record_class
        if declared is None:
            return OpaqueRecord.of(self.layer.name, self.code, self.body())
        if declared is PageData:
            head = self._page_head()
            count, _ = self._page_fields(head)
            self._refuse_beyond_limit(8 * count)
            return PageData.parse(head + self.read(8 * count), self.layer.order)
        return declared.parse(self.body(), self.layer.order)

    def _page_head(self) -> bytes:
        return self.read(min(_PAGE_HEAD, self.length))

    def _page_fields(self, head: bytes) -> tuple[int, int]:
        """Return count and reserved1 of PAGE_DATA; the count fits the body."""
        if len(head) < _PAGE_HEAD:
            PageData.parse(head, self.layer.order)  # raises, and says which field is cut
        count, reserved1 = _PAGE_STRUCT[self.layer.order].unpack(head)
        if 8 * count > self.length - _PAGE_HEAD:
            raise FormatError(
                f"count is {count}, which needs {8 * count} octets of entries; "
                f"the body has {self.length - _PAGE_HEAD} left",
                offset=0,
                field="count",
            )
        return count, reserved1

    def page_head(self) -> PageHead:
        """Read PAGE_DATA's head: how many entries follow, and the reserved field.

        Then `entries` reads the entries, and what is left of the body are the pages. Raises as `record`.
        """
        self._check_unread()
        try:
            return PageHead(*self._page_fields(self._page_head()))
        except StreamError as exc:
            raise self._located(exc) from None

    def entries(self, count: int, at_once: int = ENTRIES_AT_ONCE) -> Iterator[Entries]:
        """Read ``count`` entries of PAGE_DATA, ``at_once`` at a time; comes after `page_head`."""
        order = self.layer.order
        for start in range(0, count, at_once):
            piece = min(count - start, at_once)
            yield Entries(self.read(8 * piece), order, self._stream.run_templates)

    def finish(self) -> None:
        """Skip what is left of the body and read the padding. Done by the stream's next step anyway."""
        if self._left:
            self.skip()
        if not self.length & RECORD_ALIGNMENT - 1:  # as nearly always
            return
        missing = padding_length(self.length) - len(self.padding)
        if missing:
            piece = self._stream.input.read(missing)
            self.padding += piece
            if len(piece) < missing:
                raise TruncatedError(
                    "the input ends inside the record's padding",
                    offset=self._stream.position,
                    layer=self.layer.name,
                    record=self.ref,
                    hint=self._stream.failover_hint,
                )


class Segment(Frame):
    """A segment of xapi's suspend image, which has a header of its own and no padding.

    ``announced`` is the length that its header says; ``length`` that of the body which is consumed as the
    frame's, 0 where the segment is a stream: layers and frames of that follow.
    """

    announced = 0

    @property
    def body_offset(self) -> int:
        """Where the body starts."""
        return self.offset + envelopes.SegmentHeader.head_size

    def finish(self) -> None:
        """Skip what is left of the body."""
        self.skip()


class Trailer(Payload):
    """What follows the end of the outermost layer, from ``offset`` to the end of the input."""

    def __init__(self, stream: Walk, offset: int) -> None:
        super().__init__(stream, stream.input.remaining)
        self.offset = offset
