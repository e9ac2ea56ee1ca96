"""Conversions in memory and of captures, for the tests of convert and of flatten."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import zstandard

from migstream.converting import TARGETS, Options, convert
from migstream.io import reader
from migstream.io.reader import Layer
from migstream.records import Record
from migstream.verification import verify
from migstream.verification.rules import Severity

from .build import DATA, SHARED


def converted(octets: bytes, to: str, notes: list[str] | None = None, **options: Any) -> bytes:
    """Return what a stream becomes; the notes for a person are appended to ``notes``."""
    tell = (lambda note: None) if notes is None else notes.append
    with tempfile.TemporaryFile() as out, reader.open_memory(octets) as stream:
        convert(stream, out.fileno(), TARGETS[to], Options(**options), tell=tell)
        out.seek(0)
        return out.read()


def findings(octets: bytes) -> list[str]:
    """Return the errors that verify finds."""
    with reader.open_memory(octets) as stream:
        return [str(found) for found in verify(stream).findings if found.rule.severity is Severity.ERROR]


def types(octets: bytes) -> list[str]:
    """Return the layers and record types of a stream in their order."""
    with reader.open_memory(octets) as stream:
        items = list(stream.items())
    return [item.name if isinstance(item, Layer) else getattr(item, "type_name", "trailer") for item in items]


def records(octets: bytes, kind: type[Record]) -> list[Record]:
    """Return the decoded records of a type."""
    with reader.open_memory(octets) as stream:
        return [frame.record() for frame in stream if frame.record_class is kind]


def captures() -> list[Path]:
    """Return the captures that come with the project, and those that lie beside it, if they do."""
    kept = {path.name: path for path in (SHARED / "streams").glob("*.xl.zst")}
    return [path for _, path in sorted((kept | {path.name: path for path in DATA.glob("*.xl.zst")}).items())]


def unpacked(capture: Path) -> bytes:
    """Return a capture's octets."""
    with capture.open("rb") as file:
        return zstandard.ZstdDecompressor().stream_reader(file).read()
