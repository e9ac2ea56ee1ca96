"""A JSON document as `json_target` writes it, made the stream that it describes."""

from __future__ import annotations

import base64
import binascii
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from migstream.converting.json_target import FORMAT, VERSION
from migstream.converting.options import ConvertError
from migstream.io import fd as fdio
from migstream.io.inputs import FileInput, Input
from migstream.io.reader import Stream
from migstream.io.writer import StreamWriter
from migstream.records import (
    MAX_RECORD_LENGTH,
    ByteOrder,
    Declaration,
    PageData,
    array_of,
    envelopes,
    libxc,
    libxl,
    padding_length,
    record_class,
    xl,
)
from migstream.records.page_types import TYPE_SHIFT

__all__ = ["from_json", "is_json"]

MAX_DOCUMENT = 1 << 30  # octets; with its pages beside it, a guest of 1 TiB has a document of some 100 MiB
MAX_ENTRIES = MAX_RECORD_LENGTH // 8

_HEADERS: dict[str, type[Declaration]] = {
    kind.__name__: kind
    for kind in (
        xl.SaveFileHeader,
        xl.SaveFileConfig,
        envelopes.LibvirtHeader,
        envelopes.LibvirtXml,
        envelopes.XapiHeader,
        libxl.LibxlHeader,
        libxc.ImageHeader,
        libxc.DomainHeader,
    )
}
_ORDERS: dict[object, ByteOrder] = {"little": "little", "big": "big"}

Json = dict[str, object]


def is_json(source: Input) -> bool:
    """Whether the input starts like a JSON document; nothing of it is consumed."""
    return source.peek(1) == b"{"


@contextmanager
def from_json(source: Input, beside: Path) -> Iterator[Stream]:
    """Give the stream that a JSON document describes, in a temporary file; ``beside``: where its pages are.

    Raises `ConvertError` with the number of the item that is wrong, and `OSError`.
    """
    with ExitStack() as stack:
        spool = stack.enter_context(tempfile.TemporaryFile())
        document = _parsed(source)
        pages = _open_bulk(document.get("bulk"), beside, stack)
        items = document.get("items")
        if not isinstance(items, list):
            raise ConvertError("the document has no list of items")
        build = _Builder(StreamWriter(spool.fileno()), pages)
        for number, item in enumerate(items):
            try:
                build.item(item)
            except (ValueError, KeyError, TypeError, OverflowError) as exc:
                what = f"{exc} is missing" if isinstance(exc, KeyError) else str(exc)
                raise ConvertError(f"item {number} of the document: {what}") from None
        spool.seek(0)
        yield Stream(FileInput(spool.fileno(), owned=False))


