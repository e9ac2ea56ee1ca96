"""Bad input to the library: one error of the StreamError family, with its place, and no large allocation."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from migstream.errors import FormatError, RecordRef, StreamError, TruncatedError
from migstream.io import layers, reader
from migstream.io.reader import Frame, Stream, Trailer
from migstream.records import MAX_RECORD_LENGTH, libxl
from tests import build
from tests.build import fed, header, image, record

#: A stream with every layer, small enough to be cut and flipped at every octet: pages are of 16 octets
#: only, which the reader, unlike a restore, does not mind.
SMALL = build.xl(
    build.libxl(
        record(build.LIBXC_CONTEXT),
        header(),
        record(build.STATIC_DATA_END),
        record(build.PAGE_DATA, struct.pack("<IIQQ", 2, 0, 0, 0xF << 60 | 1) + bytes(16)),
        record(build.X86_TSC_INFO, bytes(24)),
        record(build.HVM_PARAMS, struct.pack("<IIQQ", 1, 0, 1, 5)),
        record(build.HVM_CONTEXT, b"context"),
        record(build.CHECKPOINT),
        record(build.XENSTORE_DATA, struct.pack("<II", 2, 0) + b"k\0v\0"),
        record(build.CHECKPOINT_END),
        record(build.END),
        record(build.END),
    ),
    config=b"{}\0",
)
XL_HEADERS = len(build.xl(b"", config=b"{}\0"))
CHECKPOINTED = SMALL.index(record(build.CHECKPOINT_END)) + 8


def walk(stream: Stream) -> list[StreamError]:
    """Consume a stream as a curious reader would; return the errors of bodies, let the stream's out."""
    errors: list[StreamError] = []
    for item in stream.items():
        if isinstance(item, Frame):
            try:
                decoded = item.record()
                decoded.to_json()
                if isinstance(decoded, libxl.EmulatorXenstoreData):
                    _ = decoded.pairs
            except TruncatedError:
                raise
            except FormatError as exc:
                errors.append(exc)
        elif isinstance(item, Trailer):
            item.skip()
    return errors


def error_of(octets: bytes) -> StreamError:
    """Return the one error that ends the reading of ``octets``."""
    with reader.open_memory(octets) as stream, pytest.raises(StreamError) as caught:
        walk(stream)
    return caught.value


def test_the_small_stream_is_sound() -> None:
    with reader.open_memory(SMALL) as stream:
        assert walk(stream) == []
        assert (stream.ending, stream.position) == ("end", len(SMALL))


@pytest.mark.parametrize("length", range(len(SMALL)))
def test_a_stream_cut_at_any_octet_is_truncated_there(length: int) -> None:
    if length in (CHECKPOINTED, CHECKPOINTED + 8):  # between records behind a checkpoint: no error
        with reader.open_memory(SMALL[:length]) as stream:
            assert walk(stream) == []
            assert stream.ending == "checkpoint"
        return
    error = error_of(SMALL[:length])
    assert type(error) is TruncatedError
    assert error.offset == length
    assert f"offset {length} (0x{length:x})" in str(error)
    assert (error.layer is None) == (length == 0)
    assert (error.hint is not None) == (length > CHECKPOINTED)


@pytest.mark.parametrize("length", [0, 7, 31, 47, 60, 100, 200, len(SMALL) - 1])
def test_it_is_the_same_truncation_from_a_pipe_and_a_file(length: int, tmp_path: Path) -> None:
    expected = error_of(SMALL[:length]).to_json()
    (tmp_path / "cut").write_bytes(SMALL[:length])
    with reader.open(tmp_path / "cut") as stream, pytest.raises(TruncatedError) as from_file:
        walk(stream)
    assert from_file.value.to_json() == expected
    with (
        fed(SMALL[:length], piece=3) as descriptor,
        reader.open(descriptor) as stream,
        pytest.raises(TruncatedError) as from_pipe,
    ):
        walk(stream)
    assert from_pipe.value.to_json() == expected


def test_everything_before_the_damage_is_handed_out() -> None:
    for length in range(XL_HEADERS, len(SMALL)):
        whole, cut = [], []
        with reader.open_memory(SMALL) as stream:
            whole = [repr(item) for item in stream if item.body_offset + item.length <= length]
        with reader.open_memory(SMALL[:length]) as stream:
            try:
                for frame in stream:
                    frame.record()
                    frame.skip()
                    cut.append(repr(frame))
            except TruncatedError:
                pass
        assert cut == whole


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_a_flipped_octet_anywhere_gives_data_or_an_error_with_a_place(mask: int) -> None:
    for at in range(len(SMALL)):
        damaged = bytearray(SMALL)
        damaged[at] ^= mask
        check_harmless(bytes(damaged))


