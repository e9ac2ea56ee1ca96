"""Streams read and written again are the same octets: copied, and built anew from their fields."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
import zstandard
from hypothesis import given, settings

from migstream.errors import DeadlineError, FormatError
from migstream.io import reader
from migstream.io.writer import StreamWriter, copy_stream
from migstream.records import ByteOrder, Record, array_of, libxc, libxl, record_types
from tests import build
from tests.build import DATA, SHARED, fed, header, image, page, page_data, record

HAND_MADE = {
    "libxc": image(),
    "big-endian libxc": image("big"),
    "libxl": build.libxl_stream(),
    "xl": build.xl(build.libxl_stream()),
    "big-endian xl": build.xl(build.libxl_stream("big"), order="big"),
    "xl without config": b"Xen saved domain, xl format\n \0 \r\4\3\2\1\3" + bytes(11) + build.libxl_stream(),
    "mixed byte orders": build.xl(
        build.libxl(record(1), image("big"), record(3, bytes(9)), record(0)), order="big"
    ),
    "remus": build.remus_stream(),
    "trailer": build.libxl_stream() + b"domain is yours, you are cleared to unpause\0",
    "padding and surplus": header()
    + record(build.X86_TSC_INFO, bytes(range(27)), padding=b"\1\2\3\4\5")
    + record(0x8000_0001, b"optional", padding=b"")
    + record(0x99, b"unknown", padding=b"\xff")
    + record(build.X86_PV_P2M_FRAMES, bytes(range(21)))
    + record(build.END, b"body"),
}
ways = pytest.mark.parametrize("rebuild", [False, True], ids=["copied", "rebuilt"])


def written(stream: reader.Stream, path: Path, *, rebuild: bool) -> bytes:
    with path.open("w+b") as out:
        writer = StreamWriter(out.fileno())
        copy_stream(stream, writer, rebuild=rebuild)
        assert writer.written == os.fstat(out.fileno()).st_size
    return path.read_bytes()


@ways
@pytest.mark.parametrize("name", HAND_MADE)
def test_a_stream_made_by_hand_is_written_again_octet_for_octet(
    name: str, rebuild: bool, tmp_path: Path
) -> None:
    octets = HAND_MADE[name]
    with reader.open_memory(octets) as stream:
        assert written(stream, tmp_path / "out", rebuild=rebuild) == octets
    (tmp_path / "in").write_bytes(octets)
    with reader.open(tmp_path / "in") as stream:
        assert written(stream, tmp_path / "out", rebuild=rebuild) == octets
    with fed(octets, piece=100) as descriptor, reader.open(descriptor) as stream:
        assert written(stream, tmp_path / "out", rebuild=rebuild) == octets


def test_bodies_that_do_not_decode_are_copied_all_the_same(tmp_path: Path) -> None:
    damaged = record(build.PAGE_DATA, b"\5\0\0\0\0\0\0\0" + bytes(10)) + record(build.X86_TSC_INFO, b"short")
    octets = header() + damaged + record(build.END)
    with reader.open_memory(octets) as stream:
        assert written(stream, tmp_path / "out", rebuild=False) == octets
    with reader.open_memory(octets) as stream, pytest.raises(FormatError, match="count is 5"):
        written(stream, tmp_path / "out", rebuild=True)


def captures() -> list[Path]:
    """Return the captures that come with the project, then those that lie beside it, if they do."""
    kept = sorted(DATA.glob("*.zst"))
    return kept + sorted(
        p for p in (SHARED / "streams").glob("*.xl.zst") if p.name not in {k.name for k in kept}
    )


def unpacked(capture: Path) -> Iterator[bytes]:
    with capture.open("rb") as file:
        yield from zstandard.ZstdDecompressor().read_to_iter(file, write_size=1 << 20)


def digest(pieces: Iterator[bytes]) -> str:
    state = hashlib.blake2b()
    for piece in pieces:
        state.update(piece)
    return state.hexdigest()


def pieces_of(descriptor: int) -> Iterator[bytes]:
    while piece := os.read(descriptor, 1 << 20):
        yield piece


def by_file(source: Path, rebuild: bool, tmp_path: Path) -> str:
    with reader.open(source) as stream, (tmp_path / "out").open("w+b") as out:
        copy_stream(stream, StreamWriter(out.fileno()), rebuild=rebuild)
        os.lseek(out.fileno(), 0, os.SEEK_SET)
        return digest(pieces_of(out.fileno()))


def by_descriptors(ends: Callable[[], tuple[int, int]], source: Path, rebuild: bool) -> str:
    """Send the file through one pair of descriptors, read it there, and write through another pair."""
    first_out, first_in = ends()
    second_out, second_in = ends()

    def send() -> None:
        with source.open("rb") as file:
            while os.sendfile(first_in, file.fileno(), None, 1 << 20):
                pass
        os.close(first_in)

    def convert() -> None:
        try:
            with reader.open(first_out) as stream:
                copy_stream(stream, StreamWriter(second_in), rebuild=rebuild)
        finally:
            os.close(second_in)

    threads = [threading.Thread(target=work, daemon=True) for work in (send, convert)]
    for thread in threads:
        thread.start()
    got = digest(pieces_of(second_out))
    for thread in threads:
        thread.join(60)
    os.close(first_out)
    os.close(second_out)
    return got


def socket_ends() -> tuple[int, int]:
    one, other = socket.socketpair()
    return one.detach(), other.detach()


@ways
@pytest.mark.parametrize("capture", captures(), ids=lambda path: path.name)
def test_a_capture_is_written_again_octet_for_octet(capture: Path, rebuild: bool, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    with plain.open("wb") as file:
        file.writelines(unpacked(capture))
    expected = digest(unpacked(capture))
    assert by_file(plain, rebuild, tmp_path) == expected
    if capture.name.startswith("tiny"):  # of the others, once is enough
        assert by_file(capture, rebuild, tmp_path) == expected
        assert by_descriptors(os.pipe, plain, rebuild) == expected
        assert by_descriptors(socket_ends, plain, rebuild) == expected
    plain.unlink()
    (tmp_path / "out").unlink()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the other captures are not beside this checkout")
def test_the_captures_beside_the_project_were_among_those() -> None:
    assert len(captures()) >= 8


# The writer by itself


def output(write: Callable[[StreamWriter], object], *, order: ByteOrder = "little") -> bytes:
    descriptor = os.memfd_create("out")
    try:
        writer = StreamWriter(descriptor, order=order)
        write(writer)
        octets = os.pread(descriptor, 1 << 24, 0)
        assert len(octets) == writer.written
        return octets
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("order", ["little", "big"])
def test_a_stream_is_written_from_declarations(order: ByteOrder) -> None:
    def write(writer: StreamWriter) -> None:
        options = int(order == "big")
        writer.header(libxl.LibxlHeader(options=options))
        writer.record(libxl.LibxcContext())
        writer.header(
            libxc.ImageHeader(options=options), libxc.DomainHeader(type=2, xen_major=4, xen_minor=21)
        )
        writer.record(libxc.StaticDataEnd())
        writer.pages(array_of(8, [0, 1, 0xE << 60 | 5]), [page(0x11), memoryview(page(0x22))])
        writer.record(libxc.X86TscInfo(mode=1, khz=2_000_000, nsec=77, incarnation=3))
        writer.record(libxc.HvmContext(hvm_ctx=b"context"))
        entries = [libxc.HvmParamEntry(index=1, value=0xFEFFC)]
        writer.record(libxc.HvmParams(params=array_of(libxc.HvmParamEntry, entries)))
        writer.end()
        writer.record(libxl.EmulatorXenstoreData(emulator_id=2, index=0, data=b"key\0value\0"))
        writer.record(libxl.EmulatorContext(emulator_id=2, index=0, emulator_ctx=b"QEVM..."))
        writer.end()

    assert output(write, order=order) == build.libxl_stream(order)


def test_pages_may_come_in_any_number_of_buffers() -> None:
    entries = array_of(8, range(3))
    joined = page(1) + page(2) + page(3)
    expected = page_data([0, 1, 2], joined)
    assert output(lambda w: w.pages(entries, [joined])) == expected
    assert output(lambda w: w.pages(entries, [page(1), page(2), page(3)])) == expected
    assert output(lambda w: w.pages(entries, [joined[:10], joined[10:]])) == expected
    assert output(lambda w: w.pages(array_of(8, [0xF << 60]), [], reserved1=7))[8:16] == b"\1\0\0\0\7\0\0\0"


def test_padding_is_zeros_unless_it_is_given() -> None:
    assert output(lambda w: w.record(libxc.HvmContext(hvm_ctx=b"12345")))[13:] == bytes(3)
    given = output(lambda w: w.record(libxc.HvmContext(hvm_ctx=b"12345"), padding=b"abc"))
    assert given[13:] == b"abc"


def test_a_frame_that_was_consumed_or_of_the_other_byte_order_is_not_copied() -> None:
    with reader.open_memory(image()) as stream:
        for frame in stream:
            with pytest.raises(ValueError, match="other byte order"):
                output(lambda w, frame=frame: w.copy(frame), order="big")  # type: ignore[misc]  # bound early
            if frame.length:
                frame.read(1)
                with pytest.raises(ValueError, match="was consumed already"):
                    output(lambda w, frame=frame: w.copy(frame))  # type: ignore[misc]  # bound early


def test_a_receiver_that_stops_reading_is_a_deadline_error_while_a_stream_is_copied(tmp_path: Path) -> None:
    octets = header() + page_data(list(range(512)), bytes(512 * 4096))
    (tmp_path / "in").write_bytes(octets)
    for source in (tmp_path / "in", None):
        reading, writing = os.pipe()
        stream = reader.open(source) if source else reader.open_memory(octets)
        with stream, pytest.raises(DeadlineError):
            copy_stream(stream, StreamWriter(writing, timeout_s=0.05))
        os.close(reading)
        os.close(writing)


def test_a_receiver_that_has_gone_is_a_broken_pipe() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(BrokenPipeError):
        StreamWriter(writing).end()
    os.close(writing)


# Any stream


def bodies(declared: type[Record]) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=declared.head_size, max_size=60)


middle = [cls for cls in record_types("libxc") if cls.type not in ("END", "PAGE_DATA", "HVM_PARAMS")]
any_record = st.one_of(
    st.sampled_from(middle).flatmap(lambda cls: bodies(cls).map(lambda body: (cls.code, body))),
    st.tuples(st.integers(0x13, 2**32 - 1), st.binary(max_size=40)),
)
paddings = st.binary(min_size=7, max_size=7)


@settings(max_examples=150, deadline=None)
@given(
    records=st.lists(st.tuples(any_record, paddings), max_size=8),
    order=st.sampled_from(["little", "big"]),
    rebuild=st.booleans(),
    trailer=st.binary(max_size=5),
)
def test_any_records_with_any_padding_are_written_again_octet_for_octet(
    records: list[tuple[tuple[int, bytes], bytes]], order: str, rebuild: bool, trailer: bytes
) -> None:
    octets = header(order)
    for (code, body), padding in records:
        octets += record(code, body, order, padding=padding[: -len(body) % 8])
    octets += record(build.END, order=order) + trailer

    def copy(writer: StreamWriter) -> None:
        with reader.open_memory(octets) as stream:
            copy_stream(stream, writer, rebuild=rebuild)

    assert output(copy) == octets
