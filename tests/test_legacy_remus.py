"""Checkpointed legacy streams: several states, compressed pages, and what is left when the sender dies."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migstream.errors import FormatError, MigstreamError, TruncatedError
from migstream.io.detect import open_input
from migstream.io.inputs import MemoryInput
from migstream.io.writer import StreamWriter
from migstream.legacy import compression, convert_legacy, waiting
from migstream.legacy.compression import DeltaError, apply_delta
from migstream.records import libxc, libxl
from tests import legacy_streams as old
from tests.build import fed
from tests.converted import convert
from tests.legacy_streams import PvGuest, Words, page

WIDTHS = pytest.mark.parametrize("width", [4, 8], ids=["32-bit toolstack", "64-bit toolstack"])
SIGNATURE = b"RemusDeviceModelState"


def state(number: int) -> bytes:
    """Return the end of a body, and an HVM tail, that are told from those of other states."""
    return old.mark(0) + old.hvm_tail(b"context %d" % number) + old.qemu(b"QEVM %d" % number, SIGNATURE)


def remus(width: int, *rounds: bytes, compressed: bool = False) -> bytes:
    """Return the stream of an HVM guest of 16 pages, of which page n holds n, and of further rounds.

    Each round is a body without its end; ``compressed``: pages come as deltas from the second state on.
    """
    words = Words(width)
    first = words.words(0x1000) + words.batch(range(16), b"".join(map(page, range(16)))) + old.tsc()
    if compressed:
        first += old.mark(old.ENABLE_COMPRESSION)
    return first + state(0) + b"".join(body + state(i) for i, body in enumerate(rounds, 1))


def fills(converted: Any) -> dict[int, int]:
    """Return the first octet of each page."""
    return {pfn: content[0] for pfn, (_, content) in converted.pages.items()}


# States


@WIDTHS
def test_of_several_states_the_last_is_written_with_all_pages_so_far(width: int) -> None:
    words = Words(width)
    legacy = remus(
        width,
        words.batch([3, 4], page(0x33) + page(0x34)),
        words.batch([4], page(0x44)) + old.param(old.CONSOLE_PFN, 0x55),
    )
    converted = convert(legacy)
    assert fills(converted) == {pfn: pfn for pfn in range(16)} | {3: 0x33, 4: 0x44}
    assert converted.one(libxc.HvmContext).hvm_ctx == b"context 2"
    assert converted.one(libxl.EmulatorContext).emulator_ctx == b"QEVM 2"
    assert converted.params["CONSOLE_PFN"] == 0x55
    assert converted.one(libxc.X86TscInfo).khz == 2_600_000  # told in the first round only
    assert converted.types.count("CHECKPOINT") == 0  # a plain stream: any restore takes it
    assert converted.report.states == 3
    assert converted.report.pages == 16 + 2 + 1


@WIDTHS
def test_pv_guests_have_checkpoints_too(width: int) -> None:
    guest = PvGuest(width, 8, vcpus=(0, 1))
    first = guest.start() + guest.memory() + old.vcpu_info(1, 0b11) + old.mark(0) + guest.tail()
    second = Words(width).batch([2], page(0x99)) + old.mark(0) + guest.tail()
    converted = convert(first + second)
    assert converted.pages[2][1] == page(0x99)
    assert [vcpu.vcpu_id for vcpu in converted.all(libxc.X86PvVcpuBasic)] == [0, 1]
    assert converted.report.states == 2


def test_a_stream_known_to_be_plain_ends_with_its_first_state() -> None:
    legacy = remus(8, Words(8).batch([3], page(0x33)))
    assert convert(legacy, checkpointed=False).report.states == 1


@WIDTHS
@pytest.mark.parametrize("compressed", [False, True], ids=["whole pages", "compressed"])
def test_a_state_that_is_cut_short_is_dropped_with_its_pages(width: int, compressed: bool) -> None:
    words = Words(width)
    body = words.batch([3, 4], b"" if compressed else page(0x33) + page(0x34))
    if compressed:
        body += words.compressed(b"\x80" + page(0x33) + b"\x80" + page(0x34))
    whole = remus(width, body, compressed=compressed)
    start = len(remus(width, compressed=compressed))
    complete = convert(whole[:start])
    for cut in [
        *range(start, start + 40),
        *range(start + 40, len(whole) - 100, 501),
        *range(len(whole) - 100, len(whole)),
    ]:
        converted = convert(whole[:cut])
        assert converted.octets == complete.octets, cut
        if cut > start:
            assert "the output has state 1, the last complete one" in converted.report.warnings[0]
            assert f"offset {cut} " in converted.report.warnings[0]
    assert fills(convert(whole))[3] == 0x33


def test_damage_in_a_later_state_is_an_error_all_the_same() -> None:
    with pytest.raises(FormatError, match="expected a chunk"):
        convert(remus(8, old.mark(-77)))


def test_a_cut_in_the_first_state_is_an_error() -> None:
    legacy = remus(8)
    with pytest.raises(TruncatedError) as caught:
        convert(legacy[:-1])
    assert caught.value.offset == len(legacy) - 1


def test_checkpoints_from_a_pipe_are_as_those_from_a_file(tmp_path: Path) -> None:
    words = Words(8)
    rounds = [words.batch([i], page(0xA0 + i)) for i in range(10)]
    legacy = remus(8, *rounds)
    expected = convert(legacy).octets
    path = tmp_path / "legacy"
    path.write_bytes(legacy)
    assert convert(open_input(path)).octets == expected
    with fed(legacy, piece=1000) as descriptor:
        assert convert(open_input(descriptor)).octets == expected


# Compressed pages


@WIDTHS
def test_compressed_pages_by_hand(width: int) -> None:
    words = Words(width)
    whole = bytes.fromhex("80") + page(0x33) + bytes.fromhex("80") + page(0x44)
    # Second state, of pages 3 and 4. Page 3: skip 1 word, 2 words, skip 127 x 8, skip 5. Page 4: as it was.
    delta = bytes.fromhex("81 02 aaaaaaaabbbbbbbb" + "ff" * 8 + "85" + "00")
    legacy = remus(
        width,
        words.batch([3]) + words.batch([4]) + words.compressed(whole),
        words.batch([3, 4]) + words.compressed(delta),
        compressed=True,
    )
    pages = convert(legacy).pages
    assert pages[3][1] == page(0x33)[:4] + b"\xaa" * 4 + b"\xbb" * 4 + page(0x33)[12:]
    assert pages[4][1] == page(0x44)


def test_batches_and_data_may_come_in_any_grouping_and_deltas_may_be_torn() -> None:
    words = Words(8)
    data = b"".join(b"\x80" + page(0x30 + i) for i in range(6))
    batches = [
        words.batch([0, 0x2000_0001 | 0xD000_0000]),
        words.batch([2]),
        words.batch([3, 4]),
        words.batch([5]),
    ]
    del batches[0]
    apart = [
        words.batch([0, 0xD000_0007, 1]),
        words.compressed(data[:5000]),
        words.batch([0xE000_0008]),
        words.compressed(data[5000:8194]),
        words.batch([2, 3]),
        words.batch([4, 5]),
        words.compressed(b""),
        words.compressed(data[8194:8195]),
        words.compressed(data[8195:]),
    ]
    converted = convert(remus(8, b"".join(apart), compressed=True))
    assert [converted.pages[pfn][1] for pfn in range(6)] == [page(0x30 + pfn) for pfn in range(6)]
    assert converted.history[16:][1][:2] == (7, 0xD)
    assert converted.history[16:][3][:2] == (8, 0xE)


def test_compression_starts_behind_the_tail_of_the_state_that_enables_it() -> None:
    words = Words(8)
    legacy = (
        words.words(0x1000)
        + old.mark(old.ENABLE_COMPRESSION)
        + words.batch([1], page(0x11))
        + state(0)
        + words.batch([1])
        + words.compressed(b"\x80" + page(0x12))
        + state(1)
    )
    assert fills(convert(legacy)) == {1: 0x12}


W = Words(8)
ONE = W.batch([3])  # 12 octets
TWO = W.batch([3, 3])  # 20 octets
HEAD = 12  # octets before compressed data
WHOLE = b"\x80" + page(1)


@pytest.mark.parametrize(
    ("body", "at", "message"),
    [
        (ONE + W.compressed(b"\x00"), 12 + HEAD, "no whole page"),
        (W.compressed(WHOLE), HEAD, "every PFN of the batches before has its page"),
        (ONE + W.compressed(WHOLE + b"\x00"), 12 + HEAD + 4097, "every PFN"),
        (TWO + W.compressed(WHOLE + b"\x81\x00"), 20 + HEAD + 4098, "marker 0x00 .* no words"),
        (TWO + W.compressed(WHOLE + b"\x81\x80"), 20 + HEAD + 4098, "marker 0x80 .* no words"),
        (TWO + W.compressed(WHOLE + b"\xff" * 9), 20 + HEAD + 4097 + 8, "a run of 508 octets at 4064"),
        (TWO + W.compressed(WHOLE + b"\x81") + W.compressed(b"\x00"), 20 + 2 * HEAD + 4098, "no words"),
        (ONE, 12 + 4, "1 pages of its batches are not there; 0 octets"),
        (
            ONE + W.compressed(b"\x80abc"),
            12 + HEAD + 4 + 4,
            "1 pages .* 4 octets of compressed data are left",
        ),
    ],
)
def test_compressed_data_that_make_no_pages_are_refused_with_the_place(
    body: bytes, at: int, message: str
) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        convert(remus(8, body, compressed=True))
    assert caught.value.offset == len(remus(8, compressed=True)) + at
    assert caught.value.layer == "legacy"


def test_batches_that_wait_for_pages_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compression.MAX_WAITING > 8192  # what savers collect
    monkeypatch.setattr(compression, "MAX_WAITING", 4)
    assert convert(remus(8, ONE * 4 + W.compressed(WHOLE * 4), compressed=True)).report.pages == 16 + 4
    with pytest.raises(FormatError, match="more than 4 batches wait"):
        convert(remus(8, ONE * 5, compressed=True))


def test_compressed_data_that_nobody_announced_are_refused() -> None:
    with pytest.raises(FormatError, match="no ENABLE_COMPRESSION") as caught:
        convert(remus(8, Words(8).compressed(b"\x00")))
    assert caught.value.offset == len(remus(8))


# Deltas against an oracle


def sender(new: bytes, old_page: bytes, runs: list[int]) -> bytes:
    """Return a delta from ``old_page`` to ``new``, with no run longer than ``runs`` says, in turn."""
    if new == old_page:
        return b"\x00"
    out = bytearray()
    at = turn = 0
    while at < 1024:
        same = new[4 * at : 4 * at + 4] == old_page[4 * at : 4 * at + 4]
        length = 1
        limit = runs[turn % len(runs)]
        turn += 1
        while (
            at + length < 1024
            and length < limit
            and (new[4 * (at + length) :][:4] == old_page[4 * (at + length) :][:4]) == same
        ):
            length += 1
        out += bytes([length | (0x80 if same else 0)])
        if not same:
            out += new[4 * at : 4 * (at + length)]
        at += length
    return bytes(out)


WORDS = st.lists(st.tuples(st.integers(0, 1023), st.binary(min_size=4, max_size=4)), max_size=12)


def changed(content: bytes, words: list[tuple[int, bytes]]) -> bytes:
    """Return a page with some words replaced."""
    out = bytearray(content)
    for at, word in words:
        out[4 * at : 4 * at + 4] = word
    return bytes(out)


@given(before=WORDS, after=WORDS, runs=st.lists(st.integers(1, 127), min_size=1, max_size=5), cut=st.data())
@settings(max_examples=100, deadline=None)
def test_a_delta_makes_the_new_page_of_the_old_one_and_is_whole_only_at_its_end(
    before: list[tuple[int, bytes]], after: list[tuple[int, bytes]], runs: list[int], cut: st.DataObject
) -> None:
    base = changed(page(7), before)
    new = changed(base, after)
    delta = sender(new, base, runs)
    target = bytearray(base)
    assert apply_delta(b"xy" + delta + b"more", 2, memoryview(target)) == 2 + len(delta)
    assert bytes(target) == new
    short = cut.draw(st.integers(0, len(delta) - 1))
    assert apply_delta(delta[:short], 0, memoryview(bytearray(base))) is None


@given(octets=st.binary(min_size=1, max_size=6000))
@settings(max_examples=200, deadline=None)
def test_any_octets_are_a_delta_or_are_refused_within_bounds(octets: bytes) -> None:
    target = bytearray(page(0))
    try:
        behind = apply_delta(octets, 0, memoryview(target))
    except DeltaError as exc:
        behind = exc.position + 1
    assert behind is None or 0 < behind <= len(octets)
    assert len(target) == 4096


PAGES = st.lists(st.tuples(st.integers(0, 7), WORDS), min_size=1, max_size=8)


@given(
    width=st.sampled_from([4, 8]),
    rounds=st.lists(PAGES, min_size=1, max_size=4),
    runs=st.lists(st.integers(1, 127), min_size=1, max_size=4),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_a_guest_that_came_compressed_is_the_guest_that_was_sent(
    width: int, rounds: list[list[tuple[int, list[tuple[int, bytes]]]]], runs: list[int], data: st.DataObject
) -> None:
    words = Words(width)
    memory = {pfn: page(pfn) for pfn in range(16)}
    cache: dict[int, bytes] = {}  # the sender's: what it sent compressed
    bodies = []
    for changes in rounds:
        batches = b""
        deltas = b""
        for pfn, change in changes:
            memory[pfn] = changed(memory[pfn], change)
            raw = pfn not in cache or data.draw(st.integers(0, 3)) == 0  # now and then it was evicted
            deltas += b"\x80" + memory[pfn] if raw else sender(memory[pfn], cache[pfn], runs)
            cache[pfn] = memory[pfn]
            batches += words.batch([pfn])
        cut = data.draw(st.integers(0, len(deltas)))
        bodies.append(batches + words.compressed(deltas[:cut]) + words.compressed(deltas[cut:]))
    converted = convert(remus(width, *bodies, compressed=True))
    assert {pfn: content for pfn, (_, content) in converted.pages.items()} == memory


# Room


class FullAfter(StreamWriter):
    """A writer whose disk is full after so many octets."""

    room = 0

    def write(self, *buffers: bytes | bytearray | memoryview) -> None:
        super().write(*buffers)
        if self.written > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")


def test_no_room_for_what_waits_is_an_error_that_names_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "StreamWriter", FullAfter)
    with pytest.raises(MigstreamError, match=f"no room in {tmp_path} for pages of a checkpoint"):
        convert(remus(8, Words(8).batch([3], page(0x33))), directory=str(tmp_path))
    assert convert(remus(8), directory=str(tmp_path)).report.states == 1


def test_a_full_output_is_not_taken_for_a_full_temporary_directory() -> None:
    with tempfile.TemporaryFile() as output:
        writer = FullAfter(output.fileno())
        writer.room = 100  # the headers fit
        with pytest.raises(OSError, match="No space left"):
            convert_legacy(MemoryInput(remus(8)), writer)
