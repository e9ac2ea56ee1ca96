"""A legacy stream that was converted: its report, records and pages, for the tests to look at."""

from __future__ import annotations

import tempfile
from typing import Any, TypeVar

from migstream.io import reader
from migstream.io.inputs import Input, MemoryInput
from migstream.io.writer import StreamWriter
from migstream.legacy import LegacyReport, convert_legacy
from migstream.records import PageData, Record, libxc
from migstream.records.hvm_params import HvmParam
from migstream.records.page_types import PageType
from migstream.verification import verify

R = TypeVar("R", bound=Record)

#: What verify says of every converted stream: that it was converted, and that policies are not there.
NOTES = {"domain-converted", "libxl-converted", "static-data-missing"}


class Converted:
    """A converted stream, whose octets are in memory."""

    def __init__(self, octets: bytes, report: LegacyReport) -> None:
        self.octets = octets
        self.report = report
        self.records: list[Record] = []
        self.history: list[tuple[int, int, bytes]] = []  # PFN, type, content, in the order of the stream
        with reader.open_memory(octets) as stream:
            for frame in stream:
                record = frame.record()
                self.records.append(record)
                if isinstance(record, PageData):
                    for pfn, type in zip(record.pfns.tolist(), record.types.tolist(), strict=True):
                        self.history.append((pfn, type, frame.read(4096) if PageType(type).has_data else b""))

    @property
    def pages(self) -> dict[int, tuple[int, bytes]]:
        """Type and content of each PFN, as a restore is left with them."""
        return {pfn: (type, content) for pfn, type, content in self.history}

    @property
    def params(self) -> dict[str, int]:
        """The HVM parameters by name."""
        return {HvmParam(p.index).name: p.value for p in self.one(libxc.HvmParams).params}

    @property
    def types(self) -> list[str]:
        """The records' types, in order."""
        return [record.type for record in self.records]

    def all(self, kind: type[R]) -> list[R]:
        """Return all records of a class."""
        return [record for record in self.records if isinstance(record, kind)]

    def one(self, kind: type[R]) -> R:
        """Return the only record of a class."""
        (record,) = self.all(kind)
        return record


def convert(legacy: bytes | Input, *, allowed: frozenset[str] = frozenset(), **options: Any) -> Converted:
    """Convert a legacy stream; verify may find nothing in the result but notes and what is ``allowed``."""
    source = MemoryInput(legacy) if isinstance(legacy, bytes) else legacy
    with tempfile.TemporaryFile() as output:
        writer = StreamWriter(output.fileno())
        report = convert_legacy(source, writer, **options)
        output.seek(0)
        octets = output.read()
    assert writer.written == len(octets)
    with reader.open_memory(octets) as stream:
        findings = verify(stream).findings
    assert {finding.rule.id for finding in findings} <= NOTES | allowed, [
        str(finding) for finding in findings
    ]
    return Converted(octets, report)
