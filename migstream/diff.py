"""What tells two guests apart: streams, or memory images by the names of `guests.registry`.

Streams are compared by what they are and by what a restore makes of them, not octet by octet: the headers of
their layers, the last record of each kind (and vCPU, and emulator), how many records of each type there are,
and the final copy of each page. So two streams whose pages come in other batches, or in more passes, are
equal. PAGE_DATA records are not counted, for the same reason; the order of records, and what follows the end
of a stream, are not looked at.

Pages are compared in pieces of 1 MiB, which is all that is held of them.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from migstream.errors import TruncatedError
from migstream.guests.protocols import PAGE_SIZE, SaveSource
from migstream.io.frame import Frame
from migstream.io.inputs import FileInput
from migstream.io.seekable import SeekableStream
from migstream.layout import TABLE
from migstream.page_index import BODY_LIMIT, KEPT_AROUND, PageIndex
from migstream.records import Array, Declaration, Record, libxc, xl
from migstream.records.page_types import DATA_TYPES, PageType

__all__ = ["Difference", "Guest", "ImageSide", "PageDifferences", "Report", "StreamSide", "diff"]

BLOCK = 256  # pages of each side that are in memory at a time
RANGES_KEPT = 1000  # of PFNs in a report; the counts go on
TYPES_KEPT = 256  # types of records counted; a hostile stream could have 2^32
SHOWN = 64  # octets of a value that a difference quotes

Pfns = npt.NDArray[np.uint64]
Pages = npt.NDArray[np.uint8]

_HAS_DATA = np.isin(np.arange(16), list(DATA_TYPES))


class Guest(Protocol):
    """One side: memory by PFN, and what else is known of it."""

    #: One more than the highest PFN with a page.
    end: int
    #: Whether `types` says more than which PFNs have a page.
    has_types: bool

    def types(self, pfns: Pfns) -> npt.NDArray[np.uint8]:
        """Return the types of ``pfns``; XTAB for those that are not there."""

    def read(self, pfns: Pfns, into: Pages) -> None:
        """Read the pages of ``pfns``, ascending and all with content, into uint8[n, 4096]."""

    def values(self) -> dict[str, Declaration] | None:
        """Return headers and records by where they stand; ``None`` for an image, which has none."""

    def counts(self) -> Mapping[str, str]:
        """Return how often each type of record occurs, and what is known of those not in `values`."""


class StreamSide:
    """A stream as a side of a comparison."""

    has_types = True

    def __init__(self, source: SeekableStream, *, max_memory: int | None = None) -> None:
        """Index ``source``. Raises as `PageIndex.of`."""
        self._count: Counter[str] = Counter()
        self._digest: dict[str, int] = {}
        self._input: FileInput = source.input
        self.index = PageIndex.of(source.stream, max_memory=max_memory, observe=self._observe)
        self.end = self.index.end

    def _observe(self, frame: Frame) -> None:
        name = f"{frame.layer.name} {frame.type_name}"
        if name not in self._count and len(self._count) == TYPES_KEPT:
            name = "other types"
        self._count[name] += 1
        declared = frame.record_class
        if declared in KEPT_AROUND or (declared in TABLE and frame.length <= BODY_LIMIT):
            return
        self._digest[name] = zlib.crc32(frame.record().build(), self._digest.get(name, 0))

    def types(self, pfns: Pfns) -> npt.NDArray[np.uint8]:
        """Return the types named last."""
        return self.index.lookup(pfns).types

    def read(self, pfns: Pfns, into: Pages) -> None:
        """Read from the input, pages that lie together at once."""
        offsets = self.index.lookup(pfns).offsets
        breaks = np.flatnonzero(np.diff(offsets) != PAGE_SIZE) + 1
        starts = [0, *breaks.tolist(), len(pfns)]
        memory = into.data.cast("B")
        for start, end in itertools.pairwise(starts):
            view = memory[start * PAGE_SIZE : end * PAGE_SIZE]
            done = self._input.pread_into([view], int(offsets[start]))
            if done < len(view):
                raise TruncatedError(
                    f"the input ends after {done} of {len(view)} octets that were there before",
                    offset=int(offsets[start]) + done,
                )

    def values(self) -> dict[str, Declaration]:
        """Return headers and records by where they stand."""
        found: dict[str, Declaration] = {}
        for layer in self.index.layers:
            found |= {f"{layer.name} {type(header).__name__}": header for header in layer.headers}
        state = self.index.state
        for record in [*state.static, *state.layout, *state.state]:
            found[f"libxc {record.type}{_part(record)}"] = record
        return found | self.index.around

    def counts(self) -> Mapping[str, str]:
        """Return the number of records of each type; of those not in `values`, the bodies' CRC-32 too."""
        digests = {name: f", bodies of CRC-32 {value:08x}" for name, value in self._digest.items() if value}
        return {name: f"{count}{digests.get(name, '')}" for name, count in self._count.items()}


