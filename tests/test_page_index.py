"""The index of final pages: which copy counts, what is void, and what is refused."""

from __future__ import annotations

import io
import os
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import migstream
from migstream.errors import FormatError, TruncatedError
from migstream.io.seekable import seekable
from migstream.page_index import PageIndex
from migstream.page_list import PageRun
from migstream.records import libxc
from tests import build
from tests.streams import CHECKPOINT, END, STATIC_DATA_END, TAIL, PvGuest, page_data, pages, stream

XTAB, XALLOC, BROKEN, NOTAB = 0xF, 0xE, 0xD, 0


def index_of(octets: bytes, **options: int | bool | None) -> PageIndex:
    return PageIndex.of(migstream.open_memory(octets), **options)  # type: ignore[arg-type]  # keywords of both kinds


def content(octets: bytes, index: PageIndex) -> dict[int, int]:
    """Return the first octet of each page that the index has."""
    found = {}
    for run in index.runs():
        for i in range(run.pages):
            page = octets[run.offset + 4096 * i : run.offset + 4096 * (i + 1)]
            assert page == page[:1] * 4096
            found[run.first + i] = page[0]
    return found


def test_the_last_copy_of_a_page_counts_and_runs_join_what_lies_together() -> None:
    octets = stream(STATIC_DATA_END, pages(3, [1, 2, 3]), pages(4, [9]), *TAIL, END)
    index = index_of(octets)
    assert content(octets, index) == {3: 1, 4: 9, 5: 3}
    # headers 24 + 16, STATIC_DATA_END 8, then record header 8, head 8 and three entries
    first = 40 + 8 + 8 + 8 + 24
    second = first + 3 * 4096 + 8 + 8 + 8
    assert list(index.runs()) == [PageRun(3, 1, first), PageRun(4, 1, second), PageRun(5, 1, first + 8192)]
    assert index.end == 6


def test_a_run_of_pfns_goes_on_over_the_edge_of_a_block_of_the_list() -> None:
    edge = 1 << 16
    octets = stream(STATIC_DATA_END, pages(edge - 2, [1, 2, 3, 4]), pages(edge + 9, [5]), END)
    starts, counts = index_of(octets).pfn_runs()
    assert (starts.tolist(), counts.tolist()) == ([edge - 2, edge + 9], [4, 1])
    starts, counts = index_of(octets).pfn_runs(edge - 1, edge + 1)
    assert (starts.tolist(), counts.tolist()) == ([edge - 1], [2])


def test_a_type_without_content_that_comes_last_takes_the_page_away() -> None:
    octets = stream(
        STATIC_DATA_END, pages(0, [1, 2, 3, 4]), page_data([(1, XTAB), (2, XALLOC), (3, BROKEN)], b""), END
    )
    index = index_of(octets)
    assert content(octets, index) == {0: 1}
    assert index.count_by_type() == {NOTAB: 1, XTAB: 1, XALLOC: 1, BROKEN: 1}
    looked_up = index.lookup(np.array([2, 7, 1 << 51], np.uint64))
    assert looked_up.types.tolist() == [XALLOC, XTAB, XTAB]
    assert looked_up.offsets.tolist() == [-1, -1, -1]


def test_pages_sent_again_to_be_compared_are_not_looked_at() -> None:
    octets = stream(STATIC_DATA_END, pages(0, [1]), libxc.Verify(), pages(0, [2]), *TAIL, END)
    assert content(octets, index_of(octets)) == {0: 1}


ROUNDS = (
    STATIC_DATA_END,
    *(pages(0, [1, 1, 1]), *TAIL, CHECKPOINT),
    *(pages(1, [2]), libxc.X86TscInfo(mode=0, khz=2, nsec=0, incarnation=0), CHECKPOINT),
    *(pages(2, [3]), libxc.X86TscInfo(mode=0, khz=3, nsec=0, incarnation=0)),
)


@pytest.mark.parametrize("ending", [b"", build.record(0), build.page_data([0], build.page(4))[:30]])
def test_what_follows_the_last_complete_checkpoint_is_void(ending: bytes) -> None:
    octets = stream(*ROUNDS) + ending
    index = index_of(octets)
    assert content(octets, index) == {0: 1, 1: 2, 2: 1}
    assert index.checkpoints == 2
    assert [r.khz for r in index.state.state if isinstance(r, libxc.X86TscInfo)] == [2]


def test_an_earlier_checkpoint_can_be_asked_for() -> None:
    octets = stream(*ROUNDS)
    assert content(octets, index_of(octets, checkpoint=1)) == {0: 1, 1: 1, 2: 1}
    with pytest.raises(FormatError, match="checkpoint 3 was asked for; the stream has 2"):
        index_of(octets, checkpoint=3)


def test_a_cut_stream_is_an_error_unless_a_part_will_do() -> None:
    octets = stream(STATIC_DATA_END, pages(0, [1]), pages(1, [2, 3]))[:-100]
    with pytest.raises(TruncatedError) as caught:
        index_of(octets)
    assert caught.value.offset == len(octets)
    index = index_of(octets, partial=True)
    assert content(octets, index) == {0: 1, 1: 2}
    assert isinstance(index.error, TruncatedError)