def _parsed(source: Input) -> Json:
    octets = source.read(MAX_DOCUMENT + 1)
    if len(octets) > MAX_DOCUMENT:
        raise ConvertError(f"the document has more than {MAX_DOCUMENT} octets; its pages belong beside it")
    try:
        document = json.loads(octets)
    except (ValueError, RecursionError) as exc:
        raise ConvertError(f"the input looks like JSON, but is not: {exc}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ConvertError(f'the input is JSON, but has no "format": "{FORMAT}"')
    if document.get("version") != VERSION:
        raise ConvertError(f"the document's version is {document.get('version')!r}; expected {VERSION}")
    return document


def _open_bulk(name: object, beside: Path, stack: ExitStack) -> FileInput | None:
    """Open the file with the pages, which has to lie beside the document."""
    if name is None:
        return None
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ConvertError(f"bulk is {name!r}; expected the name of a file beside the document")
    file = stack.enter_context((beside / name).open("rb"))
    if fdio.file_size(file.fileno()) is None:
        raise ConvertError(f"bulk is {name!r}, which is no regular file")
    return FileInput(os.dup(file.fileno()), owned=True)


class _Builder:
    def __init__(self, writer: StreamWriter, pages: FileInput | None) -> None:
        self._writer = writer
        self._pages = pages
        self._orders: dict[str, ByteOrder] = {}

    def item(self, item: object) -> None:
        """Write one item. Raises `ValueError`, `KeyError` and the like for what is none."""
        if not isinstance(item, dict):
            raise TypeError(f"expected an object, found {item!r}")
        if "trailer" in item:
            self._write_payload(self._payload(item["trailer"]))
        elif "headers" in item:
            self._layer(item)
        else:
            self._record(item)

    def _layer(self, item: Json) -> None:
        order = _ORDERS[item["order"]]
        self._orders[str(item["layer"])] = self._writer.order = order
        headers = item["headers"]
        if not isinstance(headers, list):
            raise TypeError("headers are no list")
        self._writer.header(*(_HEADERS[header["kind"]].from_json(header) for header in headers))

    def _record(self, item: Json) -> None:
        layer, code = str(item["layer"]), item["code"]
        if layer not in self._orders or not isinstance(code, int):
            raise ValueError(f"layer {layer!r} has no headers yet, or code {code!r} is none")
        order = self._writer.order = self._orders[layer]
        declared = record_class(layer, code)
        prefix, payload = b"", None
        if "runs" in item:
            prefix = _entries(item, order)
            payload = self._payload(item["pages"])
        elif "body" in item:
            payload = self._payload(item["body"])
        elif declared is not None and isinstance(item["fields"], dict):
            prefix = declared.from_json(item["fields"]).build(order)
        else:
            raise ValueError("a record of an unknown type has a body, not fields")
        length = len(prefix) + (payload.octets if payload else 0)
        self._head(item, layer, code, length)
        self._writer.write(prefix)
        if payload is not None:
            self._write_payload(payload)
        if layer != "xapi":
            self._writer.write(_padding(item, length))

    def _head(self, item: Json, layer: str, code: int, length: int) -> None:
        if layer == "xapi":
            announced = item["announced"]
            if not isinstance(announced, int):
                raise TypeError("announced is no number")
            self._writer.write(envelopes.SegmentHeader(type=code, length=announced).build("little"))
        else:
            self._writer.write(libxc.RecordHeader(type=code, length=length).build(self._writer.order))

    def _payload(self, described: object) -> _Payload:
        if not isinstance(described, dict):
            raise TypeError(f"expected bulk as an object, found {described!r}")
        if "hex" in described:
            return _Payload.inline(bytes.fromhex(described["hex"]))
        if "base64" in described:
            try:
                return _Payload.inline(base64.b64decode(described["base64"], validate=True))
            except binascii.Error as exc:
                raise ValueError(f"base64: {exc}") from None
        offset, octets = described["offset"], described["octets"]
        if not isinstance(offset, int) or not isinstance(octets, int) or offset < 0 or octets < 0:
            raise ValueError(f"offset {offset!r} and octets {octets!r} are no place")
        if self._pages is None or offset + octets > (self._pages.size or 0):
            raise ValueError(f"the {octets} octets at {offset} are not in the file beside the document")
        return _Payload(octets, offset=offset)

    def _write_payload(self, payload: _Payload) -> None:
        if payload.offset is None:
            self._writer.write(payload.content)
        else:
            assert self._pages is not None
            self._writer.copy_range(self._pages, payload.offset, payload.octets)


class _Payload:
    """Octets of a body: in the document, or at an offset of the file beside it."""

    def __init__(self, octets: int, *, offset: int | None = None, content: bytes = b"") -> None:
        self.octets = octets
        self.offset = offset
        self.content = content

    @classmethod
    def inline(cls, content: bytes) -> _Payload:
        return cls(len(content), content=content)


def _entries(item: Json, order: ByteOrder) -> bytes:
    """Return PAGE_DATA's head and entries."""
    import numpy as np

    runs = item["runs"]
    if not isinstance(runs, list):
        raise TypeError("runs are no list")
    pieces, total = [np.empty(0, np.uint64)], 0
    for run in runs:
        pfn, count, type, reserved = (*run, 0)[:4]
        total += count
        if not 0 < count <= MAX_ENTRIES - (total - count):
            raise ValueError(f"a run of {count} PFNs makes the record longer than a record may be")
        first = type << TYPE_SHIFT | reserved << 52 | pfn
        if not (0 <= pfn < 1 << 52 and 0 <= type < 16 and 0 <= reserved < 256 and first + count <= 1 << 64):
            raise ValueError(f"{run!r} is no run: [first PFN, count, type], reserved bits")
        pieces.append(np.uint64(first) + np.arange(count, dtype=np.uint64))
    reserved1 = item.get("reserved1", 0)
    if not isinstance(reserved1, int):
        raise TypeError("reserved1 is no number")
    return PageData(entries=array_of(8, np.concatenate(pieces)), reserved1=reserved1).build(order)


def _padding(item: Json, length: int) -> bytes:
    padding = bytes.fromhex(str(item.get("padding", ""))) or bytes(padding_length(length))
    if len(padding) != padding_length(length):
        raise ValueError(f"{len(padding)} octets of padding behind a body of {length}")
    return padding
