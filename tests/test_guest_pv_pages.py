"""Page tables between frames and PFNs: golden entries, and properties of the frame map."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migstream.errors import GuestError
from migstream.guests.pv_pages import INVALID, FrameMap, referenced_pfns
from migstream.records.pv_state import PV_LAYOUTS
from tests.guests import pfns, run


class Doubling(FrameMap):
    """PFN n is at frame 0x100000 + 2 n: a map that can be followed by eye."""

    def __init__(self) -> None:
        super().__init__(64, seed=0)
        self.base, self.n_frames, self._step, self._back = 0x100000, 129, 2, 65  # 2 * 65 = 1 modulo 129


def test_normalising_replaces_frames_and_keeps_every_other_bit() -> None:
    table = np.zeros((1, 512), np.uint64)
    table[0, :4] = [
        0x8000_0001_0000_6063,  # present, no-execute, frame 0x100006: PFN 3
        0x0000_0001_0000_6062,  # not present: nothing in it is a frame
        0x0000_0001_0000_0067,  # frame 0x100000: PFN 0
        0x7FF0_0001_0001_4025,  # bits 52-62 are the guest's own; frame 0x100014: PFN 10
    ]
    table[0, 511] = 0x0000_0001_0000_2063  # PFN 1
    copy, foreign = Doubling().normalise(table, np.array([1], np.uint8))
    assert copy[0, :4].tolist() == [
        0x8000_0000_0000_3063,
        0x0000_0001_0000_6062,
        0x0000_0000_0000_0067,
        0x7FF0_0000_0000_A025,
    ]
    assert copy[0, 511] == 0x0000_0000_0000_1063
    assert foreign.tolist() == [False]
    assert table[0, 0] == 0x8000_0001_0000_6063, "the guest's own table is left alone"


@pytest.mark.parametrize("entry", [0x0000_0001_0008_2063, 0x0000_0000_FFFF_F063, 0x000F_FFFF_FFFF_F001])
def test_a_frame_that_is_not_the_guests_marks_its_table(entry: int) -> None:
    tables = np.zeros((2, 512), np.uint64)
    tables[1, 7] = entry
    _, foreign = Doubling().normalise(tables, np.array([1, 1], np.uint8))
    assert foreign.tolist() == [False, True]


@pytest.mark.parametrize(
    ("width", "level", "dropped"), [(8, 4, range(256, 272)), (4, 3, range(4, 512)), (8, 3, ()), (4, 2, ())]
)
def test_xens_own_entries_are_dropped(width: int, level: int, dropped: range) -> None:
    tables = np.full((1, 512), 0x0000_0001_0000_6063, np.uint64)
    copy, _ = Doubling().normalise(tables, np.array([level], np.uint8), width)
    assert np.flatnonzero(copy[0] == 0).tolist() == list(dropped)


@given(st.integers(1, 5000), st.integers(0, 50))
@settings(deadline=None)
def test_every_page_has_a_frame_of_its_own_and_frames_lead_back(n_pages: int, seed: int) -> None:
    frames = FrameMap(n_pages, seed)
    everything = run(0, n_pages)
    mfns = frames.mfns(everything)
    assert len(np.unique(mfns)) == n_pages
    assert np.array_equal(frames.pfns(mfns), everything)
    assert frames.pfns(pfns(frames.foreign, 0, frames.base + frames.n_frames)).tolist() == [int(INVALID)] * 3
    # What is no frame of a page does not lead to one: every PFN is found once in the whole range.
    found = frames.pfns(run(frames.base, frames.n_frames))
    assert np.count_nonzero(found != INVALID) == n_pages


def test_two_machines_have_different_frames() -> None:
    everything = run(0, 1000)
    assert np.count_nonzero(FrameMap(1000, 1).mfns(everything) == FrameMap(1000, 2).mfns(everything)) < 10


def test_the_largest_map_does_not_overflow() -> None:
    frames = FrameMap((1 << 32) - FrameMap.SPARE, seed=5)
    edges = pfns(0, 1, (1 << 31) + 7, frames.n_pages - 1)
    assert np.array_equal(frames.pfns(frames.mfns(edges)), edges)
    with pytest.raises(ValueError, match="16 TiB"):
        FrameMap(1 << 32, seed=5)


def test_an_exchanged_page_has_a_new_frame_and_the_old_one_is_nobodys() -> None:
    frames = FrameMap(1000, seed=3)
    before = frames.mfns(run(0, 1000))
    frames.exchange(17)
    after = frames.mfns(run(0, 1000))
    assert np.flatnonzero(before != after).tolist() == [17]
    assert after[17] not in before
    assert frames.pfns(before[17:18]).tolist() == [int(INVALID)]
    assert np.array_equal(frames.pfns(after), run(0, 1000))


def test_frames_to_exchange_run_out() -> None:
    frames = FrameMap(1000, seed=3)
    for pfn in range(FrameMap.SPARE):
        frames.exchange(pfn)
    with pytest.raises(ValueError, match="0x64"):
        frames.exchange(100)


def test_referenced_pfns_are_those_of_present_entries_once_in_order() -> None:
    entries = np.zeros(512, np.uint64)
    entries[[0, 9, 100, 511]] = [0x5063, 0x3063, 0x9062, 0x8000_0000_0000_5001]
    assert referenced_pfns(entries, 1, max_pfn=5).tolist() == [3, 5]


def test_an_entry_past_the_guests_last_page_is_refused_with_its_place() -> None:
    entries = np.zeros(512, np.uint64)
    entries[100] = 0x6063
    with pytest.raises(GuestError, match=r"entry 100 of an L2 page table, 0x6063, .* PFN 0x6;.* is 0x5"):
        referenced_pfns(entries, 2, max_pfn=5)


@given(st.integers(0, (1 << 32) - 1))
def test_cr3_of_a_32_bit_guest_folds_the_top_of_the_frame(pfn: int) -> None:
    assert PV_LAYOUTS[4].cr3_to_pfn(PV_LAYOUTS[4].pfn_to_cr3(pfn)) == pfn
    assert PV_LAYOUTS[8].cr3_to_pfn(PV_LAYOUTS[8].pfn_to_cr3(pfn)) == pfn


def test_cr3_golden_values() -> None:
    # xen-x86_32.h: (pfn << 12) | (pfn >> 20), in 32 bits
    assert PV_LAYOUTS[4].pfn_to_cr3(0x12345678) == 0x45678123
    assert PV_LAYOUTS[8].pfn_to_cr3(0x12345678) == 0x12345678000


def test_gdt_frames_are_counted_up() -> None:
    layout = PV_LAYOUTS[8].vcpu_context
    context = bytearray(layout.size)
    for entries, used in ((0, 0), (1, 1), (512, 1), (513, 2), (7168, 14)):
        layout.gdt_ents.set(context, entries)
        assert len(list(layout.used_gdt_frames(context))) == used
