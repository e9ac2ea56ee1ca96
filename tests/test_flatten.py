"""Flattened streams are the same machine as what they came from, each page once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.streams import write_hvm_image
from migstream.converting import ConvertError
from migstream.engines.common import StreamType
from migstream.engines.restore import RestoreCallbacks, restore
from migstream.errors import FormatError, TruncatedError
from migstream.guests.compare import differing_pfns, differing_records
from migstream.guests.model import ModelGuest
from migstream.guests.workload import Workload
from migstream.io import reader
from migstream.records import PageData, libxc, libxl
from migstream.records.libxc import GuestType
from migstream.records.page_types import PageType

from . import build
from .conversions import captures, converted, findings, records, types, unpacked
from .streams import (
    CONTEXT,
    CPUID,
    MSRS,
    NOTAB,
    PAGE,
    STATIC_DATA_END,
    TSC,
    VERIFY,
    PvGuest,
    headers,
    hvm,
    page,
    page_data,
    pages,
    params,
    raw,
    stream,
)
from .test_failover import saved

XALLOC, XTAB, BROKEN = PageType.XALLOC, PageType.XTAB, PageType.BROKEN


def flat(octets: bytes, to: str = "libxc3", **options: Any) -> bytes:
    return converted(octets, to, **({"flatten": True} | options))


def memory(octets: bytes) -> list[tuple[int, int, bytes]]:
    """Return (PFN, type, content) of every entry, in the order of the stream: a reader of its own."""
    found = []
    with reader.open_memory(octets) as source:
        for frame in source:
            if not frame.is_page_data:
                continue
            record = frame.record()
            assert isinstance(record, PageData)
            for pfn, type in zip(record.pfns.tolist(), record.types.tolist(), strict=True):
                content = frame.read(PAGE) if PageType(type).has_data else b""
                found.append((pfn, type, content))
    return found


def restored(octets: bytes, n_pages: int, guest_type: GuestType, kind: StreamType) -> ModelGuest:
    target = ModelGuest.empty(n_pages, guest_type, seed=7)
    with reader.open_memory(octets) as source:
        restore(target, source, stream_type=kind, callbacks=RestoreCallbacks(checkpoint=lambda: 1))
    return target


def test_each_page_is_written_once_with_its_last_content_in_the_order_of_pfns() -> None:
    octets = hvm(pages(5, [1, 2, 3]), pages(2, [4]), pages(6, [9]), pages(5, [8]))
    expected = [(2, 0, page(4)), (5, 0, page(8)), (6, 0, page(9)), (7, 0, page(3))]
    assert memory(flat(octets)) == expected
    assert flat(octets) == hvm(page_data([(2, 0), (5, 0), (6, 0), (7, 0)], b"".join(c for *_, c in expected)))


def test_the_last_of_a_pfn_that_is_named_twice_in_one_record_counts() -> None:
    octets = hvm(page_data([(3, NOTAB), (3, NOTAB)], page(1) + page(2)))
    assert memory(flat(octets)) == [(3, 0, page(2))]


def test_entries_keep_the_type_named_last() -> None:
    first = page_data([(pfn, NOTAB) for pfn in range(5)], b"".join(map(page, range(5))))
    last = page_data([(0, XTAB), (1, XALLOC), (2, BROKEN), (3, PageType.L1TAB), (9, XTAB)], page(7))
    found = memory(flat(PvGuest().stream(first, last)))
    assert [(pfn, type, content[:1]) for pfn, type, content in found if pfn in (0, 1, 2, 3, 4, 9)] == [
        (0, XTAB, b""),
        (1, XALLOC, b""),
        (2, BROKEN, b""),
        (3, PageType.L1TAB, b"\7"),
        (4, NOTAB, b"\4"),
        (9, XTAB, b""),
    ]


def test_verify_mode_goes_with_its_pages() -> None:
    octets = hvm(pages(0, [1]), VERIFY, pages(0, [2]))
    assert flat(octets) == hvm(pages(0, [1]))


def remus(*rounds: bytes, end: bytes = b"") -> bytes:
    """Return a bare image with a checkpoint behind each round, whose TSC has the round's number."""
    parts = [stream(CPUID, MSRS, STATIC_DATA_END)]
    for number, content in enumerate(rounds, 1):
        tsc = libxc.X86TscInfo(mode=1, khz=1, nsec=2, incarnation=number)
        parts += [content, raw(8, tsc.build()), raw(9, CONTEXT.hvm_ctx), raw(0x0E)]
    return b"".join(parts) + end


def incarnations(octets: bytes) -> list[int]:
    return [r.incarnation for r in records(octets, libxc.X86TscInfo) if isinstance(r, libxc.X86TscInfo)]


@pytest.mark.parametrize(
    ("wanted", "fills"), [(1, [1, 1, 1]), (2, [1, 2, 1]), (3, [3, 2, 1]), (None, [3, 2, 1])]
)
def test_a_checkpoints_state_is_its_pages_and_its_records(wanted: int | None, fills: list[int]) -> None:
    octets = remus(pages(0, [1, 1, 1]), pages(1, [2]), pages(0, [3]), end=pages(2, [4]))
    found = flat(octets, checkpoint=wanted)
    assert [content[0] for *_, content in memory(found)] == fills
    assert incarnations(found) == [wanted or 3]
    assert "CHECKPOINT" not in types(found)
    assert types(found)[-1] == "END"


