"""Inputs: whatever the octets come from, any mix of reading, peeking and skipping gives the same ones."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import hypothesis.strategies as st
import pytest
import zstandard
from hypothesis import given, settings

from migstream.errors import DeadlineError, FormatError
from migstream.io.detect import open_input
from migstream.io.inputs import SCRATCH, WINDOW, CodecInput, DescriptorInput, FileInput, Input, MemoryInput
from tests.build import fed

SOON = 0.05  # seconds


def some(length: int) -> bytes:
    return random.Random(length).randbytes(length)


def zstd(octets: bytes) -> bytes:
    """Compress in two frames, which decompress to the octets in a row."""
    half = len(octets) // 2
    return zstandard.compress(octets[:half]) + zstandard.compress(octets[half:])


def xz(octets: bytes) -> bytes:
    """Compress in two streams with padding between and after them."""
    half = len(octets) // 2
    return lzma.compress(octets[:half], preset=0) + bytes(8) + lzma.compress(octets[half:]) + bytes(4)


CODECS: dict[str, Callable[[bytes], bytes]] = {"zstd": zstd, "gzip": gzip.compress, "xz": xz}


@contextmanager
def file_of(octets: bytes) -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        file.write(octets)
        file.flush()
        file.seek(0)
        yield file.fileno()


@contextmanager
def from_file(octets: bytes) -> Iterator[Input]:
    with file_of(octets) as descriptor:
        yield FileInput(descriptor, owned=False)


@contextmanager
def from_inside_a_file(octets: bytes) -> Iterator[Input]:
    with file_of(b"before" + octets) as descriptor:
        os.lseek(descriptor, 6, os.SEEK_SET)
        yield FileInput(descriptor, owned=False)


@contextmanager
def from_pipe(octets: bytes) -> Iterator[Input]:
    with fed(octets, piece=997) as descriptor:
        source = DescriptorInput(descriptor, owned=False)
        yield source
        source.close()


@contextmanager
def from_socket(octets: bytes) -> Iterator[Input]:
    ours, theirs = socket.socketpair()

    def send() -> None:
        with theirs, suppress(BrokenPipeError):
            theirs.sendall(octets)

    thread = threading.Thread(target=send, daemon=True)
    with ours:
        thread.start()
        yield DescriptorInput(ours.fileno(), owned=False, timeout_s=30)
    thread.join()


@contextmanager
def from_memory(octets: bytes) -> Iterator[Input]:
    yield MemoryInput(octets)


def from_codec(name: str) -> Callable[[bytes], AbstractContextManager[Input]]:
    @contextmanager
    def opened(octets: bytes) -> Iterator[Input]:
        with file_of(CODECS[name](octets)) as descriptor:
            source = open_input(descriptor)
            assert isinstance(source, CodecInput)
            yield source
            source.close()

    return opened


@contextmanager
def from_zstd_in_a_pipe(octets: bytes) -> Iterator[Input]:
    with fed(zstd(octets), piece=333) as descriptor:
        yield open_input(descriptor)


INPUTS: dict[str, Callable[[bytes], AbstractContextManager[Input]]] = {
    "file": from_file,
    "inside a file": from_inside_a_file,
    "pipe": from_pipe,
    "socket": from_socket,
    "memory": from_memory,
    "zstd": from_codec("zstd"),
    "gzip": from_codec("gzip"),
    "xz": from_codec("xz"),
    "zstd in a pipe": from_zstd_in_a_pipe,
}
every_input = pytest.mark.parametrize("kind", INPUTS)

OCTETS = some(50_005)
lengths = st.one_of(
    st.integers(0, 64), st.integers(WINDOW - 2, WINDOW + 2), st.sampled_from([4096, 9000, 1 << 20])
)
steps = st.one_of(
    st.tuples(st.sampled_from(["read", "some", "peek", "skip", "splice"]), lengths.map(lambda n: [n])),
    st.tuples(st.just("readv"), st.lists(lengths, max_size=4)),
)


@every_input
@settings(max_examples=30, deadline=None)
@given(script=st.lists(steps, max_size=10))
def test_any_mix_of_calls_gives_the_octets_in_order(kind: str, script: list[tuple[str, list[int]]]) -> None:
    position = 0
    with INPUTS[kind](OCTETS) as source, tempfile.TemporaryFile() as target:
        for call, sizes in script:
            expected = OCTETS[position : position + sum(sizes)]
            if call == "peek":
                assert source.peek(sizes[0]) == expected
                assert source.position == position
                continue
            if call == "some":
                some_of_it = source.read_some(sizes[0])
                assert expected.startswith(some_of_it)
                assert bool(some_of_it) == bool(expected)
                expected = some_of_it
            elif call == "read":
                assert source.read(sizes[0]) == expected
            elif call == "skip":
                assert source.skip(sizes[0]) == len(expected)
            elif call == "splice":
                target.seek(0)
                target.truncate()
                assert source.splice_to(target.fileno(), sizes[0]) == len(expected)
                target.seek(0)
                assert target.read() == expected
            else:
                buffers = [bytearray(size) for size in sizes]
                assert source.readv_into([memoryview(b) for b in buffers]) == len(expected)
                assert b"".join(buffers) == expected.ljust(sum(sizes), b"\0")
            position += len(expected)
            assert source.position == position
            assert source.remaining in (None, len(OCTETS) - position)


@every_input
def test_at_the_end_there_is_nothing_more(kind: str) -> None:
    with INPUTS[kind](b"octets") as source:
        assert source.read(100) == b"octets"
        assert (source.read(1), source.peek(1), source.skip(1)) == (b"", b"", 0)
        assert source.readv_into([memoryview(bytearray(3))]) == 0
        with open(os.devnull, "wb") as target:
            assert source.splice_to(target.fileno(), 5) == 0
        assert source.position == 6


@every_input
def test_no_octets_at_all(kind: str) -> None:
    with INPUTS[kind](b"") as source:
        assert source.peek(8) == b""
        assert source.read(0) == b""


@every_input
def test_buffers_of_pages_are_filled_and_empty_ones_passed_over(kind: str) -> None:
    import numpy as np

    pages = np.zeros((2, 4096), np.uint8)
    nothing = np.zeros((0, 4096), np.uint8)
    with INPUTS[kind](OCTETS) as source:
        source.peek(100)
        assert source.readv_into([nothing.data, pages.data, nothing.data]) == 8192
    assert pages.tobytes() == OCTETS[:8192]


# Files


def test_a_file_is_read_by_windows_not_by_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    pread = os.pread
    with from_file(OCTETS) as source:

        def counted(descriptor: int, length: int, offset: int) -> bytes:
            calls.append(length)
            return pread(descriptor, length, offset)

        monkeypatch.setattr(os, "pread", counted)
        for _ in range(WINDOW // 8):
            source.read(8)
    assert calls == [WINDOW]


def test_skipping_in_a_file_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with from_file(OCTETS) as source:
        for name in ("pread", "preadv", "read", "readv"):
            monkeypatch.setattr(os, name, None)
        assert source.skip(40_000) == 40_000


def test_closing_leaves_anothers_descriptor_where_reading_stopped() -> None:
    with file_of(b"before" + OCTETS) as descriptor:
        os.lseek(descriptor, 6, os.SEEK_SET)
        source = open_input(descriptor)
        source.read(10)
        source.skip(90)
        source.close()
        source.close()
        assert os.read(descriptor, 5) == OCTETS[100:105]


def test_a_file_that_grows_while_it_is_read_is_read_on(tmp_path: Path) -> None:
    path = tmp_path / "growing"
    path.write_bytes(OCTETS[:10])
    with path.open("ab", buffering=0) as more:
        source = open_input(path)
        assert source.read(10) == OCTETS[:10]
        more.write(OCTETS[10:])
        assert source.read(2 * WINDOW) == OCTETS[10 : 10 + 2 * WINDOW]
        assert source.skip(10) == 10
        source.close()


# Descriptors


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_no_octet_is_taken_that_was_not_asked_for(kind: str) -> None:
    if kind == "pipe":
        reader, writer = os.pipe()
    else:
        ours, theirs = socket.socketpair()
        reader, writer = ours.detach(), theirs.detach()
    try:
        os.write(writer, OCTETS[:5000])
        source = DescriptorInput(reader, owned=False)
        source.peek(10)
        source.read(20)
        source.skip(1000)
        source.readv_into([memoryview(bytearray(500)), memoryview(bytearray(7))])
        with open(os.devnull, "wb") as target:
            source.splice_to(target.fileno(), 30)
        source.close()
        assert os.read(reader, 10_000) == OCTETS[1557:5000]
    finally:
        os.close(reader)
        os.close(writer)


def test_peeked_octets_come_first_however_they_are_taken(tmp_path: Path) -> None:
    with fed(OCTETS) as descriptor, (tmp_path / "out").open("w+b") as target:
        source = DescriptorInput(descriptor, owned=False)
        source.peek(100)
        buffers = [bytearray(30), bytearray(30)]
        assert source.readv_into(map(memoryview, buffers)) == 60
        assert source.splice_to(target.fileno(), 50) == 50
        assert source.skip(5) == 5
        target.seek(0)
        assert b"".join(buffers) + target.read() == OCTETS[:110]
        assert source.read(5) == OCTETS[115:120]


@pytest.mark.parametrize(
    "call",
    [
        lambda source: source.read(2),
        lambda source: source.peek(2),
        lambda source: source.skip(2),
        lambda source: source.readv_into([memoryview(bytearray(2))]),
    ],
)
def test_silence_past_the_limit_is_a_deadline_error(call: Callable[[Input], object]) -> None:
    with fed(b"1", keep_open=True) as descriptor:
        source = open_input_later(descriptor)
        with pytest.raises(DeadlineError):
            call(source)


def open_input_later(descriptor: int) -> Input:
    """As `open_input`, without its look at the first octets."""
    return DescriptorInput(descriptor, owned=False, timeout_s=SOON)


def test_silence_before_the_first_octet_is_a_deadline_error_of_open() -> None:
    with fed(b"", keep_open=True) as descriptor, pytest.raises(DeadlineError):
        open_input(descriptor, SOON)


@pytest.mark.parametrize("kind", ["file", "pipe", "memory", "zstd"])
def test_a_target_that_is_not_read_is_a_deadline_error(kind: str) -> None:
    reader, writer = os.pipe()
    try:
        with INPUTS[kind](bytes(1 << 20)) as source, pytest.raises(DeadlineError):
            source.splice_to(writer, 1 << 20, SOON)
    finally:
        os.close(reader)
        os.close(writer)


def test_an_owned_descriptor_is_closed_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    keeper = os.open(tmp_path / "fifo", os.O_RDWR)
    os.write(keeper, b"octets")
    before = len(os.listdir("/proc/self/fd"))
    source = open_input(tmp_path / "fifo")
    source.skip(2)
    source.close()
    source.close()
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(keeper)


# What cannot be opened


def test_a_directory_is_the_systems_own_error(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(IsADirectoryError):
        open_input(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_input(tmp_path / "missing")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_descriptor_only_open_for_writing_is_the_systems_own_error(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file, pytest.raises(OSError, match="Bad file descriptor"):
        open_input(file.fileno())


# Compressed data


def opened(packed: bytes) -> Input:
    descriptor = os.memfd_create("packed")
    os.write(descriptor, packed)
    os.lseek(descriptor, 0, os.SEEK_SET)
    source = open_input(descriptor)
    assert isinstance(source, CodecInput)
    return source


@pytest.mark.parametrize("codec", CODECS)
def test_compressed_data_cut_short_end_early(codec: str) -> None:
    octets = some(1 << 20)
    packed = CODECS[codec](octets)
    source = opened(packed[: len(packed) * 2 // 3])
    got = bytearray(len(octets))
    done = source.readv_into([memoryview(got)])
    assert 0 < done < len(octets)
    assert got[:done] == octets[:done]
    assert source.read(1) == b""


@pytest.mark.parametrize("codec", CODECS)
def test_damaged_compressed_data_are_a_format_error_with_the_unpacked_offset(codec: str) -> None:
    octets = bytes(random.Random(5).choices(b"abcdefgh", k=1 << 20))
    packed = bytearray(CODECS[codec](octets))
    middle = len(packed) // 3
    packed[middle : middle + 64] = bytes(b ^ 0xFF for b in packed[middle : middle + 64])
    source = opened(bytes(packed))
    with pytest.raises(FormatError, match=f"{codec} data are damaged") as caught:
        source.skip(2 * len(octets))  # all of them: gzip sees damage by its checksum at the end
    assert caught.value.offset is not None
    assert 0 <= caught.value.offset < 2 * len(octets)
    assert caught.value.offset >= source.position
    assert caught.value.hint == "the offset is in the unpacked data"


def test_the_place_of_damage_counts_everything_unpacked_before() -> None:
    octets = some(1 << 20)
    source = opened(zstandard.compress(octets) + b"not zstd at all")
    with pytest.raises(FormatError) as caught:
        source.read(2 << 20)
    assert caught.value.offset == 1 << 20


def test_an_error_of_the_input_below_is_not_blamed_on_the_data() -> None:
    with fed(zstd(some(1 << 20))[:1000], keep_open=True) as descriptor:
        source = open_input(descriptor, SOON)
        with pytest.raises(DeadlineError):
            source.skip(1 << 20)

    class Failing(io.RawIOBase):
        def readinto(self, buffer: object, /) -> int:
            raise OSError(5, "Input/output error")

    failing = CodecInput(MemoryInput(b""), Failing(), "none")
    with pytest.raises(OSError, match="Input/output error"):
        failing.read(1)


def test_compressed_data_that_ask_for_a_huge_window_are_refused() -> None:
    # A zstd frame header: magic, no single segment, a window of 2^41 octets.
    with pytest.raises(FormatError, match="zstd data are damaged"):
        opened(b"\x28\xb5\x2f\xfd\x00" + bytes([31 << 3]) + bytes(20)).read(1)
    # An xz stream whose block asks for a dictionary of 4 GiB.
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 4096}]
    packed = bytearray(lzma.compress(b"octets", filters=filters))
    assert packed[12:17] == bytes([2, 0, 0x21, 1, 0])  # block header size, flags, LZMA2, 1, dictionary
    packed[16] = 40  # 4 GiB - 1
    packed[20:24] = struct.pack("<I", zlib.crc32(packed[12:20]))
    with pytest.raises(FormatError, match="xz data are damaged: Memory usage limit"):
        opened(bytes(packed)).read(1)


def test_skipping_a_gib_and_more_of_zeros_takes_no_memory_for_them() -> None:
    # Six frames of 256 MiB each; some KiB packed.
    script = """
