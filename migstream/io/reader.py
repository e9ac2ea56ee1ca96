"""The reader: a stream as a sequence of layers and frames, understood but not judged.

Theory of operation. A stream is a nest: an xl file holds a libxl stream, whose LIBXC_CONTEXT record
announces a libxc image with headers of its own. `Stream.items` walks it and hands out, in the order of
the bytes,

* a `Layer` for each header found (xl, libxl, libxc),
* a `Frame` for each record, *before* its body is read,
* a `Trailer`, if anything follows the end of the outermost layer.

The consumer decides what happens to a body: decode it, read it into buffers, move it to a descriptor,
or nothing. What nobody consumed is skipped when the next item is asked for: a file is seeked over, a
pipe is drained.

Which layer the next record belongs to follows from the one before it, as a table says (`_NEXT`):
libxc's END hands back to libxl; so does CHECKPOINT, and libxl's CHECKPOINT_END hands to libxc again,
without new headers. Where the layer that should go on is not open, the present one stays.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

from migstream.errors import FormatError, RecordRef, StreamError, TruncatedError
from migstream.io.detect import layer_at, open_input
from migstream.io.inputs import Input, MemoryInput
from migstream.records import (
    MAX_RECORD_LENGTH,
    OPTIONAL,
    ByteOrder,
    Declaration,
    OpaqueRecord,
    PageData,
    Record,
    libxc,
    libxl,
    padding_length,
    record_class,
    record_name,
    xl,
)
from migstream.records.page_data import Entries, RunTemplates

__all__ = ["Frame", "Item", "Layer", "PageHead", "Payload", "Stream", "Trailer", "open", "open_memory"]

MAX_OPTIONAL_DATA = 1 << 20  # octets of config that an xl file may carry; real ones have a few KiB
EVERYTHING = 1 << 62  # more octets than any input has
MAX_LAYERS = 64  # headers in one input; a real stream has three layers, and each is remembered
ENTRIES_AT_ONCE = 1 << 16  # PAGE_DATA entries decoded at a time: 512 KiB, however long the record

D = TypeVar("D", bound=Declaration)

_HEADER = {"little": libxc.RecordHeader.struct("little"), "big": libxc.RecordHeader.struct("big")}
_HEADER_SIZE = libxc.RecordHeader.head_size
_PAGE_HEAD = PageData.head_size
_PAGE_STRUCT = {"little": PageData.struct("little"), "big": PageData.struct("big")}


@dataclass
class Layer:
    """One layer of a stream, as its headers announce it.

    ``name`` is ``xl``, ``libxl`` or ``libxc``; ``headers`` are the decoded headers in their order: an
    xl file's `SaveFileHeader` and `SaveFileConfig`, libxl's `LibxlHeader`, libxc's `ImageHeader` and
    `DomainHeader`.
    """

    name: str
    offset: int
    order: ByteOrder
    headers: tuple[Declaration, ...]

    def header(self, kind: type[D]) -> D | None:
        """Return the header of class ``kind``, if this layer has one."""
        return next((h for h in self.headers if isinstance(h, kind)), None)


class PageHead(NamedTuple):
    """What stands before the entries of PAGE_DATA: how many they are, and the reserved field."""

    entries: int
    reserved1: int


class Payload:
    """Octets of the stream that are consumed in sequence, or else skipped."""

    def __init__(self, stream: Stream, length: int | None) -> None:
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
        self, stream: Stream, layer: Layer, *, code: int, length: int, offset: int, index: int
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
        return bool(self.code & OPTIONAL)

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
                offset=self.offset + 4,
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


class Trailer(Payload):
    """What follows the end of the outermost layer, from ``offset`` to the end of the input."""

    def __init__(self, stream: Stream, offset: int) -> None:
        super().__init__(stream, stream.input.remaining)
        self.offset = offset


Item = Layer | Frame | Trailer

#: The layer of the record after one of these, by (layer, type code); after any other it stays.
#: libxc's own entries hold only where libxl encloses it.
_NEXT = {
    ("libxl", libxl.LibxcContext.code): "libxc header",
    ("libxl", libxl.CheckpointEnd.code): "libxc",
    ("libxl", libxl.LibxlEnd.code): "end",
    ("libxc", libxc.Checkpoint.code): "libxl",
    ("libxc", libxc.End.code): "libxl",
}


class Stream:
    """A migration stream being read. Iterating gives its frames and leaves the input behind the last one.

    `items` gives layers and trailer too, for which it looks at the octet behind the end, so on a
    descriptor it waits for that octet or for the end of input.

    ``layers`` grows as headers are met, ``checkpoints`` as they are completed; ``checkpoint_offset`` is
    where the last of them ends. After the last frame, ``ending`` says how the stream ended: ``end`` (an
    END record) or ``checkpoint`` (the input ended between two records behind a complete checkpoint, as
    it does when the sender of a checkpointed stream dies: what follows the checkpoint is void).
    """

    def __init__(self, source: Input) -> None:
        self.input = source
        self.layers: list[Layer] = []
        self.checkpoints = 0
        self.checkpoint_offset = 0
        self.run_templates = RunTemplates()  # for recognising PAGE_DATA's runs, frame after frame
        self.ending: str | None = None
        self._open: dict[str, Layer] = {}  # by name: the layers whose records may go on
        self._at_checkpoint = False
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
        if layer.name == "xl":
            layer = self._open_layer("xl")
            yield layer
        outermost = layer.name
        index = 0
        while True:
            frame = self._next_frame(layer, index)
            if frame is None:
                self.ending = "checkpoint"
                return
            layer = frame.layer
            yield frame
            frame.finish()
            index += 1
            step = self._step(frame, outermost)
            if step == "end":
                break
            if step == "libxc header":
                layer = self._open_layer("libxl")
                yield layer
            else:
                layer = self._open.get(step, layer)
        self.ending = "end"

    def _step(self, frame: Frame, outermost: str) -> str:
        """Return what follows ``frame``: a layer's name, ``libxc header`` or ``end``."""
        name, code = frame.layer.name, frame.code
        ends = name == "libxc" and code == libxc.End.code
        if ends:
            del self._open["libxc"]
        bare = outermost == "libxc"
        completes = ("libxc", libxc.Checkpoint.code) if bare else ("libxl", libxl.CheckpointEnd.code)
        if (name, code) == ("libxl", libxl.CheckpointState.code):
            return "libxc" if self._at_checkpoint else "libxl"
        # Without an image that goes on, a CHECKPOINT_END completes nothing.
        self._at_checkpoint = (name, code) == completes and "libxc" in self._open
        if self._at_checkpoint:
            self.checkpoints += 1
            self.checkpoint_offset = self.position
        if bare:
            return "end" if ends else "libxc"
        return _NEXT.get((name, code), name)

    def _next_frame(self, layer: Layer, index: int) -> Frame | None:
        offset = self.position
        head = self.input.read(_HEADER_SIZE)
        if len(head) < _HEADER_SIZE:
            if not head and self.checkpoints:
                return None
            raise self._cut(layer, offset, head)
        code, length = _HEADER[layer.order].unpack(head)
        if self._at_checkpoint and layer.name == "libxc":
            layer = self._colo_state(layer, code, length)
        return Frame(self, layer, code=code, length=length, offset=offset, index=index)

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

    # Headers

    def _open_layer(self, inside: str | None) -> Layer:
        offset = self.position
        name = layer_at(self.input, inside=inside)
        if inside is not None and name not in {"xl": ("libxl", "libxc"), "libxl": ("libxc",)}[inside]:
            raise FormatError(f"{name} cannot stand inside {inside}", offset=offset, layer=inside)
        if len(self.layers) == MAX_LAYERS:
            raise FormatError(
                f"{name} header number {MAX_LAYERS + 1}: a stream has at most one of each layer",
                offset=offset,
                layer=inside,
            )
        layer = {"xl": self._xl, "libxl": self._libxl, "libxc": self._libxc}[name](offset)
        self.layers.append(layer)
        self._open[name] = layer
        return layer

    def _header(self, kind: type[D], layer: str, order: ByteOrder) -> D:
        offset = self.position
        octets = self.input.read(kind.head_size)
        if len(octets) < kind.head_size:
            raise TruncatedError(
                f"the input ends inside the {kind.__name__}: expected {kind.head_size} octets, "
                f"found {len(octets)}",
                offset=offset + len(octets),
                layer=layer,
            )
        return kind.parse(octets, order)

    def _xl(self, offset: int) -> Layer:
        mark = self.input.peek(36)[32:]
        orders: tuple[ByteOrder, ...] = ("little", "big")
        matching = [o for o in orders if mark == xl.BYTE_ORDER_MARK.to_bytes(4, o)]
        if len(mark) == 4 and not matching:
            raise FormatError(
                f"expected the byte order mark 01020304 in either order, found {mark.hex()}",
                offset=offset + 32,
                layer="xl",
                field="byteorder",
            )
        order: ByteOrder = matching[0] if matching else "little"
        header = self._header(xl.SaveFileHeader, "xl", order)
        headers: tuple[Declaration, ...] = (header,)
        if header.optional_data_len:
            headers = (header, self._optional_data(offset, header, order))
        return Layer("xl", offset, order, headers)

    def _optional_data(self, offset: int, header: xl.SaveFileHeader, order: ByteOrder) -> xl.SaveFileConfig:
        length = header.optional_data_len
        if length > MAX_OPTIONAL_DATA:
            raise FormatError(
                f"the header announces {length} octets of optional data; more than {MAX_OPTIONAL_DATA} "
                "is no domain config",
                offset=offset + 44,
                layer="xl",
                field="optional_data_len",
            )
        start = self.position
        octets = self.input.read(length)
        if len(octets) < length:
            raise TruncatedError(
                f"the input ends inside the optional data: expected {length} octets, found {len(octets)}",
                offset=start + len(octets),
                layer="xl",
            )
        try:
            return xl.SaveFileConfig.parse(octets, order)
        except StreamError as exc:
            raise exc.located(base=start, layer="xl") from None

    def _libxl(self, offset: int) -> Layer:
        header = self._header(libxl.LibxlHeader, "libxl", "big")
        return Layer("libxl", offset, header.order, (header,))

    def _libxc(self, offset: int) -> Layer:
        image = self._header(libxc.ImageHeader, "libxc", "big")
        domain = self._header(libxc.DomainHeader, "libxc", image.order)
        return Layer("libxc", offset, image.order, (image, domain))


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
