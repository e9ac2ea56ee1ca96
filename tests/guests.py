"""Helpers for tests with guests: a restore without a stream, and PFN arrays by hand."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from migstream.guests.protocols import RestoreTarget, SaveSource
from migstream.records.libxc import GuestType
from migstream.records.page_types import PageType

Pfns = npt.NDArray[np.uint64]

BATCH = 1024


def pfns(*numbers: int) -> Pfns:
    return np.array(numbers, np.uint64)


def run(first: int, count: int) -> Pfns:
    return np.arange(first, first + count, dtype=np.uint64)


def carry(source: SaveSource, target: RestoreTarget, wanted: Pfns | None = None) -> Pfns:
    """Take pages (all, or ``wanted``) and records from one guest to another; return the PFNs deferred."""
    deferred = []
    for start in range(0, source.max_pfn + 1, BATCH):
        batch = run(start, min(BATCH, source.max_pfn + 1 - start))
        if wanted is not None:
            batch = batch[np.isin(batch, wanted)]
        if len(batch):
            deferred.append(carry_pages(source, target, batch))
    if source.suspended:
        for record in [*source.static_records(), *source.layout_records(), *source.state_records()]:
            target.apply(record)
    return np.concatenate([pfns(), *deferred])


def carry_pages(source: SaveSource, target: RestoreTarget, batch: Pfns) -> Pfns:
    types = source.page_types(batch)
    kinds = [PageType(type) for type in types.tolist()]
    target.set_page_types(batch, types)
    populated = batch[[kind.populated for kind in kinds]]
    target.populate(populated[~target.populated(populated)])
    with_data = np.array([kind.has_data for kind in kinds], np.bool_)
    buffers, deferred = source.pages(batch[with_data], types[with_data])
    content = b"".join(buffers)
    taken = batch[with_data][~deferred]
    assert len(content) == 4096 * len(taken)
    offset = 0
    for view in target.pages(taken):
        view[:] = content[offset : offset + len(view)]
        offset += len(view)
    levels = np.array([kind.page_table_level for kind in kinds])[with_data][~deferred]
    if source.guest_type is GuestType.PV:
        for pfn in np.flatnonzero(levels):
            target.localise(int(levels[pfn]), target.pages(taken[pfn : pfn + 1])[0])
    return batch[with_data][deferred]
