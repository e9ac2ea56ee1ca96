"""PAGE_DATA's entries: PFNs, types, runs, against an oracle that takes one entry after the other."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from migstream.records import ByteOrder, PageData, array_of
from migstream.records.page_data import Entries, PfnRun, RunTemplates

PFN = (1 << 52) - 1
RESERVED = 0xFF << 52
orders: st.SearchStrategy[ByteOrder] = st.sampled_from(("little", "big"))


def entries_of(values: list[int], order: ByteOrder = "little") -> Entries:
    return Entries(b"".join(v.to_bytes(8, order) for v in values), order)


def run_of(values: list[int]) -> PfnRun | None:
    """The oracle: consecutive PFNs, one type, no reserved bit."""
    if not values or any(v & RESERVED for v in values):
        return None
    first, type = values[0] & PFN, values[0] >> 60
    if any(v >> 60 != type or v & PFN != first + i for i, v in enumerate(values)):
        return None
    return PfnRun(first, len(values), type)


#: Lists near to being runs: a run with at most a few entries changed.
pfns = st.one_of(st.integers(0, PFN), st.integers(PFN - 8, PFN), st.integers(0, 8))
runs = st.builds(
    lambda page_type, first, count: [page_type << 60 | (first + i) & PFN for i in range(count)],
    st.integers(0, 15),
    pfns,
    st.integers(1, 40),
)
nearly_runs = st.builds(
    lambda run, at, flip: [v ^ (flip if i == at % len(run) else 0) for i, v in enumerate(run)],
    runs,
    st.integers(0, 100),
    st.one_of(st.just(0), st.integers(0, 63).map(lambda bit: 1 << bit), st.integers(0, 2**64 - 1)),
)
anything = st.one_of(nearly_runs, st.lists(st.integers(0, 2**64 - 1), max_size=12))


@settings(max_examples=300, deadline=None)
@given(values=anything)
def test_a_run_is_recognised_exactly_when_the_entries_are_one(values: list[int]) -> None:
    assert entries_of(values).run == run_of(values)


#: Firsts around the borders where a carry changes the upper octets.
borders = st.builds(
    lambda border, away: max(0, min(PFN, border + away)),
    st.sampled_from([0, 1 << 8, 1 << 16, 1 << 24, 1 << 32, 1 << 48, PFN]),
    st.integers(-3000, 3000),
)


@settings(max_examples=100, deadline=None)
@given(
    script=st.lists(
        st.tuples(borders, st.sampled_from([1, 2, 3, 7, 255, 256, 257, 1024, 1500]), st.integers(0, 15)),
        max_size=12,
    )
)
def test_templates_moved_from_run_to_run_recognise_each(script: list[tuple[int, int, int]]) -> None:
    templates = RunTemplates()
    for first, count, page_type in script:
        values = [page_type << 60 | (first + i) & PFN for i in range(count)]
        raw = b"".join(v.to_bytes(8, "little") for v in values)
        assert Entries(raw, templates=templates).run == run_of(values)
        damaged = raw[:-1] + bytes([raw[-1] ^ 0x10])
        assert Entries(damaged, templates=templates).run == run_of([*values[:-1], values[-1] ^ 1 << 60])


def test_templates_of_any_number_of_lengths_recognise_runs_with_bounded_memory() -> None:
    templates = RunTemplates()
    for count in [*range(1, 3 * RunTemplates.KEPT), *range(1, 3 * RunTemplates.KEPT)]:
        raw = b"".join(v.to_bytes(8, "little") for v in range(9, 9 + count))
        assert Entries(raw, templates=templates).run == PfnRun(9, count, 0)
        assert len(templates._templates) <= RunTemplates.KEPT


def test_a_run_across_two_borders_of_65536() -> None:
    values = range(0xFFF0, 0xFFF0 + 70_000)
    raw = b"".join(v.to_bytes(8, "little") for v in values)
    assert Entries(raw, templates=RunTemplates()).run == PfnRun(0xFFF0, 70_000, 0)


@settings(max_examples=200, deadline=None)
@given(values=anything, order=orders)
def test_pfns_types_and_reserved_bits_are_those_of_each_entry(values: list[int], order: ByteOrder) -> None:
    entries = entries_of(values, order)
    assert len(entries) == len(values)
    assert entries.pfns.tolist() == [v & PFN for v in values]
    assert entries.types.tolist() == [v >> 60 for v in values]
    assert entries.types.dtype.itemsize == 1
    assert entries.reserved_bits.tolist() == [v & RESERVED for v in values]
    assert entries.count_by_type() == Counter(v >> 60 for v in values)
    assert entries.with_data.tolist() == [v >> 60 in {0, 1, 2, 3, 4, 9, 10, 11, 12} for v in values]


@pytest.mark.parametrize("count", [1, 2, 1023, 1024, 1025, 4096])
@pytest.mark.parametrize("type", [0, 0xA, 0xF])
def test_long_runs_of_any_type(count: int, type: int) -> None:
    assert entries_of([type << 60 | 77 + i for i in range(count)]).run == PfnRun(77, count, type)


def test_a_run_may_end_at_the_last_pfn_but_not_pass_it() -> None:
    assert entries_of([PFN - 1, PFN]).run == PfnRun(PFN - 1, 2, 0)
    # One more would be 2^52: a set reserved bit, not a PFN.
    assert entries_of([PFN - 1, PFN, PFN + 1]).run is None
    assert entries_of([PFN, 0]).run is None


def test_a_carry_into_the_next_type_is_no_run() -> None:
    assert entries_of([PFN | 0xFF << 52, 1 << 60]).run is None


@pytest.mark.parametrize("bit", range(52, 60))
def test_one_reserved_bit_makes_no_run(bit: int) -> None:
    assert entries_of([5, 6 | 1 << bit, 7]).run is None
    assert entries_of([5 | 1 << bit, 6 | 1 << bit]).run is None
    assert entries_of([5, 6 | 1 << bit]).reserved_bits.tolist() == [0, 1 << bit]


def test_no_entries_are_no_run() -> None:
    entries = entries_of([])
    assert entries.run is None
    assert entries.count_by_type() == {}
    assert entries.with_data.tolist() == []


def test_big_endian_entries_are_never_said_to_be_a_run_but_decode() -> None:
    entries = entries_of([1, 2, 3], "big")
    assert entries.run is None
    assert entries.pfns.tolist() == [1, 2, 3]


def test_a_record_gives_its_entries_unpacked() -> None:
    record = PageData(entries=array_of(8, [0x9 << 60 | 4, 0xD << 60 | 5]))
    assert record.count == 2
    assert record.pfns.tolist() == [4, 5]
    assert record.types.tolist() == [9, 13]
    assert record.unpacked.count_by_type() == {9: 1, 13: 1}
