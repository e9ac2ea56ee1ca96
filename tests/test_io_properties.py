"""Descriptors of every kind, by properties: octets arrive whole and in order, whatever carries them."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from migstream.errors import DeadlineError, FormatError, TruncatedError
from migstream.io import fd as fdio
from migstream.io import reader
from migstream.io.envelopes import EnvelopeWriter, Kind
from migstream.io.inputs import FileInput
from migstream.io.outputs import new_file
from migstream.io.ranges import GATHERED, LARGE, RangeWriter
from migstream.io.seekable import seekable
from migstream.io.writer import StreamWriter, copy_stream
from migstream.records import OpaqueRecord, envelopes, libxc
from migstream.testing import streams
from tests.build import header, record

QUICK = settings(max_examples=40, deadline=None)
kinds = st.sampled_from(["file", "pipe", "socket"])
lengths = st.one_of(st.integers(0, 70), st.sampled_from([4095, 65536, 300_000]))
timeouts = st.sampled_from([None, 20.0])


def content(length: int) -> bytes:
    """Return octets that differ from their neighbours."""
    return (bytes(range(251)) * (length // 251 + 1))[:length]


@contextlib.contextmanager
def pair(kind: str) -> Iterator[tuple[int, int]]:
    """Give (readable, writable) of a pipe or a socket; closing either early is the caller's choice."""
    if kind == "pipe":
        ends = os.pipe()
    else:
        one, other = socket.socketpair()
        ends = one.detach(), other.detach()
    try:
        yield ends
    finally:
        for end in ends:
            with contextlib.suppress(OSError):
                os.close(end)


@contextlib.contextmanager
def holding(kind: str, octets: bytes) -> Iterator[int]:
    """Give a descriptor of that kind that brings ``octets``, then ends."""
    if kind == "file":
        with tempfile.TemporaryFile() as file:
            file.write(octets)
            file.seek(0)
            yield file.fileno()
        return
    with pair(kind) as (readable, writable):

        def feed() -> None:
            rest = memoryview(octets)
            while rest:
                rest = rest[os.write(writable, rest[:50_000]) :]
            os.close(writable)

        thread = threading.Thread(target=feed)
        thread.start()
        yield readable
        thread.join()


@contextlib.contextmanager
def taking(kind: str, taken: list[bytes]) -> Iterator[int]:
    """Give a descriptor of that kind; what was written to it is in ``taken`` afterwards."""
    if kind == "file":
        with tempfile.TemporaryFile() as file:
            yield file.fileno()
            file.seek(0)
            taken.append(file.read())
        return
    with pair(kind) as (readable, writable):

        def drain() -> None:
            while piece := os.read(readable, 1 << 16):
                taken.append(piece)

        thread = threading.Thread(target=drain)
        thread.start()
        try:
            yield writable
        finally:
            os.close(writable)
            thread.join()


@QUICK
@given(kinds, kinds, lengths, lengths, st.booleans(), st.booleans(), timeouts, timeouts)
def test_octets_move_between_any_two_descriptors(
    source_kind: str,
    target_kind: str,
    length: int,
    asked: int,
    at_offset: bool,
    blocking: bool,
    source_timeout: float | None,
    target_timeout: float | None,
) -> None:
    octets, taken = content(length), list[bytes]()
    with holding(source_kind, octets) as source, taking(target_kind, taken) as target:
        offset = 3 if at_offset and source_kind == "file" else None
        os.set_blocking(source, blocking)
        os.set_blocking(target, blocking)
        moved = fdio.transfer(source, target, asked, offset, source_timeout, target_timeout)
        rest = b"".join(iter(lambda: fdio.read_some(source, 1 << 16), b"")) if source_kind != "file" else b""
    start = offset or 0
    expected = octets[start : start + asked]
    assert moved == len(expected)
    assert b"".join(taken) == expected
    assert source_kind == "file" or rest == octets[asked:]


@QUICK
@given(
    st.sampled_from(["pipe", "socket", "file"]),
    st.lists(lengths, max_size=6),
    st.booleans(),
    timeouts,
)
def test_vectors_are_written_and_read_in_order_through_any_descriptor(
    kind: str, sizes: list[int], blocking: bool, timeout_s: float | None
) -> None:
    vectors = [content(size)[::-1] for size in sizes]
    taken: list[bytes] = []
    with taking(kind, taken) as fd:
        fdio.widen_pipe(fd)
        os.set_blocking(fd, blocking)
        assert fdio.write_vectors(fd, vectors, timeout_s) == sum(sizes)
    whole = b"".join(vectors)
    assert b"".join(taken) == whole
    with holding(kind, whole) as fd:
        os.set_blocking(fd, blocking)
        buffers = [bytearray(size) for size in [*sizes, 5]]
        assert fdio.read_into(fd, map(memoryview, buffers), timeout_s) == len(whole)
        assert b"".join(map(bytes, buffers[:-1])) == whole
    with holding(kind, whole) as fd:
        os.set_blocking(fd, blocking)
        assert fdio.read(fd, len(whole) + 1, timeout_s) == whole