@pytest.mark.parametrize("end", [b"", b"\1", raw(8, TSC.build()), pages(2, [4])[:-1], raw(0)])
def test_what_follows_the_last_checkpoint_is_void_however_the_stream_ends(end: bytes) -> None:
    notes: list[str] = []
    found = converted(remus(pages(0, [1]), end=end), "libxc3", notes, flatten=True)
    assert incarnations(found) == [1]
    assert notes[1] == "this is the state at checkpoint 1"


def test_state_of_an_earlier_checkpoint_stays_where_a_later_one_has_none_of_its_kind() -> None:
    octets = remus(raw(0x0A, params(STORE_PFN=5).build()) + pages(0, [1]), pages(0, [2]))
    assert records(flat(octets), libxc.HvmParams) == [params(STORE_PFN=5)]


def test_a_checkpoint_that_is_not_there_is_refused_with_how_many_there_are() -> None:
    with pytest.raises(ConvertError, match="no checkpoint 3: the stream has 2 complete checkpoints"):
        flat(remus(pages(0, [1]), pages(0, [2])), checkpoint=3)
    with pytest.raises(ConvertError, match="no checkpoint 1: the stream has no checkpoints"):
        flat(hvm(pages(0, [1])), checkpoint=1)


def test_emulator_records_of_the_last_checkpoint_stay_one_of_each_emulator() -> None:
    def emulator(index: int, state: bytes) -> bytes:
        return build.record(build.EMULATOR_CONTEXT, bytes([2, 0, 0, 0, index, 0, 0, 0]) + state)

    def round_(fill: int) -> bytes:
        return build.page_data([1], page(fill)) + build.record(build.CHECKPOINT) + emulator(0, bytes([fill]))

    end = build.record(build.CHECKPOINT_END)
    image = build.record(build.LIBXC_CONTEXT) + build.header() + build.record(build.STATIC_DATA_END)
    octets = build.libxl(image, round_(1), emulator(1, b"other"), end, round_(2), end, round_(3))
    found = flat(octets, "libxl")
    assert [
        r.emulator_ctx for r in records(found, libxl.EmulatorContext) if isinstance(r, libxl.EmulatorContext)
    ] == [
        b"other",
        b"\2",
    ]
    assert types(found) == [
        "libxl",
        "LIBXC_CONTEXT",
        "libxc",
        "STATIC_DATA_END",
        "PAGE_DATA",
        "END",
        "EMULATOR_CONTEXT",
        "EMULATOR_CONTEXT",
        "END",
    ]


def test_unknown_records_stay() -> None:
    octets = hvm(pages(0, [1]), raw(0x8000_0099, b"optional"))
    assert "OPTIONAL_0x80000099" in types(flat(octets))


