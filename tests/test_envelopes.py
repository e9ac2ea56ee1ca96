"""Envelopes of libvirt, xend and xapi: read at every place, written again octet for octet."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
import zstandard
from hypothesis import given, settings

from migstream.cli.summary import summary
from migstream.errors import FormatError, StreamError, TruncatedError
from migstream.inspection import Report, inspect
from migstream.io import reader
from migstream.io.envelopes import EnvelopeWriter, Kind
from migstream.io.layers import MAX_CONFIG
from migstream.io.reader import Frame, Layer, Segment, Stream, Trailer
from migstream.io.writer import StreamWriter, copy_stream
from migstream.records import MAX_RECORD_LENGTH, OpaqueRecord, envelopes, record_types
from migstream.verification import verify
from tests import build
from tests.build import DATA, SEXPR, XENOPS, XML, fed, header, libvirt, record, segment, xapi, xend

# A header and an END make the smallest image, which is enough around which to cut at every octet.
TINY = header() + record(build.STATIC_DATA_END) + record(build.END)
TINY_LIBXL = build.libxl(record(build.LIBXC_CONTEXT), TINY, record(build.END))
LIBXC, LIBXL, LIBXC_LEGACY = 0xF0, 0xF1, 0xF2
LEGACY = struct.pack("<QI", 1024, 0xFFFF_FFFF) + b"\xff" * 4 + bytes(64)

#: Streams that can be read to their end.
WHOLE = {
    "libvirt": libvirt(TINY_LIBXL),
    "libvirt around libxc": libvirt(TINY),
    "libvirt without XML": libvirt(TINY_LIBXL, b""),
    "xapi": xapi(
        segment(LIBXC) + TINY, segment(0xF11, b"efivars"), segment(0xF13, b"dHBt"), segment(0xF00, b"QEVM!")
    ),
    "xapi around libxl": xapi(segment(LIBXL) + TINY_LIBXL, segment(0xF01, b"QEVM!")),
    "xapi without an image": xapi(),
    "xapi with unknown segments": xapi(segment(0x1234, b"later"), segment(LIBXC) + TINY, segment(1 << 62)),
    "xapi with lengths that it ignores": xapi(segment(LIBXC, length=77) + TINY, end=False)
    + segment(0xFFFF, length=5) + b"after",
    "xapi with a measured vGPU": xapi(segment(LIBXC) + TINY, segment(0xF10, b"vGPU")),
    "xapi with an empty vGPU": xapi(segment(LIBXC) + TINY, segment(0xF10)),
    "xapi with two images": xapi(segment(LIBXC) + TINY, segment(LIBXC) + TINY),
    "xapi around Remus": xapi(
        segment(LIBXL),
        build.libxl(record(build.LIBXC_CONTEXT), header(), record(build.STATIC_DATA_END)),
        (record(build.CHECKPOINT) + record(build.CHECKPOINT_END)) * 2,
        record(build.END) * 2,
    ),
}  # fmt: skip
#: Streams whose reading ends at the legacy stream that they hold.
HOLDING_LEGACY = {
    "libvirt": libvirt(LEGACY, version=1),
    "xend": xend(LEGACY),
    "xapi1": b"XenSavedDomain\n" + LEGACY,
    "xapi": xapi(segment(LIBXC_LEGACY) + LEGACY),
}


def shapes(stream: Stream) -> list[str]:
    """Return what a stream is made of, one word or two an item; consume nothing."""
    found = []
    for item in stream.items():
        match item:
            case Layer():
                found.append(item.name)
            case Frame():
                found.append(f"{item.layer.name}:{item.type_name}:{item.length}")
            case Trailer():
                found.append(f"trailer:{item.left}")
    return found


def failure(stream: Stream) -> StreamError | None:
    """Return the error that ends the reading, if one does."""
    try:
        shapes(stream)
    except StreamError as exc:
        return exc
    return None


def error_of(octets: bytes) -> StreamError:
    with reader.open_memory(octets) as stream:
        error = failure(stream)
    assert error is not None
    return error


# Golden octets, from the layouts


def test_libvirts_image_by_hand() -> None:
    octets = (
        bytes.fromhex(
            "6c 69 62 76 69 72 74 2d  78 6d 6c 0a 20 00 20 0d"  # libvirt-xml\n \0 \r
            "02 00 00 00  05 00 00 00"  # version, length of the XML
        )
        + bytes(40)
        + b"<d/>\0"
        + TINY_LIBXL
    )
    with reader.open_memory(octets) as stream:
        assert shapes(stream) == ["libvirt", "libxl", "libxl:LIBXC_CONTEXT:0", "libxc",
                                  "libxc:STATIC_DATA_END:0", "libxc:END:0", "libxl:END:0"]  # fmt: skip
        layer = stream.layers[0]
        assert layer.headers[0] == envelopes.LibvirtHeader(version=2, xml_len=5)
        assert (layer.order, layer.config, layer.config_text) == ("little", b"<d/>\0", "<d/>")
        assert [layer.offset for layer in stream.layers] == [0, 69, 93]


def test_xapis_image_by_hand() -> None:
    octets = (
        b"XenSavedDomv2-\n"
        + bytes.fromhex("0f 00 00 00 00 00 00 00  02 00 00 00 00 00 00 00")
        + b"()"
        + bytes.fromhex("f0 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00")
        + TINY
        + bytes.fromhex("00 0f 00 00 00 00 00 00  03 00 00 00 00 00 00 00")
        + b"qemu"[:3]
        + bytes.fromhex("ff ff 00 00 00 00 00 00  00 00 00 00 00 00 00 00")
    )
    with reader.open_memory(octets) as stream:
        frames = {frame.type_name: (frame.offset, frame.record()) for frame in stream}
        assert stream.ending == "end"
        assert stream.position == len(octets)
    assert frames["Xenops"] == (15, envelopes.Xenops(config=b"()"))
    assert frames["Libxc"] == (33, envelopes.Libxc())
    assert frames["Qemu_trad"] == (49 + len(TINY), envelopes.QemuTrad(state=b"qem"))
    assert frames["End"] == (68 + len(TINY), envelopes.EndOfImage())


def test_every_segment_type_has_its_number() -> None:
    assert {kind.type: kind.code for kind in record_types("xapi")} == {
        "Xenops": 0x0F, "Libxc": 0xF0, "Libxl": 0xF1, "Libxc_legacy": 0xF2, "Qemu_trad": 0xF00,
        "Qemu_xen": 0xF01, "Demu": 0xF10, "Varstored": 0xF11, "Swtpm0": 0xF12, "Swtpm": 0xF13, "End": 0xFFFF,
    }  # fmt: skip


def test_xends_file_by_hand() -> None:
    octets = b"LinuxGuestRecord" + bytes.fromhex("00 00 00 08") + b"(domain)" + LEGACY
    with reader.open_memory(octets) as stream, pytest.raises(FormatError, match="legacy"):
        shapes(stream)
    assert stream.layers[0].headers == (
        envelopes.XendHeader(config_len=8),
        envelopes.XendConfig(config=b"(domain)"),
    )
    assert stream.layers[0].config == b"(domain)"


def test_segments_lie_in_the_stream_in_their_order() -> None:
    with reader.open_memory(WHOLE["xapi"]) as stream:
        assert shapes(stream) == [
            "xapi",
            f"xapi:Xenops:{len(XENOPS)}",
            "xapi:Libxc:0",
            "libxc",
            "libxc:STATIC_DATA_END:0",
            "libxc:END:0",
            "xapi:Varstored:7",
            "xapi:Swtpm:4",
            "xapi:Qemu_trad:5",
            "xapi:End:0",
        ]
    with reader.open_memory(WHOLE["xapi with unknown segments"]) as stream:
        kinds = [frame.type_name for frame in stream]
        assert kinds[1] == "UNKNOWN_0x00001234"
        assert kinds[-2:] == ["UNKNOWN_0x4000000000000000", "End"]
    with reader.open_memory(WHOLE["xapi with lengths that it ignores"]) as stream:
        assert shapes(stream)[-2:] == ["xapi:End:0", "trailer:5"]


def test_a_segments_body_is_read_as_any_records() -> None:
    with reader.open_memory(WHOLE["xapi"]) as stream:
        for frame in stream:
            if frame.type_name == "Qemu_trad":
                assert isinstance(frame, Segment)
                assert (frame.announced, frame.body_offset - frame.offset) == (5, 16)
                assert frame.read(2) == b"QE"
                assert frame.body() == b"VM!"
    unknown = OpaqueRecord.of("xapi", 1 << 62, b"body")
    assert OpaqueRecord.from_json(unknown.to_json()) == unknown


def test_checkpoints_are_counted_inside_xapis_image() -> None:
    with reader.open_memory(WHOLE["xapi around Remus"]) as stream:
        assert shapes(stream)[-3:] == ["libxc:END:0", "libxl:END:0", "xapi:End:0"]
        assert stream.checkpoints == 2
        assert stream.ending == "end"


# Legacy streams inside


@pytest.mark.parametrize("kind", HOLDING_LEGACY)
def test_reading_ends_at_the_first_octet_of_a_legacy_stream(kind: str) -> None:
    octets = HOLDING_LEGACY[kind]
    with fed(octets, piece=7) as descriptor, reader.open(descriptor) as stream:
        with pytest.raises(FormatError, match="legacy") as caught:
            shapes(stream)
        assert stream.legacy
        assert (caught.value.layer, caught.value.offset) == (kind, octets.index(LEGACY))
        assert "migstream convert" in str(caught.value)
        assert stream.position == octets.index(LEGACY)
        assert stream.input.read(1 << 12) == octets[octets.index(LEGACY) :]
        assert [layer.name for layer in stream.layers] == [kind]


@pytest.mark.parametrize("wrap", [xend, lambda octets: b"XenSavedDomain\n" + octets], ids=["xend", "xapi1"])
def test_what_xend_and_old_xapi_hold_is_a_legacy_stream_or_nothing(wrap: Callable[[bytes], bytes]) -> None:
    error = error_of(wrap(TINY))
    assert "libxc cannot stand inside" in error.message
    assert "expected a header inside" in error_of(wrap(b"something else")).message


def test_old_tools_that_used_xends_magic_are_refused() -> None:
    error = error_of(b"LinuxGuestRecord" + bytes(4) + b"\xff" * 4096)
    assert isinstance(error, FormatError)
    error = error_of(b"LinuxGuestRecord" + b"\xff" * 4096)
    assert (error.offset, error.layer, error.field) == (16, "xend", "config_len")


def test_the_image_of_the_cloud_hypervisor_driver_is_told_apart() -> None:
    octets = b"libvirt-xml\n \0 \r" + struct.pack("<I44x", len(XML)) + XML
    error = error_of(octets)
    assert "cloud-hypervisor" in error.message
    assert (error.offset, error.layer) == (0, "libvirt")


# Bad input


@pytest.mark.parametrize("kind", WHOLE)
def test_an_envelope_cut_at_any_octet_is_truncated_there(kind: str) -> None:
    octets = WHOLE[kind]
    with reader.open_memory(octets) as stream:
        shapes(stream)
        end = stream.position
        behind_checkpoint = stream.checkpoints
    for length in range(end):
        with reader.open_memory(octets[:length]) as stream:
            error = failure(stream)
            if error is None:
                assert behind_checkpoint
                assert stream.ending == "checkpoint"
                continue
        assert type(error) is TruncatedError
        assert error.offset == length
        assert (error.layer is None) == (length == 0)


@pytest.mark.parametrize("kind", HOLDING_LEGACY)
def test_an_envelope_of_a_legacy_stream_cut_before_it_is_truncated(kind: str) -> None:
    octets = HOLDING_LEGACY[kind]
    for length in range(octets.index(LEGACY) + 1):
        error = error_of(octets[:length])
        assert type(error) is TruncatedError
        assert error.offset == length


@pytest.mark.parametrize("kind", [*WHOLE, *HOLDING_LEGACY])
@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_a_flipped_octet_gives_data_or_an_error_with_its_place(kind: str, mask: int) -> None:
    octets = {**HOLDING_LEGACY, **WHOLE}[kind]
    for at in range(len(octets)):
        damaged = bytearray(octets)
        damaged[at] ^= mask
        with reader.open_memory(bytes(damaged)) as stream:
            error = failure(stream)
        assert error is None or (error.offset is not None and 0 <= error.offset <= len(octets))


@pytest.mark.parametrize(
    ("octets", "place"),
    [
        (envelopes.LIBVIRT_MAGIC + struct.pack("<II40x", 2, 0xFFFF_FFFF) + b"<", (20, "libvirt", "xml_len")),
        (envelopes.LIBVIRT_MAGIC + struct.pack("<II40x", 2, MAX_CONFIG + 1), (20, "libvirt", "xml_len")),
        (b"LinuxGuestRecord" + struct.pack(">i", -1) + bytes(99), (16, "xend", "config_len")),
        (b"LinuxGuestRecord" + struct.pack(">i", 0x7FFF_FFFF) + bytes(99), (16, "xend", "config_len")),
        (b"XenSavedDomv2-\n" + struct.pack("<qq", 0xF, -1) + bytes(99), (23, "xapi", "length")),
        (b"XenSavedDomv2-\n" + struct.pack("<qq", 0x77, -(1 << 63)) + bytes(99), (23, "xapi", "length")),
    ],
)  # fmt: skip
def test_a_hostile_length_is_refused_at_its_place(octets: bytes, place: tuple[int, str, str]) -> None:
    error = error_of(octets)
    assert (error.offset, error.layer, error.field) == place


@pytest.mark.parametrize("code", [0xF, 0xF00, 0x1234])
def test_a_segment_of_nearly_all_there_is_costs_no_memory(code: int) -> None:
    octets = b"XenSavedDomv2-\n" + struct.pack("<qq", code, (1 << 63) - 1) + bytes(100)
    tracemalloc.start()
    error = error_of(octets)
    with reader.open_memory(octets) as stream:
        frame = next(iter(stream))
        with pytest.raises(FormatError, match=f"the limit is {MAX_RECORD_LENGTH}") as caught:
            frame.record()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    assert type(error) is TruncatedError
    assert error.offset == len(octets)
    assert caught.value.offset == 23


def test_a_vgpu_whose_length_is_left_out_ends_the_reading() -> None:
    error = error_of(xapi(segment(LIBXC) + TINY, segment(0xF10) + b"state of the vGPU"))
    assert "virtual GPU" in error.message
    assert error.layer == "xapi"


def test_layers_stand_only_where_they_may() -> None:
    for octets in (libvirt(libvirt(TINY_LIBXL)), xapi(segment(LIBXC) + build.xl(TINY_LIBXL))):
        assert "cannot stand inside" in error_of(octets).message


@settings(max_examples=200, deadline=None)
@given(start=st.sampled_from([*WHOLE.values()]), cut=st.integers(0, 200), rest=st.binary(max_size=80))
def test_anything_behind_a_good_start_is_harmless(start: bytes, cut: int, rest: bytes) -> None:
    octets = start[:cut] + rest
    verdict = verify(reader.open_memory(octets))
    assert all(0 <= finding.offset <= len(octets) for finding in verdict.findings)


# Writing


def output(write: Callable[[StreamWriter], object]) -> bytes:
    descriptor = os.memfd_create("out")
    try:
        writer = StreamWriter(descriptor)
        write(writer)
        octets = os.pread(descriptor, 1 << 27, 0)
        assert len(octets) == writer.written
        return octets
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("rebuild", [False, True], ids=["copied", "rebuilt"])
@pytest.mark.parametrize("kind", WHOLE)
def test_an_envelope_is_written_again_octet_for_octet(kind: str, rebuild: bool) -> None:
    octets = WHOLE[kind]
    with reader.open_memory(octets) as stream:
        assert output(lambda writer: copy_stream(stream, writer, rebuild=rebuild)) == octets
    with fed(octets, piece=5) as descriptor, reader.open(descriptor) as stream:
        assert output(lambda writer: copy_stream(stream, writer, rebuild=rebuild)) == octets


@settings(max_examples=100, deadline=None)
@given(
    segments=st.lists(st.tuples(st.integers(1, (1 << 63) - 1), st.binary(max_size=20)), max_size=6),
    rebuild=st.booleans(),
)
def test_any_segments_are_written_again(segments: list[tuple[int, bytes]], rebuild: bool) -> None:
    streams = {LIBXC, LIBXL, LIBXC_LEGACY, 0xFFFF, 0xF10}
    octets = xapi(*(segment(code, body) for code, body in segments if code not in streams))
    with reader.open_memory(octets) as stream:
        assert output(lambda writer: copy_stream(stream, writer, rebuild=rebuild)) == octets


def capture() -> bytes:
    packed = (DATA / "tinypv-save-p.xl.zst").read_bytes()
    return zstandard.ZstdDecompressor().decompressobj().decompress(packed)


def split(octets: bytes) -> tuple[bytes, bytes]:
    """Return the config of an xl file, and the libxl stream in it."""
    (length,) = struct.unpack_from("<I", octets, 44)
    return octets[52 : 48 + length], octets[48 + length :]


@pytest.mark.parametrize("kind", ["xl", "libvirt", "xapi"])
def test_a_capture_in_each_envelope_is_what_is_made_by_hand(kind: Kind, tmp_path: Path) -> None:
    config, content = split(capture())
    image = content[16 + 8 : -8]  # without libxl's header, LIBXC_CONTEXT and END
    qemu = envelopes.QemuTrad(state=b"QEVM")
    expected, content, config = {
        "xl": (capture(), content, config),
        "libvirt": (libvirt(content), content, XML),
        "xapi": (xapi(segment(LIBXC) + image, segment(0xF00, b"QEVM")), image, XENOPS),
    }[kind]

    def write(writer: StreamWriter) -> None:
        segments = [qemu] if kind == "xapi" else []
        with (
            reader.open_memory(content) as stream,
            EnvelopeWriter(kind, writer, config, segments=segments),
        ):
            copy_stream(stream, writer)

    assert output(write) == expected
    (tmp_path / "in").write_bytes(expected)
    with reader.open(tmp_path / "in") as stream:
        assert output(lambda writer: copy_stream(stream, writer)) == expected


def test_a_config_gets_the_nul_that_xl_and_libvirt_write() -> None:
    for kind in ("xl", "libvirt"):
        with_nul = output(lambda writer, kind=kind: EnvelopeWriter(kind, writer, b"{}\0"))  # type: ignore[misc]  # bound early
        without = output(lambda writer, kind=kind: EnvelopeWriter(kind, writer, b"{}"))  # type: ignore[misc]  # bound early
        assert with_nul == without
        assert without.endswith(b"{}\0")


def test_an_envelope_whose_stream_fails_gets_no_tail() -> None:
    def write(writer: StreamWriter) -> None:
        with pytest.raises(KeyError), EnvelopeWriter("xapi", writer, XENOPS):
            raise KeyError

    assert output(write) == xapi(segment(LIBXC), end=False)


# inspect


def report_of(octets: bytes) -> Report:
    report = Report()
    with reader.open_memory(octets) as stream:
        for line in inspect(stream, report):
            assert line.to_json()["layer"] in {"xapi", "libxl", "libxc"}
            assert isinstance(line.text, str)
    return report


@pytest.mark.parametrize(
    ("octets", "headline", "layers", "config"),
    [
        (WHOLE["libvirt"], "libvirt save image", ["libvirt", "libxl", "libxc"], XML[:-1]),
        (WHOLE["xapi"], "xapi suspend image", ["xapi", "libxc"], XENOPS),
        (HOLDING_LEGACY["xend"], "xend save file", ["xend"], SEXPR),
        (HOLDING_LEGACY["xapi1"], "xapi suspend image", ["xapi1"], None),
    ],
)
def test_inspect_names_the_envelope_and_shows_its_config(
    octets: bytes, headline: str, layers: list[str], config: bytes | None
) -> None:
    report = report_of(octets)
    shown = list(summary(report, "file"))
    assert shown[0].startswith(f"file: {headline}")
    as_json = report.to_json()
    assert isinstance(as_json["layers"], list)
    assert [layer["name"] for layer in as_json["layers"]] == layers
    assert as_json["config"] == (None if config is None else config.decode())
    assert (report.error is None) == (len(layers) > 1)
