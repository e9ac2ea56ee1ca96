"""PfnBitmap against a Python set: every operation, in every order."""

from __future__ import annotations

import tracemalloc
from itertools import chain

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from migstream.bitmap import BLOCK, PfnBitmap

PFNS_IN_BLOCK = BLOCK * 8


def pfns(*numbers: int) -> npt.NDArray[np.uint64]:
    return np.array(numbers, np.uint64)


class BitmapAgainstSet(RuleBasedStateMachine):
    """Whatever is done to both, the bitmap holds what the set holds."""

    @initialize(size=st.integers(1, 300))
    def make(self, size: int) -> None:
        self.size = size
        self.bitmap = PfnBitmap(size)
        self.expected: set[int] = set()

    def some(self, data: st.DataObject) -> list[int]:
        if data.draw(st.booleans()):
            first, count = self.run(data)  # consecutive PFNs go another way
            return list(range(first, first + count))
        return data.draw(st.lists(st.integers(0, self.size - 1), max_size=40))

    def run(self, data: st.DataObject) -> tuple[int, int]:
        first = data.draw(st.integers(0, self.size))
        return first, data.draw(st.integers(0, self.size - first))

    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        some = self.some(data)
        assert self.bitmap.add(pfns(*some)) == len(set(some) - self.expected)
        self.expected |= set(some)

    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        some = self.some(data)
        self.bitmap.discard(pfns(*some))
        self.expected -= set(some)

    @rule(data=st.data())
    def add_run(self, data: st.DataObject) -> None:
        first, count = self.run(data)
        run = set(range(first, first + count))
        assert self.bitmap.add_run(first, count) == len(run - self.expected)
        self.expected |= run

    @rule(data=st.data())
    def count_run(self, data: st.DataObject) -> None:
        first, count = self.run(data)
        assert self.bitmap.count_run(first, count) == len(self.expected & set(range(first, first + count)))

    @rule(data=st.data())
    def merge(self, data: st.DataObject) -> None:
        some = self.some(data)
        other = PfnBitmap(self.size)
        other.add(pfns(*some))
        self.bitmap |= other
        self.expected |= set(some)

    @rule()
    def clear(self) -> None:
        self.bitmap.clear()
        self.expected.clear()

    @rule()
    def fill(self) -> None:
        self.bitmap.fill()
        self.expected = set(range(self.size))

    @rule(data=st.data())
    def test(self, data: st.DataObject) -> None:
        some = self.some(data)
        assert self.bitmap.test(pfns(*some)).tolist() == [pfn in self.expected for pfn in some]

    @rule(at_most=st.integers(1, 70))
    def batches(self, at_most: int) -> None:
        found = [batch.tolist() for batch in self.bitmap.batches(at_most)]
        assert list(chain.from_iterable(found)) == sorted(self.expected)
        assert all(len(batch) == at_most for batch in found[:-1])
        assert all(0 < len(batch) <= at_most for batch in found)

    @invariant()
    def holds_as_many(self) -> None:
        if hasattr(self, "bitmap"):
            assert len(self.bitmap) == len(self.expected)


TestBitmapAgainstSet = BitmapAgainstSet.TestCase
TestBitmapAgainstSet.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


def test_bit_n_of_octet_m_is_pfn_8m_plus_n() -> None:
    bitmap = PfnBitmap(20)
    bitmap.add(pfns(0, 3, 8, 15, 19))
    # octet 0: bits 0 and 3; octet 1: bits 0 and 7; octet 2: bit 3; padded to a word
    assert bitmap.octets.tobytes() == bytes.fromhex("09 81 08 00 00 00 00 00")


@given(st.integers(1, 200))
def test_filling_sets_no_bit_past_the_size(size: int) -> None:
    bitmap = PfnBitmap(size)
    bitmap.fill()
    assert int.from_bytes(bitmap.octets.tobytes(), "little") == (1 << size) - 1


@pytest.mark.parametrize("pfn", [100, 127, 1 << 40, (1 << 64) - 1])
def test_a_pfn_past_the_size_is_refused_and_changes_nothing(pfn: int) -> None:
    bitmap = PfnBitmap(100)
    for operation in (bitmap.add, bitmap.discard, bitmap.test):
        with pytest.raises(IndexError, match=f"{pfn:#x}"):
            operation(pfns(1, pfn))
    assert pfn not in bitmap
    assert len(bitmap) == 0


@pytest.mark.parametrize(("first", "count"), [(90, 11), (100, 1), (-1, 2), (5, -1), (1 << 50, 1)])
def test_a_run_past_the_size_is_refused_and_changes_nothing(first: int, count: int) -> None:
    bitmap = PfnBitmap(100)
    for operation in (bitmap.add_run, bitmap.count_run):
        with pytest.raises(IndexError):
            operation(first, count)
    assert len(bitmap) == 0


def test_bitmaps_of_different_sizes_are_not_merged() -> None:
    bitmap = PfnBitmap(100)
    with pytest.raises(ValueError, match="100 and 101"):
        bitmap |= PfnBitmap(101)


def test_a_bitmap_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        PfnBitmap(0)


@given(
    st.sets(
        st.integers(0, 8)
        .map(lambda n: n * PFNS_IN_BLOCK)
        .flatmap(lambda edge: st.integers(max(0, edge - 70), edge + 70)),
        max_size=60,
    )
)
@settings(deadline=None)
def test_batches_go_on_over_the_blocks_of_the_scan(members: set[int]) -> None:
    bitmap = PfnBitmap(9 * PFNS_IN_BLOCK)
    bitmap.add(np.array(sorted(members), np.uint64))
    assert np.concatenate([pfns(), *bitmap.batches(16)]).tolist() == sorted(members)


def test_batches_equal_unpackbits_on_a_dense_bitmap() -> None:
    bitmap = PfnBitmap(3 * PFNS_IN_BLOCK)
    rng = np.random.default_rng(1)
    bitmap.octets[:] = rng.integers(0, 256, len(bitmap.octets), np.uint8)
    expected = np.flatnonzero(np.unpackbits(bitmap.octets, bitorder="little"))
    assert np.array_equal(np.concatenate(list(bitmap.batches())), expected)
    assert len(bitmap) == len(expected)


def test_walking_a_terabyte_guest_takes_the_memory_of_one_block() -> None:
    bitmap = PfnBitmap(1 << 28)
    bitmap.add_run(0, 1 << 12)
    bitmap.add(pfns((1 << 28) - 1))
    tracemalloc.start()
    total = sum(len(batch) for batch in bitmap.batches())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == (1 << 12) + 1
    assert peak < 8 << 20
