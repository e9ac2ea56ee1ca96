"""The reader: layers unwrapped, frames before their payload, checkpoints handed over, ends told apart."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from migstream.errors import DeadlineError, FormatError, TruncatedError
from migstream.io import reader
from migstream.io.reader import Frame, Layer, Stream, Trailer
from migstream.records import ByteOrder, OpaqueRecord, PageData, libxc, libxl, xl
from tests import build
from tests.build import fed, header, image, page, page_data, record


def layers_of(octets: bytes) -> list[tuple[str, int, str]]:
    return [(x.name, x.offset, x.order) for x in items_of(octets) if isinstance(x, Layer)]


def items_of(octets: bytes) -> list[reader.Item]:
    with reader.open_memory(octets) as stream:
        return list(stream.items())


def frames_of(octets: bytes) -> list[str]:
    with reader.open_memory(octets) as stream:
        return [f"{frame.layer.name} {frame.type_name}" for frame in stream]


IMAGE_FRAMES = [
    "libxc STATIC_DATA_END",
    "libxc PAGE_DATA",
    "libxc X86_TSC_INFO",
    "libxc HVM_CONTEXT",
    "libxc HVM_PARAMS",
]
LIBXL_FRAMES = [
    "libxl LIBXC_CONTEXT",
    *IMAGE_FRAMES,
    "libxc END",
    "libxl EMULATOR_XENSTORE_DATA",
    "libxl EMULATOR_CONTEXT",
    "libxl END",
]

# Layers

XL = len(build.xl(b""))


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (image, [("libxc", 0)]),
        (build.libxl_stream, [("libxl", 0), ("libxc", 24)]),
        (
            lambda order: build.xl(build.libxl_stream(order), order=order),
            [("xl", 0), ("libxl", XL), ("libxc", XL + 24)],
        ),
        (lambda order: build.xl(image(order), order=order), [("xl", 0), ("libxc", XL)]),
    ],
    ids=["libxc", "libxl", "xl", "xl around libxc"],
)
def test_layers_are_detected_and_unwrapped_in_both_byte_orders(
    order: str, make: Callable[[str], bytes], expected: list[tuple[str, int]]
) -> None:
    octets = make(order)
    assert layers_of(octets) == [(name, offset, order) for name, offset in expected]
    assert frames_of(octets) == (LIBXL_FRAMES if "libxl" in dict(expected) else [*IMAGE_FRAMES, "libxc END"])


def test_each_layer_has_its_own_byte_order() -> None:
    stream = build.libxl(record(1), image("big"), record(0))
    assert [order for _, _, order in layers_of(build.xl(stream, order="big"))] == ["big", "little", "big"]


def test_the_headers_of_a_layer_are_decoded() -> None:
    with reader.open_memory(build.xl(build.libxl_stream())) as stream:
        assert stream.layers == []
        for _ in stream.items():
            pass
        outer, middle, inner = stream.layers
        config = outer.header(xl.SaveFileConfig)
        assert config is not None
        assert config.config == build.CONFIG
        assert outer.headers[0] == xl.SaveFileHeader(optional_data_len=4 + len(build.CONFIG))
        assert middle.headers == (libxl.LibxlHeader(),)
        domain = libxc.DomainHeader(type=2, xen_major=4, xen_minor=21)
        assert inner.headers == (libxc.ImageHeader(), domain)
        assert inner.header(libxl.LibxlHeader) is None
        assert stream.layer("libxc") is inner
        assert stream.layer("legacy") is None


def test_an_xl_file_without_a_config_has_only_its_header() -> None:
    octets = b"Xen saved domain, xl format\n \0 \r" + struct.pack("<IIII", 0x01020304, 3, 0, 0) + image()
    with reader.open_memory(octets) as stream:
        assert len(list(stream)) == 6
        assert len(stream.layers[0].headers) == 1


def test_optional_data_past_the_config_are_kept() -> None:
    data = struct.pack("<I", 2) + b"{}" + b"more"
    numbers = struct.pack("<IIII", 0x01020304, 3, 0, len(data))
    with reader.open_memory(b"Xen saved domain, xl format\n \0 \r" + numbers + data + image()) as stream:
        next(iter(stream))
        config = stream.layers[0].header(xl.SaveFileConfig)
        assert config is not None
        assert (config.text, config.surplus) == ("{}", b"more")


def test_a_version_that_is_not_known_is_read_as_if_it_were() -> None:
    # Whether it is right is not the reader's to say.
    assert len(items_of(header(version=9) + record(build.END))) == 2


# Frames


def test_frames_say_where_they_are_and_how_long() -> None:
    octets = build.libxl_stream()
    with reader.open_memory(octets) as stream:
        for index, frame in enumerate(stream):
            head = struct.pack("<II", frame.code, frame.length)
            assert octets[frame.offset : frame.body_offset] == head
            assert (frame.index, frame.ref.index, frame.ref.type) == (index, index, frame.type_name)
            assert repr(frame).startswith(f"<Frame {index} {frame.layer.name} {frame.type_name} at ")


def test_unknown_and_optional_records_are_frames_like_others() -> None:
    octets = header() + record(0x8000_0007, b"abc") + record(0x77, b"defg", padding=b"\1\2\3\4") + record(0)
    with reader.open_memory(octets) as stream:
        frames = iter(stream)
        optional = next(frames)
        assert (optional.type_name, optional.optional, optional.record_class) == (
            "OPTIONAL_0x80000007",
            True,
            None,
        )
        assert optional.record() == OpaqueRecord.of("libxc", 0x8000_0007, b"abc")
        unknown = next(frames)
        assert (unknown.type_name, unknown.optional) == ("UNKNOWN_0x00000077", False)
        next(frames)
        assert unknown.padding == b"\1\2\3\4"


def test_records_decode_once_and_stay() -> None:
    with reader.open_memory(image()) as stream:
        for frame in stream:
            first = frame.record()
            assert frame.record() is first
            assert type(first) is frame.record_class


def test_page_data_decodes_without_its_pages() -> None:
    with reader.open_memory(image()) as stream:
        frame = next(frame for frame in stream if frame.is_page_data)
        decoded = frame.record()
        assert isinstance(decoded, PageData)
        assert list(decoded.entries) == [0, 1, 0xE << 60 | 5]
        assert frame.left == 2 * 4096
        assert frame.read(4096) == page(0x11)


def test_what_is_not_consumed_is_skipped_at_any_point_of_a_body() -> None:
    octets = image()
    expected = [*IMAGE_FRAMES, "libxc END"]
    body = 8 + 3 * 8 + 2 * 4096
    for taken in (0, 1, 8, 9, 32, 33, 4096 + 32, body - 1, body):
        with fed(octets) as descriptor, reader.open(descriptor) as stream:
            names = []
            for frame in stream:
                names.append(f"libxc {frame.type_name}")
                if frame.is_page_data:
                    frame.read(taken)
                    assert frame.left == body - taken
            assert names == expected


def test_a_payload_is_read_moved_and_skipped_piece_by_piece(tmp_path: Path) -> None:
    pages = bytes(i % 251 for i in range(3 * 4096))
    octets = header() + page_data([1, 2, 3], pages) + record(build.END)
    with reader.open_memory(octets) as stream, (tmp_path / "out").open("w+b") as out:
        frame = next(iter(stream))
        frame.record()
        one, two = bytearray(100), bytearray(4000)
        assert frame.readv_into([memoryview(one), memoryview(two)]) == 4100
        assert frame.skip(1000) == 1000
        assert frame.splice_to(out.fileno(), 2000) == 2000
        assert frame.read(10) == pages[7100:7110]
        assert frame.splice_to(out.fileno()) == len(pages) - 7110
        assert (frame.left, frame.skip(), frame.read(0)) == (0, 0, b"")
        assert (tmp_path / "out").read_bytes() == pages[5100:7100] + pages[7110:]
        assert one + two == pages[:4100]


def test_no_consumer_can_reach_into_the_next_record() -> None:
    with reader.open_memory(header() + record(9, b"12345678") + record(build.END)) as stream:
        frame = next(iter(stream))
        with pytest.raises(ValueError, match="9 octets asked for, 8 are left"):
            frame.read(9)
        with pytest.raises(ValueError, match="9 octets asked for"):
            frame.readv_into([memoryview(bytearray(5)), memoryview(bytearray(4))])
        with pytest.raises(ValueError, match="9 octets asked for"):
            frame.skip(9)
        with pytest.raises(ValueError, match="9 octets asked for"):
            frame.splice_to(1, 9)
        with pytest.raises(ValueError, match="-1 octets asked for"):
            frame.read(-1)
        assert frame.body() == b"12345678"


def test_a_body_consumed_otherwise_is_not_decoded_as_a_short_one() -> None:
    with reader.open_memory(image()) as stream:
        for frame in stream:
            if frame.length:
                frame.read(1)
                with pytest.raises(ValueError, match="part of it was consumed"):
                    frame.record()
                with pytest.raises(ValueError, match="part of it was consumed"):
                    frame.page_head()


def test_a_frame_that_was_left_behind_has_nothing_more() -> None:
    with reader.open_memory(image()) as stream:
        old = next(frame for frame in stream if frame.is_page_data)
        next(iter(stream))
        assert old.left == 0
        with pytest.raises(ValueError, match="0 are left"):
            old.read(1)


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
@pytest.mark.parametrize("order", ["little", "big"])
def test_entries_come_in_bounded_pieces(at_once: int, order: ByteOrder) -> None:
    entries = [5, 6, 7, 0xF << 60 | 9, 10]
    with reader.open_memory(header(order) + page_data(entries, bytes(4 * 4096), order)) as stream:
        frame = next(iter(stream))
        head = frame.page_head()
        pieces = list(frame.entries(head.entries, at_once))
        assert head == (5, 0)
        assert max(map(len, pieces)) == min(at_once, 5)
        assert [p for piece in pieces for p in piece.pfns.tolist()] == [5, 6, 7, 9, 10]
        assert frame.left == 4 * 4096


def test_a_record_without_entries_is_an_empty_one() -> None:
    with reader.open_memory(header() + page_data([], b"")) as stream:
        frame = next(iter(stream))
        assert frame.page_head().entries == 0
        assert list(frame.entries(0)) == []


def test_a_malformed_body_says_so_every_time_and_the_stream_goes_on() -> None:
    octets = header() + record(build.X86_TSC_INFO, bytes(20)) + record(build.END)
    with reader.open_memory(octets) as stream:
        frames = iter(stream)
        frame = next(frames)
        for _ in range(2):
            with pytest.raises(FormatError, match="needs at least 24 octets, the body has 20") as caught:
                frame.record()
            error = caught.value
            assert (error.offset, error.layer, error.record, error.field) == (
                frame.body_offset + 20,
                "libxc",
                frame.ref,
                "reserved1",
            )
        assert next(frames).type_name == "END"


@pytest.mark.parametrize("body", [b"", bytes(4), struct.pack("<II", 2, 0) + bytes(15)])
def test_a_malformed_page_data_head_says_which_field(body: bytes) -> None:
    for ask in (Frame.record, Frame.page_head):
        with reader.open_memory(header() + record(build.PAGE_DATA, body) + record(0)) as stream:
            frames = iter(stream)
            frame = next(frames)
            with pytest.raises(FormatError) as caught:
                ask(frame)
            error = caught.value
            assert error.field == {0: "count", 4: "reserved1"}.get(len(body), "count")
            assert error.offset == frame.body_offset + (len(body) if len(body) < 8 else 0)
            assert error.record == frame.ref
            assert next(frames).type_name == "END"


# Frames come before their payload


def test_a_frame_comes_before_its_payload_is_written() -> None:
    octets = header() + page_data([1], page(7)) + record(build.END)
    body = len(header()) + 8
    reading, writing = os.pipe()
    try:
        os.write(writing, octets[:body])
        with reader.open(reading, timeout_s=30) as stream:
            frame = next(iter(stream))
            assert (frame.type_name, frame.length) == ("PAGE_DATA", 16 + 4096)
            os.write(writing, octets[body : body + 16])
            assert frame.page_head().entries == 1
            assert [e.run for e in frame.entries(1)] == [(1, 1, 0)]
            os.write(writing, octets[body + 16 :])
            memory = bytearray(4096)
            assert frame.readv_into([memoryview(memory)]) == 4096
            assert memory == page(7)
            assert [f.type_name for f in stream] == ["END"]
    finally:
        os.close(reading)
        os.close(writing)


def test_layers_come_before_what_follows_them() -> None:
    octets = build.xl(build.libxl_stream())
    reading, writing = os.pipe()
    try:
        os.write(writing, octets[: XL + 24])  # up to LIBXC_CONTEXT
        with reader.open(reading, timeout_s=30) as stream:
            items = stream.items()
            assert [type(next(items)).__name__ for _ in range(3)] == ["Layer", "Layer", "Frame"]
            os.write(writing, octets[XL + 24 : XL + 24 + 40])
            layer = next(items)
            assert isinstance(layer, Layer)
            assert layer.name == "libxc"
    finally:
        os.close(reading)
        os.close(writing)


# Descriptors


@pytest.mark.parametrize("make", [image, build.libxl_stream])
def test_a_descriptor_is_left_exactly_behind_end_and_its_sender_is_not_waited_for(
    make: Callable[[], bytes],
) -> None:
    with fed(make() + b"what follows", keep_open=True) as descriptor:
        with reader.open(descriptor, timeout_s=30) as stream:
            for _ in stream:
                pass
            assert stream.ending == "end"
            assert stream.position == len(make())
        assert os.read(descriptor, 100) == b"what follows"


def test_a_live_sender_is_not_waited_for_behind_end() -> None:
    with fed(image(), keep_open=True) as descriptor, reader.open(descriptor, timeout_s=0.05) as stream:
        assert len(list(stream)) == 6
        with pytest.raises(DeadlineError):  # items looks for a trailer, so it has to wait
            list(stream.items())


def test_a_file_is_read_from_where_its_descriptor_stands_and_left_behind_end(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    path.write_bytes(b"in front" + image() + b"behind")
    with path.open("rb", buffering=0) as file:
        file.seek(8)
        with reader.open(file.fileno()) as stream:
            frames = list(stream)
        assert frames[0].offset == 40
        assert file.read() == b"behind"


def test_a_path_and_a_pipe_give_the_same_frames(tmp_path: Path) -> None:
    octets = build.xl(build.libxl_stream())
    (tmp_path / "file").write_bytes(octets)
    with reader.open(tmp_path / "file") as stream:
        from_file = [repr(frame) for frame in stream]
    with fed(octets, piece=5) as descriptor, reader.open(descriptor) as stream:
        assert [repr(frame) for frame in stream] == from_file


def test_a_sender_that_falls_silent_is_a_deadline_error() -> None:
    with (
        fed(image()[:100], keep_open=True) as descriptor,
        reader.open(descriptor, timeout_s=0.05) as stream,
        pytest.raises(DeadlineError),
    ):
        list(stream)


# One pass


def test_a_walk_goes_on_where_it_was_left_whoever_asks() -> None:
    octets = build.libxl_stream() + b"trailer"
    with reader.open_memory(octets) as stream:
        for _ in stream.items():
            break
        seen = [next(iter(stream)).type_name]
        for item in stream.items():
            if isinstance(item, Frame):
                seen.append(item.type_name)
                break
        seen += [frame.type_name for frame in stream]
        assert seen == [name.split()[1] for name in LIBXL_FRAMES]
        (trailer,) = stream.items()
        assert isinstance(trailer, Trailer)
        assert list(stream.items()) == []
        assert list(stream) == []


# Ends


def test_a_stream_ends_at_its_outermost_end_record_without_a_trailer() -> None:
    for octets in (image(), build.libxl_stream(), build.xl(build.libxl_stream())):
        with reader.open_memory(octets) as stream:
            assert not isinstance(list(stream.items())[-1], Trailer)
            assert (stream.ending, stream.position, stream.checkpoints) == ("end", len(octets), 0)


@pytest.mark.parametrize("from_pipe", [False, True])
def test_what_follows_the_end_is_a_trailer(from_pipe: bool, tmp_path: Path) -> None:
    message = b"domain is yours, you are cleared to unpause\0"
    octets = build.libxl_stream() + message

    def check(stream: Stream) -> None:
        *_, trailer = stream.items()
        assert isinstance(trailer, Trailer)
        assert trailer.offset == len(octets) - len(message)
        assert trailer.left == (None if from_pipe else len(message))
        assert trailer.read(6) == b"domain"
        with (tmp_path / "out").open("w+b") as out:
            assert trailer.splice_to(out.fileno()) == len(message) - 6
        assert trailer.skip() == 0
        assert (tmp_path / "out").read_bytes() == message[6:]

    if from_pipe:
        with fed(octets) as descriptor, reader.open(descriptor) as stream:
            check(stream)
    else:
        with reader.open_memory(octets) as stream:
            check(stream)


def test_a_trailer_of_unknown_length_is_read_to_its_end() -> None:
    with fed(build.libxl_stream() + b"123") as descriptor, reader.open(descriptor) as stream:
        *_, trailer = stream.items()
        assert isinstance(trailer, Trailer)
        assert trailer.read(100) == b"123"
        assert trailer.readv_into([memoryview(bytearray(4))]) == 0


def test_a_trailer_that_vanishes_while_it_is_read_is_a_truncation(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    path.write_bytes(image() + bytes(100))
    with reader.open(path) as stream:
        *_, trailer = stream.items()
        assert isinstance(trailer, Trailer)
        os.truncate(path, len(image()) + 40)
        with (
            open(os.devnull, "wb") as nowhere,
            pytest.raises(TruncatedError, match="after 40 of the 100 octets") as caught,
        ):
            trailer.splice_to(nowhere.fileno())
        assert (caught.value.offset, caught.value.layer) == (len(image()) + 40, None)


# Checkpoints


def test_checkpoints_hand_libxc_to_libxl_and_back_without_headers() -> None:
    octets = build.remus_stream(rounds=2)
    with reader.open_memory(octets) as stream:
        seen = [f"{frame.layer.name} {frame.type_name}" for frame in stream]
        handed_over = ["libxc CHECKPOINT", "libxl EMULATOR_CONTEXT", "libxl CHECKPOINT_END"]
        assert seen == [
            "libxl LIBXC_CONTEXT",
            *IMAGE_FRAMES,
            *handed_over,
            *["libxc PAGE_DATA", *handed_over] * 2,
        ]
        assert [layer.name for layer in stream.layers] == ["libxl", "libxc"]
        assert (stream.checkpoints, stream.checkpoint_offset) == (3, len(octets))
        assert stream.ending == "checkpoint"


def test_a_checkpointed_stream_may_end_with_end_records() -> None:
    octets = build.remus_stream(1) + record(build.END) + record(build.END)
    with reader.open_memory(octets) as stream:
        assert [f.layer.name for f in stream][-2:] == ["libxc", "libxl"]
        assert (stream.ending, stream.checkpoints) == ("end", 2)


def test_a_bare_libxc_image_with_checkpoints_stays_libxc() -> None:
    rest = record(build.CHECKPOINT) + page_data([1], page(1))
    with reader.open_memory(image(end=False) + rest * 2) as stream:
        assert {frame.layer.name for frame in stream} == {"libxc"}
        assert (stream.checkpoints, stream.ending) == (2, "checkpoint")
        assert stream.checkpoint_offset == stream.position - len(page_data([1], page(1)))


def test_records_behind_the_last_checkpoint_are_frames_too() -> None:
    octets = build.remus_stream(0)
    with reader.open_memory(octets + page_data([9], page(9))) as stream:
        assert [frame.type_name for frame in stream][-1] == "PAGE_DATA"
        assert (stream.ending, stream.checkpoint_offset) == ("checkpoint", len(octets))


@pytest.mark.parametrize("cut", [1, 7, 8, 100, 4096])
def test_an_end_inside_a_record_behind_a_checkpoint_says_what_a_restore_would_do(cut: int) -> None:
    octets = build.remus_stream(0) + page_data([9], page(9))[:cut]
    with reader.open_memory(octets) as stream:
        with pytest.raises(TruncatedError) as caught:
            list(stream)
        assert caught.value.hint == "a restore would fail over to checkpoint 1, the last complete one"
        assert caught.value.offset == len(octets)
        assert stream.ending is None


def test_an_end_before_the_first_checkpoint_is_complete_is_a_truncation() -> None:
    head = build.libxl(record(build.LIBXC_CONTEXT) + image(end=False) + record(build.CHECKPOINT))
    for octets in (head, head + record(build.EMULATOR_CONTEXT, bytes(8))):
        with reader.open_memory(octets) as stream:
            with pytest.raises(TruncatedError, match="without libxl's END record") as caught:
                list(stream)
            assert caught.value.hint is None


@pytest.mark.parametrize("body", [struct.pack("<I", 0), struct.pack("<II", 0, 0)])
def test_colo_tells_of_a_new_checkpoint_before_libxc_goes_on(body: bytes) -> None:
    # What a COLO primary sends: CHECKPOINT_END, CHECKPOINT_STATE, and libxc's records again.
    state = record(build.CHECKPOINT_STATE, body)
    octets = build.remus_stream(0) + state + page_data([3], page(3)) + record(build.CHECKPOINT)
    with reader.open_memory(octets + record(build.CHECKPOINT_END) + state) as stream:
        seen = [f"{frame.layer.name} {frame.type_name}" for frame in stream]
    assert seen[-6:] == [
        "libxl CHECKPOINT_END",
        "libxl CHECKPOINT_STATE",
        "libxc PAGE_DATA",
        "libxc CHECKPOINT",
        "libxl CHECKPOINT_END",
        "libxl CHECKPOINT_STATE",
    ]


def test_the_same_octets_are_vcpu_state_anywhere_else() -> None:
    # Type 5 is libxc's X86_PV_VCPU_EXTENDED unless it comes first behind a checkpoint inside libxl.
    vcpu = record(build.VCPU_EXTENDED, bytes(8))
    assert frames_of(header() + vcpu + record(build.CHECKPOINT) + vcpu + record(0)) == [
        "libxc X86_PV_VCPU_EXTENDED",
        "libxc CHECKPOINT",
        "libxc X86_PV_VCPU_EXTENDED",
        "libxc END",
    ]
    octets = build.remus_stream(0) + page_data([3], page(3)) + vcpu
    assert frames_of(octets)[-1] == "libxc X86_PV_VCPU_EXTENDED"
    longer = record(build.VCPU_EXTENDED, bytes(128))
    assert frames_of(build.remus_stream(0) + longer)[-1] == "libxc X86_PV_VCPU_EXTENDED"


# Streams that no tool writes: understood as far as they can be, never judged, never without end


def test_a_checkpoint_state_outside_a_checkpoint_stays_in_libxl() -> None:
    octets = build.libxl(record(build.CHECKPOINT_STATE, bytes(4)), record(build.END))
    assert frames_of(octets) == ["libxl CHECKPOINT_STATE", "libxl END"]


def test_a_checkpoint_end_without_an_image_to_go_on_with_completes_no_checkpoint() -> None:
    for before in (b"", record(build.LIBXC_CONTEXT) + image()):
        with reader.open_memory(build.libxl(before, record(build.CHECKPOINT_END))) as stream:
            with pytest.raises(TruncatedError, match="without libxl's END record"):
                list(stream)
            assert (stream.checkpoints, stream.ending) == (0, None)
        assert frames_of(build.libxl(before, record(build.CHECKPOINT_END), record(0)))[-2:] == [
            "libxl CHECKPOINT_END",
            "libxl END",
        ]


def test_a_libxl_stream_without_an_image_is_a_libxl_stream() -> None:
    assert frames_of(build.libxl(record(build.END))) == ["libxl END"]


def test_a_body_of_records_that_have_none_is_passed_over() -> None:
    octets = build.libxl(
        record(build.LIBXC_CONTEXT, b"body"),
        header() + record(build.END, bytes(9)),
        record(build.END, b"x"),
    )
    with reader.open_memory(octets) as stream:
        assert [frame.record().surplus for frame in stream] == [b"body", bytes(9), b"x"]
        assert stream.ending == "end"


def test_two_images_one_after_the_other_are_two_layers() -> None:
    context = record(build.LIBXC_CONTEXT)
    octets = build.libxl(context, image(), context, image("big"), record(build.END))
    assert [name for name, _, _ in layers_of(octets)] == ["libxl", "libxc", "libxc"]
    assert frames_of(octets).count("libxc END") == 2


def test_an_image_within_another_is_gone_on_with_the_newest() -> None:
    context, checkpoint = record(build.LIBXC_CONTEXT), record(build.CHECKPOINT)
    octets = build.libxl(
        context, header() + checkpoint, context, header() + checkpoint, record(build.CHECKPOINT_END)
    )
    with reader.open_memory(octets + page_data([1], page(1))) as stream:
        frames = list(stream)
        assert frames[-1].layer is stream.layers[-1]
        assert len(stream.layers) == 3


def test_layers_without_end_are_refused_not_remembered() -> None:
    one = record(build.LIBXC_CONTEXT) + header() + record(build.END)
    with reader.open_memory(build.libxl(one * 1000)) as stream:
        with pytest.raises(FormatError, match="header number 65") as caught:
            list(stream)
        assert len(stream.layers) == reader.MAX_LAYERS
        assert caught.value.layer == "libxl"


def test_many_checkpoints_take_no_memory_and_no_time_for_each_other() -> None:
    import tracemalloc

    rounds = record(build.CHECKPOINT) + record(build.CHECKPOINT_END)
    octets = build.libxl(record(build.LIBXC_CONTEXT), header(), rounds * 20_000)
    with reader.open_memory(octets) as stream:
        tracemalloc.start()
        try:
            for _ in stream:
                pass
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()
        assert stream.checkpoints == 20_000


def test_an_xl_file_whose_flags_are_strange_is_read_on() -> None:
    assert frames_of(build.xl(build.libxl_stream(), flags=0xFF)) == LIBXL_FRAMES


def test_a_stream_closed_in_the_middle_leaves_its_descriptor_to_the_caller() -> None:
    # A consumer that stops early closes; whoever writes then sees a broken pipe, not a hang.
    reading, writing = os.pipe()
    failed = threading.Event()

    def write() -> None:
        try:
            for _ in range(1000):
                os.write(writing, bytes(1 << 16))
        except BrokenPipeError:
            failed.set()
        finally:
            os.close(writing)

    os.write(writing, header() + struct.pack("<II", build.HVM_CONTEXT, 1 << 27))
    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    with reader.open(reading) as stream:
        next(iter(stream)).skip(1 << 18)
        stream.close()
    os.close(reading)
    thread.join(30)
    assert failed.is_set()
