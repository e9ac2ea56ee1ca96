"""A stream as a JSON document, and nothing of it lost: headers, records, and where their pages are.

::

    {"format": "migstream", "version": 1, "bulk": "guest.json.pages", "items": [
    {"layer": "libxc", "order": "little", "headers": [{"kind": "ImageHeader", ...}, ...]},
    {"layer": "libxc", "record": "PAGE_DATA", "code": 1, "runs": [[0, 1024, 0]], "pages": {"offset": 0, ...}},
    {"layer": "libxc", "record": "END", "code": 0, "fields": {}},
    {"trailer": {"offset": 4194304, "octets": 44}}
    ]}

``fields`` are those of `Record.to_json`; a body that they do not give back octet for octet stands there as
``body``. Pages, large bodies and the trailer are *bulk*: ``{"offset", "octets"}`` in a file beside the
document, or ``{"base64"}`` in it. A run is [first PFN, count, type], and the reserved bits where set.
"""

from __future__ import annotations

import base64
import json
from itertools import chain
from typing import NamedTuple

from migstream.errors import FormatError
from migstream.io.frame import Frame, Segment, Trailer
from migstream.io.layers import Layer
from migstream.io.reader import Stream
from migstream.io.writer import StreamWriter
from migstream.records import Declaration
from migstream.records.page_types import PFN_MASK, TYPE_SHIFT

__all__ = ["FORMAT", "VERSION", "Bulk", "write_json"]

FORMAT, VERSION = "migstream", 1
LARGE = 64 << 10  # octets from which on a body is bulk

Json = dict[str, object]


class Bulk(NamedTuple):
    """Where pages go: a descriptor, and the file name that the document calls it by."""

    fd: int
    name: str


def write_json(stream: Stream, fd: int, bulk: Bulk | None) -> None:
    """Write ``stream``, of which nothing was read yet, as JSON to ``fd``; pages to ``bulk`` or into it.

    Raises `StreamError` for a damaged stream, `OSError` and `DeadlineError`.
    """
    writer = StreamWriter(fd)
    document = {"format": FORMAT, "version": VERSION, "bulk": bulk.name if bulk else None}
    writer.write(json.dumps(document)[:-1].encode() + b', "items": [')
    items = _Items(bulk)
    separator = b"\n"
    for item in stream.items():
        match item:
            case Layer():
                described = _layer(item)
            case Frame():
                described = items.frame(item)
            case Trailer():
                described = {"trailer": items.trailer(item)}
        writer.write(separator, json.dumps(described).encode())
        separator = b",\n"
    writer.write(b"\n]}\n")


def _layer(layer: Layer) -> Json:
    headers = [{"kind": type(header).__name__, **header.to_json()} for header in layer.headers]
    return {"layer": layer.name, "order": layer.order, "headers": headers}


class _Items:
    def __init__(self, bulk: Bulk | None) -> None:
        self._bulk = bulk
        self._moved = 0

    def frame(self, frame: Frame) -> Json:
        described: Json = {"layer": frame.layer.name, "record": frame.type_name, "code": frame.code}
        if isinstance(frame, Segment):
            described["announced"] = frame.announced
        if frame.is_page_data:
            described |= self._pages(frame)
        elif frame.length >= LARGE:
            described["body"] = self._payload(frame)
        else:
            described |= _body(frame)
        frame.finish()
        if any(frame.padding):
            described["padding"] = frame.padding.hex()
        return described

    def _pages(self, frame: Frame) -> Json:
        head = frame.page_head()
        blocks = (_runs(block.raw, block.order) for block in frame.entries(head.entries))
        runs = list(chain.from_iterable(blocks))
        described: Json = {"reserved1": head.reserved1} if head.reserved1 else {}
        return described | {"runs": runs, "pages": self._payload(frame)}

    def _payload(self, frame: Frame) -> Json:
        octets = frame.left or 0
        if self._bulk is None:
            return {"base64": base64.b64encode(frame.body()).decode()}
        described: Json = {"offset": self._moved, "octets": octets}
        self._moved += frame.splice_to(self._bulk.fd)
        return described

    def trailer(self, trailer: Trailer) -> Json:
        if self._bulk is None:
            return {"base64": base64.b64encode(_rest(trailer)).decode()}
        octets = trailer.splice_to(self._bulk.fd)
        described: Json = {"offset": self._moved, "octets": octets}
        self._moved += octets
        return described


def _rest(trailer: Trailer) -> bytes:
    pieces = []
    while piece := trailer.read(LARGE if trailer.left is None else min(LARGE, trailer.left)):
        pieces.append(piece)
    return b"".join(pieces)


def _body(frame: Frame) -> Json:
    """Return a small body's fields, or its octets where the fields do not give them back."""
    octets = frame.body()
    declared = frame.record_class
    if declared is not None:
        fields = _fields(declared, octets, frame)
        if fields is not None:
            return {"fields": fields}
    return {"body": {"hex": octets.hex()}}


def _fields(declared: type[Declaration], octets: bytes, frame: Frame) -> Json | None:
    try:
        fields = declared.parse(octets, frame.layer.order).to_json()
        same = declared.from_json(fields).build(frame.layer.order) == octets
    except (FormatError, ValueError):
        return None
    return fields if same else None


def _runs(raw: bytes | memoryview, order: str) -> list[list[int]]:
    """Return entries as runs of consecutive PFNs of one type."""
    import numpy as np

    words = np.frombuffer(raw, "<u8" if order == "little" else ">u8").astype(np.uint64)
    if not len(words):
        return []
    starts = np.concatenate([[0], np.flatnonzero(np.diff(words) != 1) + 1])
    counts = np.diff(np.concatenate([starts, [len(words)]]))
    runs = []
    for word, count in zip(words[starts].tolist(), counts.tolist(), strict=True):
        run = [word & PFN_MASK, count, word >> TYPE_SHIFT]
        reserved = word >> 52 & 0xFF
        runs.append([*run, reserved] if reserved else run)
    return runs