def check_harmless(octets: bytes) -> None:
    """Read ``octets``: nothing but errors of the StreamError family may come out, each with its place."""
    with reader.open_memory(octets) as stream:
        try:
            errors = walk(stream)
        except StreamError as exc:
            errors = [exc]
        for error in errors:
            assert error.offset is not None
            assert 0 <= error.offset <= len(octets)
            assert error.message
        assert stream.position <= len(octets)


@settings(max_examples=150, deadline=None)
@given(
    flips=st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(1, 255)), max_size=6),
    cut=st.integers(0, len(SMALL)),
    moved=st.integers(0, len(SMALL)),
)
def test_streams_damaged_in_several_ways_are_harmless(
    flips: list[tuple[int, int]], cut: int, moved: int
) -> None:
    damaged = bytearray(SMALL)
    for at, mask in flips:
        damaged[at] ^= mask
    check_harmless(bytes(damaged[:moved] + damaged[cut:]))


@settings(max_examples=100, deadline=None)
@given(octets=st.binary(max_size=200), start=st.sampled_from([0, 8, 24, XL_HEADERS, XL_HEADERS + 24, 200]))
def test_anything_behind_good_headers_is_harmless(octets: bytes, start: int) -> None:
    check_harmless(SMALL[:start] + octets)


# Lengths and counts that lie