def _part(record: Record) -> str:
    if isinstance(record, libxc.VcpuRecord):
        return f" of vCPU {record.vcpu_id}"
    return f" from PFN {record.p2m_start_pfn:#x}" if isinstance(record, libxc.X86PvP2mFrames) else ""


class ImageSide:
    """A memory image as a side of a comparison: pages and nothing else."""

    has_types = False

    def __init__(self, source: SaveSource) -> None:
        self._source = source
        self.end = source.max_pfn + 1

    def types(self, pfns: Pfns) -> npt.NDArray[np.uint8]:
        """Return NOTAB for the image's pages, XTAB for all others."""
        types = np.full(len(pfns), PageType.XTAB, np.uint8)
        inside = pfns < np.uint64(self.end)
        types[inside] = self._source.page_types(pfns[inside])
        return types

    def read(self, pfns: Pfns, into: Pages) -> None:
        """Copy from the image's own memory."""
        views, _ = self._source.pages(pfns, np.zeros(len(pfns), np.uint8))
        memory = into.data.cast("B")
        at = 0
        for view in views:
            memory[at : at + len(view)] = view
            at += len(view)

    def values(self) -> None:
        """Return nothing: an image has no records."""

    def counts(self) -> Mapping[str, str]:
        """Return nothing, likewise."""
        return {}


class Difference(NamedTuple):
    """One thing outside memory that differs: where, which field of it, and what each side has.

    ``None`` for what a side does not have; ``field`` is ``None`` for the whole.
    """

    where: str
    field: str | None
    a: str | None
    b: str | None

    def to_json(self) -> dict[str, str | None]:
        """Return the four parts by name."""
        return self._asdict()


@dataclass
class PageDifferences:
    """PFNs that differ in one way: how many, and the first ranges of them, both ends included."""

    count: int = 0
    ranges: list[tuple[int, int]] = field(default_factory=list)

    def add(self, pfns: Pfns) -> None:
        """Add ``pfns``, ascending and above all that are there."""
        if not len(pfns):
            return
        self.count += len(pfns)
        breaks = np.flatnonzero(np.diff(pfns) != 1)
        starts = pfns[np.concatenate(([0], breaks + 1))].tolist()
        ends = pfns[np.append(breaks, len(pfns) - 1)].tolist()
        if self.ranges and self.ranges[-1][1] + 1 == starts[0]:
            starts[0] = self.ranges.pop()[0]
        room = RANGES_KEPT - len(self.ranges)
        self.ranges += list(zip(starts, ends, strict=True))[:room]

    def to_json(self) -> dict[str, object]:
        """Return count and ranges."""
        return {"count": self.count, "ranges": self.ranges}


@dataclass
class Report:
    """What differs. ``equal_pages`` is how many pages both sides have with the same content.

    Of the pages, ``changed`` differ in content, ``only_a`` and ``only_b`` are on one side only, and ``types``
    are PFNs whose types differ although both or neither have content. ``records`` and ``memory`` say what was
    compared.
    """

    records: bool = True
    memory: bool = True
    differences: list[Difference] = field(default_factory=list)
    equal_pages: int = 0
    changed: PageDifferences = field(default_factory=PageDifferences)
    only_a: PageDifferences = field(default_factory=PageDifferences)
    only_b: PageDifferences = field(default_factory=PageDifferences)
    types: PageDifferences = field(default_factory=PageDifferences)

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        pages = (self.changed, self.only_a, self.only_b, self.types)
        return not self.differences and not any(part.count for part in pages)

    def to_json(self) -> dict[str, object]:
        """Return everything, by name."""
        pages = None
        if self.memory:
            parts = ("changed", "only_a", "only_b", "types")
            pages = {"equal": self.equal_pages} | {name: getattr(self, name).to_json() for name in parts}
        differences = [difference.to_json() for difference in self.differences] if self.records else None
        return {"equal": self.equal, "differences": differences, "pages": pages}