import os, resource, sys, zstandard
from migstream.io.detect import open_input
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
compressor = zstandard.ZstdCompressor(level=1).compressobj()
frame = b"".join(compressor.compress(bytes(1 << 20)) for _ in range(256)) + compressor.flush()
descriptor = os.memfd_create("zeros")
os.write(descriptor, frame * 6)
os.lseek(descriptor, 0, os.SEEK_SET)
source = open_input(descriptor)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert source.skip(1 << 62) == 6 << 28
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert grown < 8 << 10, f"{grown} KiB"
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_compressed_data_come_out_as_they_arrive() -> None:
    zstd_stream, gzip_stream = zstandard.ZstdCompressor().compressobj(), zlib.compressobj(wbits=31)
    flushed = {
        "zstd": zstd_stream.compress(OCTETS) + zstd_stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK),
        "gzip": gzip_stream.compress(OCTETS) + gzip_stream.flush(zlib.Z_SYNC_FLUSH),
    }
    for packed in flushed.values():
        with fed(packed, keep_open=True) as descriptor:
            source = open_input(descriptor, 30)
            assert source.read(len(OCTETS)) == OCTETS


@pytest.mark.parametrize("codec", CODECS)
def test_closing_compressed_data_closes_the_file_below_once(codec: str, tmp_path: Path) -> None:
    (tmp_path / "packed").write_bytes(CODECS[codec](OCTETS))
    before = len(os.listdir("/proc/self/fd"))
    source = open_input(tmp_path / "packed")
    assert source.read(10) == OCTETS[:10]
    source.close()
    source.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_codecs_are_told_by_their_magic_alone() -> None:
    for packed in (b"\x28\xb5\x2f", b"\x1f\x8b", b"\xfd7zXZ", b"Xen saved"):
        with file_of(packed) as descriptor:
            assert isinstance(open_input(descriptor), FileInput)


def test_a_large_target_is_filled_by_pieces_of_bounded_size() -> None:
    reads: list[int] = []

    class Zeros(io.RawIOBase):
        def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]  # what is given here
            reads.append(len(buffer))
            return len(buffer)

    endless = CodecInput(MemoryInput(b""), Zeros(), "none")
    assert endless.skip(10 * SCRATCH + 1) == 10 * SCRATCH + 1
    assert max(reads) == SCRATCH
