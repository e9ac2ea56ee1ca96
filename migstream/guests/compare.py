"""Whether two models are the same machine: memory, page types and state, page by page."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from migstream.guests.model import ModelGuest
from migstream.guests.model_boot import HAS_DATA
from migstream.guests.pv_pages import TABLE_LEVEL
from migstream.records import Record
from migstream.records.libxc import VcpuRecord

__all__ = ["content_equal", "differing_pfns", "differing_records"]

BATCH = 1024  # pages compared at a time


def content_equal(one: ModelGuest, other: ModelGuest) -> bool:
    """Return whether two machines have the same pages, page types, static data, layout and state."""
    return not len(differing_pfns(one, other)) and not differing_records(one, other)


def differing_pfns(one: ModelGuest, other: ModelGuest) -> npt.NDArray[np.uint64]:
    """Return the PFNs whose type or content differs, uint64[n], ascending.

    Page tables are compared with PFNs for frames, since each machine has frames of its own. Pages without
    content (holes, broken, allocate-only) are equal if their types are. A PFN past the end of the smaller
    machine counts as a hole.
    """
    differing = []
    shared = min(one.n_pages, other.n_pages)
    for start in range(0, shared, BATCH):
        pfns = np.arange(start, min(start + BATCH, shared), dtype=np.uint64)
        types = one.page_types(pfns)
        different = types != other.page_types(pfns)
        compared = HAS_DATA[types] & ~different
        if compared.all():  # the usual case needs no copies
            different = (_pages(one, pfns) != _pages(other, pfns)).any(axis=1)
        else:
            different[compared] = (_pages(one, pfns[compared]) != _pages(other, pfns[compared])).any(axis=1)
        tables = compared & (TABLE_LEVEL[types] > 0)
        if one.frames is not None and other.frames is not None and tables.any():
            levels = TABLE_LEVEL[types[tables]]
            width = one.guest_width
            mine, _ = one.frames.normalise(_pages(one, pfns[tables]), levels, width)
            theirs, _ = other.frames.normalise(_pages(other, pfns[tables]), levels, width)
            different[tables] = (mine != theirs).any(axis=1)
        differing.append(pfns[different])
    for guest in (one, other):
        for start in range(shared, guest.n_pages, BATCH):
            rest = np.arange(start, min(start + BATCH, guest.n_pages), dtype=np.uint64)
            differing.append(rest[HAS_DATA[guest.page_types(rest)]])
    return np.concatenate(differing)


def differing_records(one: ModelGuest, other: ModelGuest) -> list[str]:
    """Return what differs beside memory, in words: one line a record that is absent or not equal."""
    mine, theirs = _records(one), _records(other)
    lines = []
    for name in mine.keys() | theirs.keys():
        if name not in mine or name not in theirs:
            lines.append(f"{name}: only the {'second' if name not in mine else 'first'} has it")
        elif mine[name] != theirs[name]:
            lines.append(f"{name}: not equal")
    return sorted(lines)


def _pages(guest: ModelGuest, pfns: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return the words of ``pfns``, which ascend, uint64[n, 512]: the memory itself where they are a run."""
    if len(pfns) and int(pfns[-1]) - int(pfns[0]) == len(pfns) - 1:
        return guest.memory.words[int(pfns[0]) : int(pfns[-1]) + 1]
    return guest.memory.words[pfns]


def _records(guest: ModelGuest) -> dict[str, Record]:
    records = [*guest.static_records(), *guest.layout_records(), *guest.state()]
    return {
        f"{record.type} of vCPU {record.vcpu_id}" if isinstance(record, VcpuRecord) else record.type: record
        for record in records
    }
