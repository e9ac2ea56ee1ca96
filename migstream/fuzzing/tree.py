"""A stream as a list of nodes that can be edited, and built back to octets.

The nodes are in the order of the bytes: headers, records (of libxc and libxl) and segments (of xapi), and raw
octets where nothing can be framed. They keep what they were parsed from, lies included, so that whatever
is parsed builds to the same octets again. Lengths and padding are made to fit by a record's `with_body` and
a header's `with_content`; `dataclasses.replace` keeps the old ones on purpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from migstream.errors import StreamError
from migstream.fuzzing.legacy import cut_legacy
from migstream.io import reader
from migstream.io.frame import Frame, Segment, Trailer
from migstream.io.layers import Layer
from migstream.records import (
    ByteOrder,
    Declaration,
    envelopes,
    libxc,
    libxl,
    padding_length,
    record_class,
    record_name,
    xl,
)
from migstream.records.fields import ORDER_CHAR

__all__ = ["Header", "Node", "Raw", "Record", "Tree"]

#: The field that says how long the content behind a header is.
_MEASURED_BY: dict[type[Declaration], str] = {
    xl.SaveFileHeader: "optional_data_len",
    envelopes.LibvirtHeader: "xml_len",
    envelopes.XendHeader: "config_len",
}
_ALWAYS_BIG = (libxc.ImageHeader, libxl.LibxlHeader)  # whatever the byte order of what follows them
_HEADS = {
    (layer, order): declared.struct(order)
    for layer, declared in (
        ("libxc", libxc.RecordHeader),
        ("libxl", libxc.RecordHeader),
        ("xapi", envelopes.SegmentHeader),
    )
    for order in ORDER_CHAR
}


@dataclass(frozen=True, slots=True)
class Header:
    """One header: ``body`` is what ``declared`` says, ``content`` the config behind an envelope's."""

    layer: str
    order: ByteOrder
    declared: type[Declaration]
    body: bytes
    content: bytes = b""

    @property
    def label(self) -> str:
        """The layer and the header's name, such as ``libxc ImageHeader``."""
        return f"{self.layer} {self.declared.__name__}"

    def with_body(self, body: bytes) -> Self:
        """Return the header with another body."""
        return replace(self, body=body)

    def with_content(self, content: bytes) -> Self:
        """Return the header with other content, and the length in it that fits."""
        measured = _MEASURED_BY[self.declared]
        at = self.declared.offset_of(measured)
        length = len(content).to_bytes(4, self.order)
        return replace(self, body=self.body[:at] + length + self.body[at + 4 :], content=content)

    def build(self) -> bytes:
        """Return the octets."""
        return self.body + self.content


@dataclass(frozen=True, slots=True)
class Record:
    """A record of libxc or libxl, or a segment of xapi, which has no padding.

    ``length`` and ``padding`` are as they stand in the stream, whether they fit ``body`` or not.
    """

    layer: str
    order: ByteOrder
    code: int
    length: int
    body: bytes
    padding: bytes = b""

    @classmethod
    def of(cls, layer: str, code: int, body: bytes = b"", order: ByteOrder = "little") -> Self:
        """Make a record whose length and padding fit."""
        return cls(layer, order, code, 0, b"").with_body(body)

    @property
    def label(self) -> str:
        """The layer and the type's name, such as ``libxc PAGE_DATA``."""
        return f"{self.layer} {record_name(self.layer, self.code)}"

    @property
    def declared(self) -> type[Declaration] | None:
        """The declaration of the type, ``None`` for one that is not known."""
        return record_class(self.layer, self.code)

    def with_body(self, body: bytes) -> Self:
        """Return the record with another body, and the length and padding that fit."""
        padding = b"" if self.layer == "xapi" else bytes(padding_length(len(body)))
        return type(self)(self.layer, self.order, self.code, len(body), body, padding)

    def build(self) -> bytes:
        """Return the octets."""
        return _HEADS[self.layer, self.order].pack(self.code, self.length) + self.body + self.padding


@dataclass(frozen=True, slots=True)
class Raw:
    """Octets without a structure that is known here, and what they are: ``label``."""

    label: str
    body: bytes
    layer: str = "raw"
    order: ByteOrder = "little"
    declared: type[Declaration] | None = None

    def with_body(self, body: bytes) -> Self:
        """Return other octets under the same name."""
        return replace(self, body=body)

    def build(self) -> bytes:
        """Return the octets."""
        return self.body


Node = Header | Record | Raw


@dataclass(slots=True)
class Tree:
    """A stream's nodes. The list is there to be edited; the nodes are immutable, and may be shared."""

    nodes: list[Node] = field(default_factory=list)

    @classmethod
    def parse(cls, octets: bytes) -> Self:
        """Take any octets apart; ``Tree.parse(octets).build() == octets`` always. Raises nothing.

        What the reader can frame becomes headers and records, a legacy stream its chunks, the rest raw.
        """
        octets = bytes(octets)
        stream = reader.open_memory(octets)
        nodes: list[Node] = []
        end = 0
        label = "raw trailer"
        try:
            for item in stream.items():
                if isinstance(item, Trailer):
                    break
                added = _record(octets, item) if isinstance(item, Frame) else _headers(octets, item, stream)
                nodes += added
                end += sum(len(node.build()) for node in added)
        except StreamError:
            label = "raw unframed"
        if stream.legacy:
            for label, length in cut_legacy(octets[end:]):
                nodes.append(Raw(label, octets[end : end + length]))
                end += length
        elif end < len(octets):
            nodes.append(Raw(label, octets[end:]))
        return cls(nodes)

    def build(self) -> bytes:
        """Return the stream's octets."""
        return b"".join([node.build() for node in self.nodes])

    def copy(self) -> Self:
        """Return a tree of the same nodes with a list of its own."""
        return type(self)(self.nodes.copy())

    def labels(self) -> Sequence[str]:
        """Return the nodes' labels, in order."""
        return [node.label for node in self.nodes]


def _headers(octets: bytes, layer: Layer, stream: reader.Stream) -> list[Node]:
    """Return a layer's headers; the last takes the content up to where the stream stands now."""
    found: list[Node] = []
    at = layer.offset
    fixed = [type(h) for h in layer.headers if not any(wire.variable for wire in h.wire_fields)]
    for declared in fixed:
        body = octets[at : at + declared.head_size]
        at += len(body)
        order: ByteOrder = "big" if declared in _ALWAYS_BIG else layer.order
        content = octets[at : stream.position] if declared is fixed[-1] else b""
        found.append(Header(layer.name, order, declared, body, content))
    return found


def _record(octets: bytes, frame: Frame) -> list[Node]:
    """Return a frame's record; its body and padding are cut where the input ends."""
    start, layer = frame.body_offset, frame.layer
    body = octets[start : start + frame.length]
    announced = frame.announced if isinstance(frame, Segment) else frame.length
    padding = 0 if layer.name == "xapi" else padding_length(frame.length)
    end = start + len(body)
    return [Record(layer.name, layer.order, frame.code, announced, body, octets[end : end + padding])]