def diff(a: Guest, b: Guest, *, records: bool = True, pages: bool = True) -> Report:
    """Compare two guests: headers and records where both are streams, and memory.

    Raises `TruncatedError` where a side's file became shorter meanwhile, `OSError` as reading does.
    """
    report = Report()
    ours, theirs = a.values(), b.values()
    report.records = records and ours is not None and theirs is not None
    report.memory = pages
    if report.records and ours is not None and theirs is not None:
        report.differences += _differences(ours, theirs)
        report.differences += _in_mappings("records", a.counts(), b.counts())
    if pages:
        _compare_pages(a, b, report)
    return report


def _differences(a: Mapping[str, Declaration], b: Mapping[str, Declaration]) -> Iterator[Difference]:
    for where in [*a, *(name for name in b if name not in a)]:
        one, other = a.get(where), b.get(where)
        if one is None or other is None:
            yield Difference(where, None, "present" if one else None, "present" if other else None)
        elif isinstance(one, xl.SaveFileConfig) and isinstance(other, xl.SaveFileConfig):
            yield from _in_configs(where, one, other)
        else:
            yield from _in_fields(where, one, other)


def _in_fields(where: str, a: Declaration, b: Declaration) -> Iterator[Difference]:
    for wire in a.wire_fields:
        one, other = getattr(a, wire.name), getattr(b, wire.name)
        if one != other:
            yield Difference(where, wire.name, *_shown(one, other))
    if a.surplus != b.surplus:
        yield Difference(where, "surplus", *_shown(a.surplus, b.surplus))


def _shown(a: object, b: object) -> tuple[str, str]:
    """Return two different values as text: of octets, how many and what stands from the difference on."""
    if isinstance(a, Array) and isinstance(b, Array):
        a, b = bytes(a.raw), bytes(b.raw)
    if not (isinstance(a, bytes) and isinstance(b, bytes)):
        return str(a), str(b)
    least = min(len(a), len(b))
    unequal = np.frombuffer(a[:least], np.uint8) != np.frombuffer(b[:least], np.uint8)
    at = int(unequal.argmax()) if unequal.any() else least
    one, other = (f"{len(v)} octets, from {at} on {v[at : at + 8].hex(' ') or 'none'}" for v in (a, b))
    return one, other


def _in_configs(where: str, a: xl.SaveFileConfig, b: xl.SaveFileConfig) -> Iterator[Difference]:
    try:
        one, other = json.loads(a.text), json.loads(b.text)
        yield from _in_mappings(where, dict(_leaves(one, "")), dict(_leaves(other, "")))
    except (ValueError, RecursionError):
        yield from _in_fields(where, a, b)


def _leaves(value: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value:
        for i, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{i}]")
    else:
        yield path, json.dumps(value)[:SHOWN]


def _in_mappings(where: str, a: Mapping[str, str], b: Mapping[str, str]) -> Iterator[Difference]:
    for name in [*a, *(name for name in b if name not in a)]:
        if a.get(name) != b.get(name):
            yield Difference(where, name, a.get(name), b.get(name))


def _compare_pages(a: Guest, b: Guest, report: Report) -> None:
    buffers = np.empty((2, BLOCK, PAGE_SIZE), np.uint8)
    end = max(a.end, b.end)
    for start in range(0, end, 1 << 16):
        pfns = np.arange(start, min(start + (1 << 16), end), dtype=np.uint64)
        ours, theirs = a.types(pfns), b.types(pfns)
        in_a, in_b = _HAS_DATA[ours], _HAS_DATA[theirs]
        report.only_a.add(pfns[in_a & ~in_b])
        report.only_b.add(pfns[in_b & ~in_a])
        if a.has_types and b.has_types:
            report.types.add(pfns[(ours != theirs) & (in_a == in_b)])
        both = pfns[in_a & in_b]
        for first in range(0, len(both), BLOCK):
            piece = both[first : first + BLOCK]
            one, other = buffers[0, : len(piece)], buffers[1, : len(piece)]
            a.read(piece, one)
            b.read(piece, other)
            unequal = (one.view(np.uint64) != other.view(np.uint64)).any(axis=1)
            report.changed.add(piece[unequal])
            report.equal_pages += len(piece) - int(np.count_nonzero(unequal))