def test_zero_pages_become_allocate_only_but_page_tables_do_not() -> None:
    octets = PvGuest(types={8: PageType.L1TAB}).stream()
    found = {pfn: type for pfn, type, _ in memory(flat(octets, drop_zero=True))}
    assert found[0] == found[1] == XALLOC
    assert [found[pfn] for pfn in (5, 6, 7, 8)] == [PageType.L4TAB_PIN, 3, 2, 1]
    assert found[3] == NOTAB  # the start info is not empty


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 1024])
def test_records_have_the_pages_asked_for(batch: int) -> None:
    octets = hvm(pages(0, [1, 2, 3, 4, 5]), pages(9, [6, 7]))
    found = flat(octets, batch=batch)
    counts = [r.count for r in records(found, PageData) if isinstance(r, PageData)]
    assert counts == [batch] * (7 // batch) + [7 % batch] * bool(7 % batch)
    assert memory(found) == memory(octets)


def test_the_byte_order_stays() -> None:
    octets = build.image("big")
    found = flat(octets)
    assert memory(found) == memory(octets)
    assert findings(found) == findings(octets)


@settings(max_examples=25, deadline=None)
@given(
    guest_type=st.sampled_from(GuestType),
    kind=st.sampled_from([StreamType.PLAIN, StreamType.REMUS]),
    seed=st.integers(0, 1 << 30),
    batch=st.sampled_from([None, 1, 77]),
    drop_zero=st.booleans(),
    where=st.floats(0, 1),
)
def test_a_flattened_stream_restores_to_the_machine_that_the_stream_restores_to(
    guest_type: GuestType,
    kind: StreamType,
    seed: int,
    batch: int | None,
    drop_zero: bool,
    where: float,
) -> None:
    source = ModelGuest.booted(200, guest_type, seed=seed)
    work = Workload(source, seed=seed, working_set=100, turmoil=0.5)
    octets, kept = saved(source, lambda: work.step(20), 3, kind, 64)
    cut = len(octets) if kind is StreamType.PLAIN else int(kept[0][0] + where * (len(octets) - kept[0][0]))
    found = flat(octets[:cut], batch=batch, drop_zero=drop_zero)
    assert findings(found) == []
    pfns = [pfn for pfn, *_ in memory(found)]
    assert pfns == sorted(set(pfns))
    one = restored(octets[:cut], 200, guest_type, kind)
    other = restored(found, 200, guest_type, StreamType.PLAIN)
    differing = differing_pfns(one, other)
    if drop_zero:  # only the type, and only where nothing is in the page
        dropped = {pfn for pfn, type, _ in memory(found) if type == XALLOC}
        assert set(differing.tolist()) <= dropped
        assert not one.memory.words[differing].any()
    else:
        assert differing.tolist() == []
    assert differing_records(one, other) == []


@settings(max_examples=40, deadline=None)
@given(data=st.data(), n_records=st.integers(1, 8), batch=st.integers(1, 9), drop_zero=st.booleans())
def test_any_order_of_pages_comes_out_as_an_oracle_says(
    data: st.DataObject, n_records: int, batch: int, drop_zero: bool
) -> None:
    kinds = st.sampled_from([NOTAB, NOTAB, PageType.L1TAB, XALLOC, XTAB, BROKEN])
    entry = st.tuples(st.integers(0, 12), kinds, st.integers(0, 2))
    oracle: dict[int, tuple[int, bytes]] = {}
    written = []
    for _ in range(n_records):
        entries = data.draw(st.lists(entry, min_size=1, max_size=6))
        with_data = [(p, k, f) for p, k, f in entries if PageType(k).has_data]
        written.append(page_data([(p, k) for p, k, _ in entries], b"".join(page(f) for *_, f in with_data)))
        for pfn, kind, fill in entries:
            content = page(fill) if PageType(kind).has_data else b""
            empty = drop_zero and kind == NOTAB and not fill
            oracle[pfn] = (XALLOC, b"") if empty else (kind, content)
    found = memory(flat(hvm(*written), batch=batch, drop_zero=drop_zero))
    assert found == [(pfn, *oracle[pfn]) for pfn in sorted(oracle)]


# Bad input


def test_a_cut_plain_stream_is_refused_with_the_place() -> None:
    octets = hvm(pages(0, [1, 2]))
    with pytest.raises(TruncatedError) as caught:
        flat(octets[:-10])
    assert caught.value.offset is not None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (page_data([(0, 5)], b""), "reserved"),
        (page_data([(0, 0)], b""), "body has 16"),
        (page_data([(0, 0)], page(1) * 2), "body has"),
        (page_data([(1 << 40, 0)], page(1)), "--max-memory"),
        (raw(1, b"\1"), "PAGE_DATA|PageData"),
    ],
)
def test_a_wrong_record_is_refused_with_its_place(wrong: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        flat(hvm(wrong))
    assert caught.value.record is not None


def test_a_pfn_past_max_memory_is_refused() -> None:
    octets = hvm(pages(9, [1]))
    assert memory(flat(octets, max_memory=10 * PAGE)) == memory(octets)
    with pytest.raises(FormatError, match="PFN 0x9 is past"):
        flat(octets, max_memory=9 * PAGE)


def test_pages_of_another_size_and_second_images_are_refused() -> None:
    with pytest.raises(FormatError, match="2\\^13 octets"):
        flat(headers(page_shift=13) + raw(0))
    image = build.record(build.LIBXC_CONTEXT) + build.image()
    with pytest.raises(FormatError, match="a second libxc header"):
        flat(build.libxl(image, image, build.record(0)), "libxl")


# Real captures


@pytest.mark.parametrize("capture", captures(), ids=lambda path: path.name.split(".")[0])
def test_flattened_captures_are_sound_and_hold_the_same_machine(capture: Path) -> None:
    octets = unpacked(capture)
    found = flat(octets, "xl")
    assert findings(found) == []
    assert types(found)[-1] == "END"
    assert len(found) <= len(octets)
    again = flat(found, "xl")
    assert again == found  # nothing is left to do
    if capture.name.startswith("tinypv-"):
        with reader.open_memory(octets) as stream_:
            list(stream_)
        last = {
            pfn: (type, content) for pfn, type, content in memory(octets[: stream_.checkpoint_offset or None])
        }
        assert {pfn: (type, content) for pfn, type, content in memory(found)} == last


def test_the_memory_that_flattening_takes_is_that_of_the_index(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    write_hvm_image(small, 4 << 20)
    write_hvm_image(large, 256 << 20)
    peaks = [_peak_octets(path, tmp_path / "out") for path in (small, large)]
    pages_more = (252 << 20) // PAGE
    assert peaks[1] - peaks[0] < 16 * pages_more + (6 << 20)  # the rest is the interpreter's own noise


def _peak_octets(source: Path, out: Path) -> int:
    code = (
        "import os, resource, sys\n"
        "from migstream.converting import *\n"
        "from migstream.io import reader\n"
        "fd = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)\n"
        "with reader.open(sys.argv[1]) as stream:\n"
        "    convert(stream, fd, TARGETS['libxc3'], Options(flatten=True))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, source, out], capture_output=True, check=True)
    return int(run.stdout) * 1024