@pytest.mark.parametrize("kind", ["pipe", "socket"])
@settings(max_examples=6, deadline=None)
@given(blocking=st.booleans(), source_kind=st.sampled_from(["file", "pipe", "socket"]))
def test_silence_on_either_side_is_an_error_after_the_time_limit(
    kind: str, blocking: bool, source_kind: str
) -> None:
    with pair(kind) as (readable, writable):
        os.set_blocking(readable, blocking)
        for call in (
            lambda: fdio.read(readable, 1, 0.001),
            lambda: fdio.read_into(readable, [memoryview(bytearray(1))], 0.001),
            lambda: fdio.transfer(readable, writable, 1, None, 0.001),
        ):
            with pytest.raises(DeadlineError, match=r"was not readable for 0\.001 s"):
                call()
        os.set_blocking(writable, blocking)
        full = bytes(8 << 20)
        with pytest.raises(DeadlineError, match=r"was not writable for 0\.001 s"):
            fdio.write_vectors(writable, [full], 0.001)
    with pair(kind) as (_, writable), holding(source_kind, bytes(400_000)) as source:
        with contextlib.suppress(DeadlineError):
            fdio.write_vectors(writable, [bytes(8 << 20)], 0.001)
        with pytest.raises(DeadlineError, match="was not writable"):
            fdio.transfer(source, writable, 400_000, None, 5, 0.001)
        fdio.read(source, 1 << 20)


pieces = st.one_of(
    st.tuples(st.just("write"), st.sampled_from([0, 5, 4096, GATHERED + 1, GATHERED - 4096]), st.just(0)),
    st.tuples(
        st.just("copy"), st.sampled_from([0, 1, 4096, LARGE - 1, LARGE, 200_000]), st.integers(0, 50_000)
    ),
    st.tuples(st.just("seek"), st.integers(0, 3 << 20), st.just(0)),
)


