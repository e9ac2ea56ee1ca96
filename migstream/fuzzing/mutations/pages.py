"""Mutations of PAGE_DATA: counts and pages that disagree, PFNs, types, entries of page tables."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from migstream.fuzzing.mutations.editing import Editing
from migstream.fuzzing.tree import Record
from migstream.records import PageData
from migstream.records.fields import ORDER_CHAR
from migstream.records.page_types import DATA_TYPES, PFN_MASK, TYPE_SHIFT

__all__ = ["count", "pages", "pfn", "pfn_collision", "reserved_bits", "split", "table_entry", "type"]

PAGE = 4096
HEAD = PageData.head_size
TYPES = range(16)
HIGH_PFNS = (
    *(1 << bit for bit in (16, 20, 28, 32, 40, 51)),
    *((1 << bit) - 1 for bit in (20, 28, 32, 40, 51, 52)),
)
TABLE_ENTRIES = (0, 1, 7, PFN_MASK << 12 & (1 << 64) - 1, 0x8000_0000_0000_0007, (1 << 64) - 1, 0x1000_0007)


@dataclass(slots=True)
class _Batch:
    """A PAGE_DATA record taken apart: the entries that are there, and all octets behind them."""

    at: int
    record: Record
    entries: list[int]
    content: bytes

    def body(self, count: int | None = None) -> bytes:
        n = len(self.entries)
        order = ORDER_CHAR[self.record.order]
        count = n if count is None else count
        return struct.pack(f"{order}II{n}Q", count, 0, *self.entries) + self.content

    def with_data(self, index: int) -> bool:
        return self.entries[index] >> TYPE_SHIFT in DATA_TYPES

    def page_of(self, index: int) -> int:
        """Return where the page of entry ``index`` starts in the content, or would start."""
        return PAGE * sum(self.with_data(i) for i in range(index))


def _batch(editing: Editing) -> _Batch | None:
    found = editing.record("libxc", PageData.code)
    if found is None or len(found[1].body) < HEAD + 8:
        return None
    at, record = found
    order = ORDER_CHAR[record.order]
    count = min(struct.unpack_from(order + "I", record.body)[0], (len(record.body) - HEAD) // 8)
    entries = list(struct.unpack_from(f"{order}{count}Q", record.body, HEAD))
    return _Batch(at, record, entries, record.body[HEAD + 8 * count :]) if entries else None


def _put(editing: Editing, batch: _Batch, step: str, *, count: int | None = None) -> str:
    editing.nodes[batch.at] = batch.record.with_body(batch.body(count))
    return f"{editing.name(batch.at)}: {step}"


def count(editing: Editing) -> str | None:
    """Let the count say something else than how many entries there are."""
    batch = _batch(editing)
    if batch is None:
        return None
    there = len(batch.entries)
    near = (0, there - 1, there + 1, there + 512, (len(batch.record.body) - HEAD) // 8)
    new = editing.chance.choice((*near, editing.number(4, there)))
    return _put(editing, batch, f"count {there} -> {new}", count=new) if new != there else None


def pages(editing: Editing) -> str | None:
    """Take a page, or part of one, out of the content, or put one in: entries and pages disagree."""
    batch = _batch(editing)
    if batch is None:
        return None
    length = editing.chance.choice((PAGE, PAGE, 1, 8, 2 * PAGE))
    if batch.content and editing.chance.randrange(2):
        batch.content = batch.content[: max(len(batch.content) - length, 0)]
        return _put(editing, batch, f"{length} octets of pages gone")
    batch.content += bytes(length)
    return _put(editing, batch, f"{length} octets of pages more")


def pfn(editing: Editing) -> str | None:
    """Give an entry a PFN that no guest has, or just another one."""
    batch = _batch(editing)
    if batch is None:
        return None
    index = editing.chance.randrange(len(batch.entries))
    old = batch.entries[index]
    low = old & PFN_MASK
    new = editing.chance.choice((*HIGH_PFNS, low + 1 & PFN_MASK, low ^ 1 << editing.chance.randrange(52), 0))
    batch.entries[index] = old - low | new
    return _put(editing, batch, f"PFN of entry {index} {low:#x} -> {new:#x}")


def pfn_collision(editing: Editing) -> str | None:
    """Let two entries of a record have one PFN; or all of them."""
    batch = _batch(editing)
    if batch is None:
        return None
    source, target = (editing.chance.randrange(len(batch.entries)) for _ in range(2))
    same = batch.entries[source] & PFN_MASK
    if source == target:
        batch.entries.append(batch.entries[source])
        if batch.with_data(source):
            batch.content += bytes(PAGE)
        return _put(editing, batch, f"entry {len(batch.entries) - 1} repeats entry {source}")
    batch.entries[target] = batch.entries[target] & ~PFN_MASK | same
    return _put(editing, batch, f"entry {target} has the PFN of entry {source}, {same:#x}")


def type(editing: Editing) -> str | None:
    """Give an entry another page type, reserved ones included; its page follows suit, or does not."""
    batch = _batch(editing)
    if batch is None:
        return None
    index = editing.chance.randrange(len(batch.entries))
    old = batch.entries[index]
    new = editing.chance.choice(TYPES)
    had, has, start = batch.with_data(index), new in DATA_TYPES, batch.page_of(index)
    batch.entries[index] = old & (1 << TYPE_SHIFT) - 1 | new << TYPE_SHIFT
    fitted = had != has and editing.chance.randrange(3) > 0
    if fitted:
        page = bytes(PAGE) if has else b""
        batch.content = batch.content[:start] + page + batch.content[start + (PAGE if had else 0) :]
    suit = ", with its page" if fitted else ""
    return _put(editing, batch, f"type of entry {index} {old >> TYPE_SHIFT:#x} -> {new:#x}{suit}")


def reserved_bits(editing: Editing) -> str | None:
    """Set a reserved bit of an entry."""
    batch = _batch(editing)
    if batch is None:
        return None
    index, bit = editing.chance.randrange(len(batch.entries)), editing.chance.randrange(52, 60)
    batch.entries[index] ^= 1 << bit
    return _put(editing, batch, f"entry {index} ^ bit {bit}")


def table_entry(editing: Editing) -> str | None:
    """Write an entry of a page table into a page: of a page table where there is one."""
    batch = _batch(editing)
    if batch is None:
        return None
    tables = [i for i, entry in enumerate(batch.entries) if entry >> TYPE_SHIFT & 7 in (1, 2, 3, 4)]
    choices = tables or range(len(batch.entries))
    start = batch.page_of(editing.chance.choice(choices))
    at = start + 8 * editing.chance.choice((0, 1, 255, 256, 271, 272, 511))
    if at + 8 > len(batch.content):
        return None
    frame = (batch.entries[editing.chance.randrange(len(batch.entries))] & PFN_MASK) << 12 & (1 << 64) - 1
    new = editing.chance.choice((*TABLE_ENTRIES, frame | 7, frame | 0x67))
    batch.content = batch.content[:at] + new.to_bytes(8, "little") + batch.content[at + 8 :]
    return _put(editing, batch, f"octet {at} of the pages: entry {new:#x}")


def split(editing: Editing) -> str | None:
    """Make two records of one, each with its pages: sound, unless something else is not."""
    batch = _batch(editing)
    if batch is None or len(batch.entries) < 2:
        return None
    index = editing.chance.randrange(1, len(batch.entries))
    start = batch.page_of(index)
    second = _Batch(batch.at + 1, batch.record, batch.entries[index:], batch.content[start:])
    batch.entries, batch.content = batch.entries[:index], batch.content[:start]
    editing.nodes.insert(second.at, batch.record.with_body(second.body()))
    return _put(editing, batch, f"split before entry {index}")