def peak_of(action: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


LITTLE = 4 << 20  # octets: far from what the lies below announce


@pytest.mark.parametrize("code", [build.PAGE_DATA, build.HVM_CONTEXT, build.END, 0x77, 0x8000_0000])
def test_a_length_of_all_ones_is_one_error_and_no_allocation(code: int) -> None:
    octets = header() + struct.pack("<II", code, 0xFFFF_FFFF) + bytes(100)
    errors: list[StreamError] = []

    def skip_it() -> None:
        with reader.open_memory(octets) as stream:
            try:
                list(stream)
            except StreamError as exc:
                errors.append(exc)

    assert peak_of(skip_it) < LITTLE
    (error,) = errors
    assert isinstance(error, TruncatedError)
    assert error.message == "the input ends after 100 of the 4294967295 octets that should follow here"
    assert (error.offset, error.layer) == (len(octets), "libxc")
    assert error.record is not None
    assert error.record.index == 0


@pytest.mark.parametrize("code", [build.HVM_CONTEXT, 0x77])
def test_a_body_past_xens_limit_is_not_read_into_memory(code: int) -> None:
    octets = header() + struct.pack("<II", code, MAX_RECORD_LENGTH + 1)
    with reader.open_memory(octets) as stream:
        frame = next(iter(stream))
        for _ in range(2):
            with pytest.raises(FormatError, match="the limit is 134217728") as caught:
                frame.record()
            assert (caught.value.offset, caught.value.field) == (44, "length")
            assert caught.value.record == RecordRef(0, frame.type_name)
        with pytest.raises(FormatError, match="the limit is 134217728"):
            frame.body()


def test_entries_past_xens_limit_are_not_read_into_memory_but_can_be_read_in_pieces() -> None:
    count = MAX_RECORD_LENGTH // 8 + 1
    octets = header() + struct.pack("<IIII", build.PAGE_DATA, 8 + 8 * count, count, 0) + bytes(1 << 20)

    def read() -> None:
        with reader.open_memory(octets) as stream:
            frame = next(iter(stream))
            with pytest.raises(FormatError, match="the limit is 134217728"):
                frame.record()
        with reader.open_memory(octets) as stream:
            frame = next(iter(stream))
            head = frame.page_head()
            pieces = frame.entries(head.entries)
            assert sum(len(next(pieces)) for _ in range(2)) == 1 << 17
            with pytest.raises(TruncatedError):
                next(pieces)

    assert peak_of(read) < LITTLE


def test_a_body_that_stays_away_costs_what_has_arrived(tmp_path: Path) -> None:
    octets = header() + struct.pack("<II", build.HVM_CONTEXT, MAX_RECORD_LENGTH) + bytes(1000)
    (tmp_path / "file").write_bytes(octets)

    def read(stream: Stream) -> None:
        with stream, pytest.raises(TruncatedError, match="after 1000 of the 134217728 octets"):
            next(iter(stream)).record()

    assert peak_of(lambda: read(reader.open_memory(octets))) < LITTLE
    assert peak_of(lambda: read(reader.open(tmp_path / "file"))) < LITTLE
    with fed(octets) as descriptor:
        assert peak_of(lambda: read(reader.open(descriptor))) < LITTLE


@pytest.mark.parametrize(
    ("code", "count", "unit", "what"),
    [(build.PAGE_DATA, 0xFFFF_FFFF, 8, "entries"), (build.HVM_PARAMS, 3, 16, "params")],
)
def test_a_count_larger_than_its_record_is_refused_with_its_place(
    code: int, count: int, unit: int, what: str
) -> None:
    octets = header() + record(code, struct.pack("<II", count, 0) + bytes(32)) + record(build.END)
    with reader.open_memory(octets) as stream:
        (error,) = walk(stream)
    assert error.message == (
        f"count is {count}, which needs {count * unit} octets of {what}; the body has 32 left"
    )
    assert (error.offset, error.layer, error.field) == (48, "libxc", "count")
    assert error.record is not None
    assert str(error).startswith(
        f"offset 48 (0x30), layer libxc, record 0 {error.record.type}, field count: count is {count}"
    )


@pytest.mark.parametrize("length", [1 << 32 - 1, 0xFFFF_FFFF, layers.MAX_CONFIG + 1])
def test_an_xl_header_that_announces_a_huge_config_is_refused(length: int) -> None:
    numbers = struct.pack("<IIII", 0x01020304, 3, 0, length)
    octets = b"Xen saved domain, xl format\n \0 \r" + numbers + bytes(100)
    error = error_of(octets)
    assert f"announces {length} octets of optional data" in error.message
    assert (error.offset, error.layer, error.field) == (44, "xl", "optional_data_len")


@pytest.mark.parametrize(
    ("data", "offset", "field"),
    [(struct.pack("<I", 100) + b"{}", 48, "config_len"), (b"{}", 50, "config_len")],
)
def test_optional_data_that_are_no_config_are_refused(data: bytes, offset: int, field: str) -> None:
    numbers = struct.pack("<IIII", 0x01020304, 3, 0, len(data))
    error = error_of(b"Xen saved domain, xl format\n \0 \r" + numbers + data + image())
    assert (error.offset, error.layer, error.field) == (offset, "xl", field)


def test_an_xl_byte_order_mark_of_neither_order_is_refused() -> None:
    octets = b"Xen saved domain, xl format\n \0 \r" + struct.pack("<IIII", 0x01020305, 3, 0, 0)
    error = error_of(octets)
    assert error.message == "expected the byte order mark 01020304 in either order, found 05030201"
    assert (error.offset, error.layer, error.field) == (32, "xl", "byteorder")


def test_hostile_streams_are_read_within_64_mib() -> None:
    script = """
import resource, struct, sys
from migstream.errors import StreamError
from migstream.io import layers, reader
import numpy
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), used + (64 << 20)))
header = bytes.fromhex(sys.argv[1])
for code in (0, 1, 9, 10, 0x77):
    for length in (1 << 27, 0xFFFFFFFF):
        for count in (0xFFFFFFFF, (1 << 24) - 1):
            octets = header + struct.pack("<IIII", code, length, count, 0) + bytes(1 << 20)
            with reader.open_memory(octets) as stream:
                try:
                    for frame in stream:
                        frame.record()
                except StreamError:
                    continue
            raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", script, header().hex()], check=True)


# What is no stream at all


@pytest.mark.parametrize(
    ("octets", "expected"),
    [
        (b"", "the input is empty: expected the header of an xl, libvirt, xend or xapi save"),
        (b"hello world\n", "found text: 'hello world\\n'"),
        (b"\x1b[31mred", "found unknown octets 1b 5b 33 31 6d 72 65 64"),
        (bytes(64), "found unknown octets 00 00"),
        (b"\xff" * 20, "a libxc marker whose id is ffffffff instead of 58454e46 (XENF)"),
        (b"\xff" * 8, "ends inside libxc's magic, after 8 octets"),
        (b"\xff" * 8 + b"X", "ends inside libxc's magic, after 9 octets"),
        (b"Lib", "ends inside libxl's magic, after 3 octets"),
        (b"LibvirtQemudSave", "a save image of libvirt's QEMU driver"),
        (b"QEVM\0\0\0\3", "a QEMU migration stream"),
        (b"EMiL\1\0\0\0", "a LiME memory image"),
        (b"KDUMP   \6\0\0\0", "a kdump memory image"),
        (b"\x7fELF\2\1\1", "an ELF file"),
        (b"LibvirtQemudPart", "an unfinished save image of libvirt's QEMU driver"),
        (b"\x19\x43\x56\x54", "a CRIU image"),
        (b"\x40\x59\x10\x55", "a CRIU image"),
        (b"\xd0\xbe\xd2\xbe", "a VMware saved state"),
        (b"\xd3\xbe\xd3\xbe", "a VMware saved state"),
        (b"PK\3\4\x14\0", "a zip archive"),
    ],
)
def test_what_is_no_stream_is_named(octets: bytes, expected: str) -> None:
    error = error_of(octets)
    assert expected in error.message
    assert "expected" in error.message or "ends inside" in error.message
    assert error.offset == (len(octets) if "ends inside" in error.message else 0)


def legacy(word: int, chunk: bytes) -> bytes:
    """Return the start of a legacy stream of 1024 PFNs, of a toolstack with words of ``word`` octets."""
    return (1024).to_bytes(word, "little") + chunk + bytes(64)


ALL_ONES = {4: b"\xff" * 4, 8: b"\xff" * 8}


@pytest.mark.parametrize(
    "wrap", [bytes, lambda octets: build.xl(octets, flags=1)], ids=["bare", "in an xl file"]
)
@pytest.mark.parametrize("word", [4, 8])
@pytest.mark.parametrize("kind", ["PV", "HVM batch", "HVM batch of a typed PFN", "HVM chunk"])
def test_legacy_streams_are_named_with_their_toolstack_and_guest(
    kind: str, word: int, wrap: Callable[[bytes], bytes]
) -> None:
    chunk = {
        "PV": ALL_ONES[word],
        "HVM batch": struct.pack("<i", 1024),
        "HVM batch of a typed PFN": struct.pack("<iI", 7, 0xF000_0001),
        "HVM chunk": struct.pack("<iI", -7, 3),
    }[kind]
    error = error_of(wrap(legacy(word, chunk)))
    guest = "a PV" if kind == "PV" else "an HVM"
    assert (
        f"a legacy (version 1) libxc stream of a {8 * word}-bit toolstack and {guest} guest" in error.message
    )
    assert "migstream convert" in str(error)
    assert error.layer == (None if wrap is bytes else "xl")


def test_a_legacy_stream_is_left_unread_for_who_can_convert_it() -> None:
    octets = legacy(4, struct.pack("<i", 1024))
    for wrap, layers_around in ((bytes, []), (lambda octets: build.xl(octets, flags=1), ["xl"])):
        wrapped = wrap(octets)
        with fed(wrapped) as descriptor, reader.open(descriptor) as stream:
            with pytest.raises(FormatError, match="legacy"):
                walk(stream)
            assert stream.legacy
            assert [layer.name for layer in stream.layers] == layers_around
            assert stream.position == len(wrapped) - len(octets)
            assert stream.input.read(1 << 10) == octets
    with reader.open_memory(b"QEVM" + bytes(60)) as stream:
        with pytest.raises(FormatError):
            walk(stream)
        assert not stream.legacy


def test_a_foreign_format_inside_a_layer_is_named_with_the_layer() -> None:
    error = error_of(build.libxl(record(build.LIBXC_CONTEXT), b"QEVM" + bytes(60)))
    assert error.message == "expected a header inside libxl, found a QEMU migration stream"
    assert (error.offset, error.layer) == (24, "libxl")
    error = error_of(build.libxl(record(build.LIBXC_CONTEXT), build.libxl_stream()))
    assert (error.message, error.offset, error.layer) == ("libxl cannot stand inside libxl", 24, "libxl")
    error = error_of(build.xl(build.xl(image())))
    assert (error.message, error.layer) == ("xl cannot stand inside xl", "xl")
    error = error_of(build.xl(b""))
    assert (type(error), error.message) == (
        TruncatedError,
        "the input ends: expected a header inside xl",
    )


def test_random_octets_are_never_taken_for_a_stream() -> None:
    for seed in range(200):
        error = error_of(random.Random(seed).randbytes(100))
        assert error.message.startswith("expected the header of an xl, libvirt, xend or xapi save, ")
        assert error.offset == 0


def test_a_directory_and_a_missing_file_are_the_systems_errors(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        reader.open(tmp_path)
    with pytest.raises(FileNotFoundError):
        reader.open(tmp_path / "missing")


def test_an_error_in_json_has_every_part() -> None:
    error = error_of(SMALL[: SMALL.index(b"context") + 3])
    assert error.to_json() == {
        "message": "the input ends after 3 of the 7 octets that should follow here",
        "offset": SMALL.index(b"context") + 3,
        "layer": "libxc",
        "record": {"index": 5, "type": "HVM_CONTEXT"},
        "field": None,
        "hint": None,
    }


def test_an_error_reads_place_first_and_advice_last() -> None:
    ref = RecordRef(3, "END")
    error = FormatError("message", offset=16, layer="libxc", record=ref, field="length", hint="do this")
    assert str(error) == "offset 16 (0x10), layer libxc, record 3 END, field length: message; do this"
    assert str(FormatError("message")) == "message"
    assert FormatError("message").to_json()["record"] is None