@QUICK
@given(st.lists(pieces, max_size=8))
@example([("copy", LARGE - 1, 0)] * (GATHERED // (LARGE - 1) + 1))
def test_ranges_and_octets_come_out_in_the_order_they_were_asked_for(
    script: list[tuple[str, int, int]],
) -> None:
    octets = content(300_000)
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as target, io.BytesIO() as expected:
        source.write(octets)
        source.seek(0)
        writer = RangeWriter(FileInput(source.fileno(), owned=False), target.fileno())
        for step, size, offset in script:
            match step:
                case "seek":
                    writer.seek(size)
                    expected.seek(size)
                case "write":
                    writer.write(content(size))
                    expected.write(content(size))
                case "copy":
                    writer.copy(offset, size)
                    expected.write(octets[offset : offset + size])
        with pytest.raises(TruncatedError, match="ends after 1 of the 2 octets"):
            writer.copy(len(octets) - 1, 2)
        expected.write(octets[-1:])
        writer.flush()
        target.seek(0)
        assert target.read() == expected.getvalue()


@QUICK
@given(st.binary(max_size=99), st.booleans(), st.booleans(), st.booleans())
def test_a_new_file_has_its_name_when_it_is_complete_and_an_error_leaves_what_was_there(
    tmp_path_factory: pytest.TempPathFactory, octets: bytes, durable: bool, fails: bool, there: bool
) -> None:
    folder = tmp_path_factory.mktemp("new")
    path = folder / "file"
    if there:
        path.write_bytes(b"before")
    try:
        with new_file(path, durable=durable) as fd:
            os.write(fd, octets)
            assert path.exists() == there
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == (
        ({"file": b"before"} if there else {}) if fails else {"file": octets}
    )
    with pytest.raises(IsADirectoryError), new_file(folder):
        pass
    with pytest.raises(FileNotFoundError, match="nowhere"), new_file(folder / "nowhere" / "file"):
        pass
    with new_file("/dev/null") as fd:
        assert os.write(fd, octets) == len(octets)


configs = st.text(st.characters(codec="ascii", exclude_characters="\0"), min_size=1, max_size=40)


@QUICK
@given(
    st.sampled_from(["xl", "libvirt", "xapi"]),
    configs,
    st.booleans(),
    st.booleans(),
    st.lists(st.binary(max_size=20), max_size=2),
    streams(kind="plain", layer="libxl"),
)
def test_a_stream_in_any_envelope_is_read_with_its_config(
    tmp_path_factory: pytest.TempPathFactory,
    kind: Kind,
    config: str,
    ended: bool,
    json: bool,
    states: list[bytes],
    inner: bytes,
) -> None:
    path = tmp_path_factory.mktemp("envelope") / "file"
    text = config.encode() + (b"\0" if ended and kind != "xapi" else b"")
    segments = [envelopes.QemuTrad(state=state) for state in states] if kind == "xapi" else []
    with new_file(path, durable=False) as out:
        writer = StreamWriter(out)
        with EnvelopeWriter(kind, writer, text, json=json, content="libxl", segments=segments):
            copy_stream(reader.open_memory(inner), writer)
    with reader.open(path) as stream:
        frames = [(frame, None if frame.is_page_data else frame.record()) for frame in stream]
        records = [record for _, record in frames if record is not None]
        pages = len(frames) - len(records)
        layers = [layer.name for layer in stream.layers]
        assert layers == [kind, "libxl", "libxc"]
        if kind == "xapi":
            assert records[0] == envelopes.Xenops(config=text)
            assert records[-1 - len(states) : -1] == segments
        else:
            assert stream.layers[0].config_text == config
    whole = path.read_bytes()
    assert inner in whole
    for spool in ("file", "pipe"):
        with holding(spool, whole) as fd, reader.open(fd) as again, seekable(again) as found:
            assert found.spooled == (spool == "pipe")
            assert sum(1 for _ in found.stream) == len(records) + pages
            assert [layer.name for layer in found.stream.layers] == layers
            assert found.input.position == len(whole)


@QUICK
@given(st.integers(0, 5000), st.integers(0, 5000))
def test_a_range_of_a_file_is_written_whole_or_the_end_is_told(offset: int, length: int) -> None:
    octets = content(5000)
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as target:
        source.write(octets)
        source.seek(0)
        writer = StreamWriter(target.fileno())
        expected = octets[offset : offset + length]
        cut = len(expected) < length
        ended = pytest.raises(TruncatedError, match=f"ends after {len(expected)} of the {length} octets")
        with ended if cut else contextlib.nullcontext():
            writer.copy_range(FileInput(source.fileno(), owned=False), offset, length)
        assert writer.written == len(expected)
        target.seek(0)
        assert target.read() == expected


@QUICK
@given(streams(), st.binary(max_size=9), st.booleans(), st.sampled_from(["file", "pipe", "memory"]))
def test_a_stream_is_written_again_octet_for_octet_whatever_is_behind_it(
    octets: bytes, behind: bytes, rebuild: bool, kind: str
) -> None:
    whole, taken = octets + behind, list[bytes]()
    with taking("file", taken) as target:
        if kind == "memory":
            copy_stream(reader.open_memory(whole), StreamWriter(target), rebuild=rebuild)
        else:
            with holding(kind, whole) as fd:
                copy_stream(reader.open(fd), StreamWriter(target), rebuild=rebuild)
    assert taken == [whole]


@QUICK
@given(streams(), st.data())
def test_a_frame_gives_its_octets_once_and_none_of_the_next_ones(octets: bytes, data: st.DataObject) -> None:
    frames = [(frame.index, frame.length) for frame in reader.open_memory(octets)]
    index, length = data.draw(st.sampled_from(frames))
    stream = reader.open_memory(octets)
    frame = next(frame for frame in stream if frame.index == index)
    with pytest.raises(ValueError, match=f"{length + 1} octets asked for, {length} are left"):
        frame.read(length + 1)
    with pytest.raises(ValueError, match="-1 octets asked for"):
        frame.read(-1)
    taken = data.draw(st.integers(0, min(length, 8)))
    assert len(frame.read(taken)) == taken
    if taken:
        for again in (frame.record, lambda: StreamWriter(0).copy(frame)):
            with pytest.raises(ValueError, match="consumed"):
                again()
    # The walk goes on behind the frame, however much of it was read, and whoever asks for it anew.
    assert [(frame.index, frame.length) for frame in stream] == frames[frames.index((index, length)) + 1 :]


@QUICK
@given(st.integers(0x8000_0100, 0x8FFF_FFFF), st.integers((128 << 20) + 1, (1 << 32) - 1))
def test_no_body_beyond_the_limit_is_read_into_memory(code: int, length: int) -> None:
    head = libxc.RecordHeader(type=code, length=length).build()
    frame = next(iter(reader.open_memory(header() + head)))
    with pytest.raises(FormatError, match=f"{length} octets is not read into memory"):
        frame.record()


@QUICK
@given(st.integers(0x8000_0100, 0x8FFF_FFFF), st.binary(max_size=20))
def test_a_record_of_unknown_type_is_its_octets(code: int, body: bytes) -> None:
    frame = next(iter(reader.open_memory(header() + record(code, body))))
    assert frame.record() == OpaqueRecord.of("libxc", code, body)


# What cannot be opened, and what breaks


@QUICK
@given(streams(kind="plain"), st.booleans())
def test_a_stream_is_opened_by_its_path_whatever_is_there(octets: bytes, packed: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(IsADirectoryError):
            reader.open(folder)
        fd = os.open(folder, os.O_RDONLY)
        with pytest.raises(IsADirectoryError):
            reader.open(fd)
        os.close(fd)  # it stayed ours
        path = Path(folder) / "fifo"
        os.mkfifo(path)
        thread = threading.Thread(target=path.write_bytes, args=[gzip.compress(octets) if packed else octets])
        thread.start()
        with reader.open(path) as stream:
            count = sum(1 for _ in stream)
        stream.close()  # once more does nothing
        thread.join()
    assert count == sum(1 for _ in reader.open_memory(octets))


@QUICK
@given(streams(kind="plain"), st.data())
def test_packed_data_that_end_or_are_damaged_or_do_not_come_are_told_apart(
    octets: bytes, data: st.DataObject
) -> None:
    packed = gzip.compress(octets, mtime=0)
    # Behind the last octet of the stream there are a mark and a checksum, which a reader may not miss.
    kept = data.draw(st.integers(20, len(packed) - 40))
    with holding("pipe", packed[:kept]) as fd, pytest.raises((TruncatedError, FormatError)):
        list(reader.open(fd))
    damaged = packed[:10] + b"\xff" * 20 + packed[30:]  # a block of a type that there is not
    with holding("file", damaged) as fd, pytest.raises(FormatError, match="the gzip data are damaged"):
        list(reader.open(fd))
    with pair("pipe") as (readable, writable):
        os.write(writable, packed[:kept])
        with pytest.raises(DeadlineError, match="was not readable"):
            list(reader.open(readable, timeout_s=0.001))


@QUICK
@given(streams(kind="plain"), st.booleans())
def test_a_copy_that_has_no_room_names_the_directory_that_it_was_to_be_in(octets: bytes, full: bool) -> None:
    def no_file() -> io.FileIO:
        return open("/dev/full", "r+b", 0) if full else open(os.devnull, "rb", 0)

    told = "No space left on device: " if full else "Bad file descriptor"
    with (
        holding("pipe", octets) as fd,
        reader.open(fd) as stream,
        mock.patch("tempfile.TemporaryFile", no_file),
        pytest.raises(OSError, match=told) as caught,
        seekable(stream),
    ):
        pass
    assert (caught.value.filename == tempfile.gettempdir()) == full


@QUICK
@given(st.sampled_from(["file", "pipe", "socket"]), st.integers(1, 200_000))
def test_a_target_that_takes_nothing_is_an_error_and_not_an_end(kind: str, length: int) -> None:
    with holding(kind, content(length)) as source, open("/dev/full", "wb", 0) as full:
        with pytest.raises(OSError, match="No space left"):
            fdio.transfer(source, full.fileno(), length)
        fdio.read(source, length)


@QUICK
@given(st.sampled_from(["xl", "libvirt", "xapi"]), st.binary(min_size=1, max_size=9))
def test_an_envelope_gets_no_tail_when_its_content_failed(kind: Kind, config: bytes) -> None:
    taken: list[bytes] = []
    with taking("file", taken) as fd, contextlib.suppress(KeyboardInterrupt):
        envelope = EnvelopeWriter(kind, StreamWriter(fd), config)
        with envelope:
            raise KeyboardInterrupt
    with taking("file", taken) as fd, EnvelopeWriter(kind, StreamWriter(fd), config):
        pass
    failed, whole = taken
    assert whole.startswith(failed)
    assert (whole != failed) == (kind == "xapi")
