"""The rules of PAGE_DATA, on whole arrays: this is most of what there is to verify."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from migstream.io.reader import Frame
from migstream.records import PageData
from migstream.records.page_data import Entries, PfnRun
from migstream.records.page_types import DATA_TYPES, PageType, type_name
from migstream.verification.fields import Complaint

__all__ = ["PageContext", "check_page_data"]

_KNOWN = frozenset(int(t) for t in PageType)
_PAGE_TABLES = frozenset(int(t) for t in PageType if t.page_table_level)


@dataclass
class PageContext:
    """What of the image a PAGE_DATA record is judged by. ``max_pfn``: the end of the P2M, or ``None``."""

    hvm: bool
    page_size: int = 4096
    max_pfn: int | None = None


def check_page_data(frame: Frame, context: PageContext) -> Iterator[Complaint]:
    """Read the head and entries of ``frame`` and yield what they break; the pages are left unread."""
    count, reserved1 = frame.page_head()
    if reserved1:
        yield "reserved-field", f"reserved1 is {reserved1:#x}, not zero"
    pages = 0
    for entries in frame.entries(count):
        run = entries.run
        if run is not None:
            pages += run.length if run.type in DATA_TYPES else 0
            yield from _run(run, context)
        else:
            pages += int(entries.with_data.sum())
            yield from _array(entries, context)
    if not count:
        yield "page-data-count", "count is 0"
    expected = PageData.head_size + 8 * count + context.page_size * pages
    if frame.length != expected:
        yield (
            "page-data-length",
            f"the body is {frame.length} octets; {count} PFNs with {pages} pages take "
            f"{PageData.head_size} + {8 * count} + {context.page_size * pages} = {expected}",
        )


def _run(run: PfnRun, context: PageContext) -> Iterator[Complaint]:
    yield from _types({run.type: run.length}, context, run.first)
    last = run.first + run.length - 1
    if context.max_pfn is not None and last > context.max_pfn:
        yield "page-beyond-p2m", f"PFN {last:#x} is above {context.max_pfn:#x}"


def _array(entries: Entries, context: PageContext) -> Iterator[Complaint]:
    import numpy as np

    counts = entries.count_by_type()
    if not counts.keys() <= _KNOWN or (context.hvm and not counts.keys().isdisjoint(_PAGE_TABLES)):
        strange = ~np.isin(entries.types, list(_KNOWN - _PAGE_TABLES if context.hvm else _KNOWN))
        yield from _types(counts, context, int(entries.pfns[strange][0]))
    reserved = entries.reserved_bits
    if reserved.any():
        at = int(np.flatnonzero(reserved)[0])
        yield (
            "page-reserved-bits",
            f"{np.count_nonzero(reserved)} entries, first entry {at}: {int(reserved[at]):#018x}",
        )
    pfns = entries.pfns
    if not (pfns[1:] > pfns[:-1]).all():
        unique, times = np.unique(pfns, return_counts=True)
        if len(unique) < len(pfns):
            twice = unique[times > 1]
            yield "page-duplicate", f"{len(twice)} PFNs, first {int(twice[0]):#x}"
    if context.max_pfn is not None and int(pfns.max()) > context.max_pfn:
        yield "page-beyond-p2m", f"PFN {int(pfns.max()):#x} is above {context.max_pfn:#x}"


def _types(counts: dict[int, int], context: PageContext, first_pfn: int) -> Iterator[Complaint]:
    for type, count in counts.items():
        if type not in _KNOWN:
            yield "page-type", f"{count} PFNs of type {type:#x}, {type_name(type)}, first {first_pfn:#x}"
        elif context.hvm and type in _PAGE_TABLES:
            yield "page-table-in-hvm", f"{count} PFNs of type {type_name(type)}, first {first_pfn:#x}"