def test_a_pfn_past_max_memory_is_refused_with_its_record() -> None:
    octets = stream(STATIC_DATA_END, pages(15, [1, 2]), END)
    assert index_of(octets, max_memory=17 * 4096).end == 17
    with pytest.raises(FormatError, match=r"PFN 0x10 is past the 65,536 octets") as caught:
        index_of(octets, max_memory=16 * 4096)
    assert caught.value.offset == 48
    with pytest.raises(FormatError, match="the default, 64 GiB"):
        index_of(stream(STATIC_DATA_END, pages(1 << 24, [1]), END))
    with pytest.raises(FormatError, match="PFN 0xfffffffffffff"):
        index_of(stream(STATIC_DATA_END, page_data([((1 << 52) - 1, XTAB)], b""), END))


def test_a_pv_guest_ends_where_its_p2m_ends() -> None:
    guest = PvGuest()
    parts = [guest.info(), STATIC_DATA_END, guest.p2m_frames()]
    assert index_of(stream(*parts, pages(1023, [1]), END, guest=libxc.GuestType.PV)).end == 1024
    with pytest.raises(FormatError, match="end of the guest's p2m"):
        index_of(stream(*parts, pages(1024, [1]), END, guest=libxc.GuestType.PV))


def test_the_config_of_an_xl_file_implies_a_limit() -> None:
    config = b'{"b_info": {"max_memkb": 4096}}\0'
    head = b"Xen saved domain, xl format\n \0 \r" + struct.pack("<IIII", 0x01020304, 3, 0, 4 + len(config))
    head += struct.pack("<I", len(config)) + config

    def xl(first: int) -> bytes:
        image = stream(STATIC_DATA_END, pages(first, [1]), END)
        return head + build.libxl(build.record(build.LIBXC_CONTEXT), image, build.record(0))

    highest = (1 << 20) + 1024 - 1  # 4 GiB and 4 MiB, in pages
    assert index_of(xl(highest)).end == highest + 1
    with pytest.raises(FormatError, match=r"b_info.max_memkb"):
        index_of(xl(highest + 1))


@pytest.mark.parametrize("type", [5, 8])
def test_a_reserved_type_is_refused(type: int) -> None:
    with pytest.raises(FormatError, match=f"type {type} of PFN 0x3 is reserved"):
        index_of(stream(STATIC_DATA_END, page_data([(3, type)], bytes(4096)), END))


@pytest.mark.parametrize("surplus", [-8, 8, 4096])
def test_a_record_whose_length_is_not_that_of_its_pages_is_refused(surplus: int) -> None:
    body = struct.pack("<IIQQ", 2, 0, 0, 1) + bytes(2 * 4096 + surplus)
    with pytest.raises(FormatError, match="expected 24 octets of entries") as caught:
        index_of(stream(STATIC_DATA_END, build.record(1, body), END))
    assert caught.value.field == "length"


@given(
    st.lists(
        st.lists(
            st.tuples(st.integers(0, 40), st.sampled_from([0, 0, 0, 1, 0xA, XTAB, XALLOC, BROKEN])),
            min_size=1,
        ),
        max_size=6,
    ),
    st.sampled_from(["little", "big"]),
)
def test_any_batches_end_as_a_dictionary_would(batches: list[list[tuple[int, int]]], order: str) -> None:
    expected: dict[int, tuple[int, int | None]] = {}
    octets = build.header(order) + build.record(build.STATIC_DATA_END, order=order)
    fill = 0
    for batch in batches:
        body = b""
        for pfn, type in batch:
            has_data = type < XALLOC - 1
            fill = (fill + 1) % 256
            expected[pfn] = type, fill if has_data else None
            body += build.page(fill) if has_data else b""
        octets += build.page_data([type << 60 | pfn for pfn, type in batch], body, order)
    octets += build.record(build.END, order=order)
    index = index_of(octets)
    assert content(octets, index) == {p: f for p, (_, f) in expected.items() if f is not None}
    named = [(int(p), int(t)) for b in index.batches() for p, t in zip(b.pfns, b.types, strict=True)]
    assert named == sorted((p, t) for p, (t, _) in expected.items())


def test_a_pipe_is_made_seekable_by_a_copy(tmp_path: Path) -> None:
    octets = stream(STATIC_DATA_END, pages(0, [7]), END)
    receiving, sending = os.pipe()
    with io.FileIO(sending, "w") as out, io.FileIO(receiving) as pipe:

        def send() -> None:
            out.write(octets)
            out.close()

        sender = threading.Thread(target=send)
        sender.start()
        with migstream.open(pipe.fileno()) as source, seekable(source) as spooled:
            assert spooled.spooled
            (run,) = PageIndex.of(spooled.stream).runs()
            page = bytearray(4096)
            spooled.input.position = run.offset
            spooled.input.readv_into([memoryview(page)])
            assert page == build.page(7)
        sender.join()
    path = tmp_path / "stream"
    path.write_bytes(octets)
    with migstream.open(path) as source, seekable(source) as same:
        assert not same.spooled
