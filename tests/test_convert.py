"""Streams from envelope to envelope and from version to version, and everything that cannot be converted."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from migstream.cli.convert import command
from migstream.converting import ConvertError
from migstream.errors import FormatError, StreamError, TruncatedError
from migstream.io import reader
from migstream.io.reader import Layer
from migstream.records import PageData

from . import build, legacy_streams
from .conversions import captures, converted, findings, records, types, unpacked
from .streams import (
    CPUID,
    MSRS,
    PAGE,
    STATIC_DATA_END,
    TAIL,
    PvGuest,
    hvm,
    page,
    page_data,
    pages,
    raw,
    stream,
)

XML = b"<domain type='xen'><name>guest</name></domain>"
PLAIN_LIBXL = build.libxl(build.record(build.LIBXC_CONTEXT), build.image(), build.record(0))
V2 = stream(pages(0, [1, 2]), *TAIL, raw(0), version=2)
TRAILER = b"domain is yours, you are cleared to unpause\0"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def memory(octets: bytes) -> list[tuple[int, int, bytes]]:
    """Return (PFN, type, content) of every entry, in the order of the stream."""
    found = []
    with reader.open_memory(octets) as source:
        for frame in source:
            record = frame.record() if frame.is_page_data else None
            if isinstance(record, PageData):
                for pfn, type in zip(record.pfns.tolist(), record.types.tolist(), strict=True):
                    found.append((pfn, type, frame.read(PAGE) if type < 5 else b""))
    return found


def without(octets: bytes, *wanted: str) -> list[str]:
    return [name for name in types(octets) if name not in wanted]


# Nothing asked to change


@pytest.mark.parametrize(
    ("to", "octets"),
    [
        ("xl", build.xl(build.libxl_stream())),
        ("xl", build.xl(build.libxl_stream("big"), order="big")),
        ("xl", build.xl(build.libxl_stream()) + TRAILER),
        ("libxl", build.libxl_stream() + TRAILER),
        ("libxl", build.remus_stream()),
        ("libxc3", build.image() + b"more"),
        ("libxc3", hvm(raw(0x8000_0077, b"odd", padding=7), raw(0x66, b"unknown"))),
        ("libxc2", V2),
    ],
)
def test_the_same_form_is_the_same_octets(to: str, octets: bytes) -> None:
    assert converted(octets, to) == octets


@pytest.mark.parametrize("capture", captures(), ids=lambda path: path.name.split(".")[0])
def test_captures_come_back_from_every_envelope_as_they_were(capture: Path) -> None:
    octets = unpacked(capture)
    assert converted(octets, "xl") == octets
    with reader.open_memory(octets) as source:
        items = list(source.items())
    layer = items[0]
    assert isinstance(layer, Layer)
    assert layer.config is not None
    body = octets[items[1].offset :] if isinstance(items[1], Layer) else b""
    trailer = items[-1] if isinstance(items[-1], reader.Trailer) else None
    body = body[: len(body) - (len(octets) - trailer.offset)] if trailer else body
    inner = converted(octets, "libxl")
    assert inner == body
    assert converted(inner, "xl", config=layer.config) == octets[: len(octets) - (44 if trailer else 0)]
    in_libvirt = converted(octets, "libvirt", config=XML)
    assert in_libvirt[:16] == b"libvirt-xml\n \0 \r"
    assert converted(in_libvirt, "libvirt") == in_libvirt
    assert converted(in_libvirt, "libxl") == inner
    image = converted(octets, "libxc3", lossy=True)
    assert findings(image) == []
    wrapped = converted(image, "libxl")
    if "hvm" not in capture.name and "remus" not in capture.name:
        assert wrapped == inner  # a PV or PVH guest has no emulator


def test_a_remus_capture_unwraps_to_checkpoints_and_wraps_again() -> None:
    octets = build.libxl(
        build.record(build.LIBXC_CONTEXT)
        + build.image(end=False)
        + (
            build.record(build.CHECKPOINT)
            + build.record(build.CHECKPOINT_END)
            + build.page_data([1], page(3))
        )
        * 2
    )
    octets = octets[: -len(build.page_data([1], page(3)))]
    bare = converted(octets, "libxc3")
    assert without(bare, "PAGE_DATA")[-2:] == ["CHECKPOINT", "CHECKPOINT"]
    assert converted(bare, "libxl") == octets


def test_a_checkpoint_counts_outside_libxl_only_when_it_was_complete_inside() -> None:
    complete = build.record(build.CHECKPOINT) + build.record(build.CHECKPOINT_END)
    octets = build.libxl(
        build.record(build.LIBXC_CONTEXT), build.image(end=False), complete, build.record(build.CHECKPOINT)
    )
    assert types(converted(octets, "libxc3")).count("CHECKPOINT") == 1


# Versions


def test_version_3_has_the_end_of_static_data_where_a_restore_of_version_2_infers_it() -> None:
    found = converted(V2, "libxc3")
    assert found == stream(STATIC_DATA_END, pages(0, [1, 2]), *TAIL, raw(0))
    assert converted(found, "libxc2") == V2
    guest = PvGuest()
    octets = guest.stream(version=2)
    assert types(converted(octets, "libxc3"))[:4] == [
        "libxc",
        "X86_PV_INFO",
        "STATIC_DATA_END",
        "X86_PV_P2M_FRAMES",
    ]
    assert converted(converted(octets, "libxc3"), "libxc2") == octets


def test_version_2_cannot_hold_policies() -> None:
    with pytest.raises(ConvertError, match=r"X86_CPUID_POLICY: 1 record, 24 octets.*X86_MSR_POLICY.*--lossy"):
        converted(hvm(pages(0, [1, 2])), "libxc2")
    notes: list[str] = []
    assert converted(hvm(pages(0, [1, 2])), "libxc2", notes, lossy=True) == V2
    assert [note.split(":")[1] for note in notes] == [" libxc X86_CPUID_POLICY", " libxc X86_MSR_POLICY"]


@pytest.mark.parametrize("flatten", [False, True])
def test_policies_that_are_given_stand_before_the_end_of_static_data(flatten: bool) -> None:
    found = converted(V2, "libxc3", cpuid=CPUID, msr=MSRS, flatten=flatten)
    assert found == hvm(pages(0, [1, 2]))
    assert (
        converted(stream(STATIC_DATA_END, pages(0, [1, 2]), *TAIL, raw(0)), "libxc3", cpuid=CPUID, msr=MSRS)
        == found
    )
    with pytest.raises(ConvertError, match="has X86_CPUID_POLICY already"):
        converted(found, "libxc3", cpuid=CPUID)
    with pytest.raises(ConvertError, match="version 2 cannot hold"):
        converted(V2, "libxc2", cpuid=CPUID)


def test_policies_come_from_json_and_from_other_streams(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.write_bytes(V2)
    (tmp_path / "other").write_bytes(hvm(pages(7, [1])))
    fields, lines = tmp_path / "fields.json", tmp_path / "lines.jsonl"
    fields.write_text(json.dumps(CPUID.to_json()))
    lines.write_text(
        "\n".join(
            json.dumps({"type": record.type, "fields": record.to_json()}) for record in (TAIL[0], MSRS, CPUID)
        )
    )
    for cpuid, msr in ((fields, tmp_path / "other"), (tmp_path / "other", lines), (lines, lines)):
        result = run(source, out, "--to", "libxc3", "--cpuid", cpuid, "--msr", msr)
        assert result.exit_code == 0, result.output
        assert out.read_bytes() == hvm(pages(0, [1, 2]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not X86_CPUID_POLICY as JSON"),
        (b"{}", "leaves is missing"),
        (b"[1]", "is not X86_CPUID_POLICY as JSON"),
        (V2, "has no X86_CPUID_POLICY"),
        (b"[" * 100_000, "is not X86_CPUID_POLICY as JSON"),
        (b"{" + bytes(2 << 20), "it is no policy"),
        (b"", "the input is empty"),
    ],
)
def test_what_is_no_policy_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(V2)
    (tmp_path / "policy").write_bytes(content)
    result = run(tmp_path / "in", tmp_path / "out", "--to", "libxc3", "--cpuid", tmp_path / "policy")
    assert (result.exit_code, message in result.output) == (1, True), result.output
    assert sorted(os.listdir(tmp_path)) == ["in", "policy"]


# Envelopes


def test_a_bare_image_gets_a_libxl_stream_and_an_xl_header_around_it() -> None:
    config = build.CONFIG.rstrip(b"\0")
    assert converted(build.image(), "xl", config=config) == build.xl(PLAIN_LIBXL)
    assert converted(build.image("big"), "libxl")[:16] == struct.pack(">QII", 0x4C6962786C466D74, 2, 1)
    assert converted(hvm(pages(0, [1])), "libxl", flatten=True) == converted(
        converted(hvm(pages(0, [1])), "libxl"), "libxl", flatten=True
    )


def test_an_xl_file_needs_a_config_that_is_json() -> None:
    with pytest.raises(ConvertError, match="--config FILE"):
        converted(build.image(), "xl")
    with pytest.raises(ConvertError, match=r"--config FILE \(domain XML"):
        converted(build.xl(PLAIN_LIBXL), "libvirt")
    for config in (b"name = 'guest'", b"[]", b"", b"[" * 100_000):
        with pytest.raises(ConvertError, match="JSON"):
            converted(build.image(), "xl", config=config)
    with pytest.raises(ConvertError, match="no place for a config"):
        converted(build.image(), "libxl", config=b"{}")


def test_another_config_replaces_the_inputs_own_and_drops_what_xl_said_behind_the_end() -> None:
    notes: list[str] = []
    found = converted(build.xl(PLAIN_LIBXL) + TRAILER, "xl", notes, config=b'{"a": 1}')
    assert found == build.xl(PLAIN_LIBXL, b'{"a": 1}\0')
    assert notes[0].startswith("left out: 44 octets behind the stream's end")


def test_libxl_in_libvirts_envelope() -> None:
    found = converted(PLAIN_LIBXL, "libvirt", config=XML)
    head = b"libvirt-xml\n \0 \r" + struct.pack("<II", 2, len(XML) + 1) + bytes(40)
    assert found == head + XML + b"\0" + PLAIN_LIBXL


def test_a_bare_image_cannot_hold_the_device_model() -> None:
    octets = build.xl(build.libxl_stream())
    with pytest.raises(ConvertError, match=r"EMULATOR_XENSTORE_DATA: 1 record.*EMULATOR_CONTEXT: 1 record"):
        converted(octets, "libxc3")
    with pytest.raises(ConvertError, match="EMULATOR_CONTEXT"):
        converted(octets, "libxc3", flatten=True)
    notes: list[str] = []
    assert converted(octets, "libxc3", notes, lossy=True) == build.image()
    assert any("EMULATOR_CONTEXT" in note for note in notes)


def test_a_xapi_image_is_unwrapped_and_its_qemu_named_as_a_loss() -> None:
    def segment(code: int, body: bytes = b"") -> bytes:
        return struct.pack("<qq", code, len(body)) + body

    start = b"XenSavedDomv2-\n" + segment(0x0F, b"((time 1))") + segment(0xF0)
    assert converted(start + build.image() + segment(0xFFFF), "libxc3") == build.image()
    with pytest.raises(ConvertError, match="xapi Qemu_trad: 1 record"):
        converted(start + build.image() + segment(0xF00, b"QEVM") + segment(0xFFFF), "libxc3")


# Pages in other records


@pytest.mark.parametrize("batch", [1, 2, 3, 77])
def test_pages_are_regrouped_without_any_other_change(batch: int) -> None:
    octets = hvm(
        pages(0, [1, 2, 3]), pages(3, [4, 5]), pages(2, [6]), pages(9, [7]), raw(0x8000_0001), pages(10, [8])
    )
    found = converted(octets, "libxc3", batch=batch)
    counts = [r.count for r in records(found, PageData) if isinstance(r, PageData)]
    # No record joins PFNs that go back, nor across another record.
    expected = [
        n for run_ in (5, 2, 1) for n in [batch] * (run_ // batch) + [run_ % batch] * bool(run_ % batch)
    ]
    assert counts == expected
    assert converted(found, "libxc3", flatten=True) == converted(octets, "libxc3", flatten=True)
    assert findings(found) == []


def test_zero_pages_are_dropped_only_where_nothing_was_sent_before() -> None:
    octets = hvm(pages(0, [0, 1, 0]), pages(1, [0, 0]))
    found = converted(octets, "libxc3", drop_zero=True)
    first = page_data([(0, 0xE), (1, 0), (2, 0xE)], page(1))
    assert found == hvm(first, pages(1, [0, 0]))
    with pytest.raises(FormatError, match="PFN 0x2 is past"):
        converted(octets, "libxc3", drop_zero=True, max_memory=2 * PAGE)


def test_a_regrouped_capture_is_sound() -> None:
    octets = unpacked(next(path for path in captures() if "migrate-live" in path.name))
    found = converted(octets, "xl", batch=77)
    assert findings(found) == []
    assert converted(found, "xl", flatten=True) == converted(octets, "xl", flatten=True)


# Legacy streams


@pytest.mark.parametrize("width", [4, 8])
def test_a_legacy_stream_becomes_any_form(width: int) -> None:
    octets = legacy_streams.hvm(width)
    image = converted(octets, "libxc3", lossy=True)
    assert findings(image) == []
    assert converted(octets, "libxc3", lossy=True, cpuid=CPUID, msr=MSRS).count(CPUID.build()) == 1
    assert types(converted(octets, "libxl"))[:3] == ["libxl", "LIBXC_CONTEXT", "libxc"]
    assert findings(converted(octets, "xl", config=b"{}", flatten=True)) == []


def test_a_legacy_device_model_is_told_before_it_is_lost_and_json_describes_what_was_made() -> None:
    octets = legacy_streams.hvm(8)
    with pytest.raises(ConvertError, match=r"EMULATOR_CONTEXT: 1 record.*--lossy"):
        converted(octets, "libxc3")
    assert converted(converted(octets, "json"), "libxl") == converted(octets, "libxl")
    flat = converted(octets, "libxl", flatten=True)
    assert converted(converted(octets, "json", flatten=True), "libxl") == flat


@pytest.mark.parametrize("cut", [1, 8, 100, 5000, -5])
def test_a_damaged_legacy_stream_is_an_error_with_its_place(cut: int) -> None:
    with pytest.raises(StreamError) as caught:
        converted(legacy_streams.hvm(8)[:cut], "libxl")
    assert caught.value.offset is not None


def test_a_xend_file_becomes_an_xl_file_with_the_config_in_json() -> None:
    config = b"(domain (name guest) (memory 16) (maxmem 16) (uuid 5d02651e-e508-11f1-8e76-dd54f9cd2100))"
    octets = b"LinuxGuestRecord" + struct.pack(">i", len(config)) + config + legacy_streams.hvm(8)
    found = converted(octets, "xl", lossy=True)
    with reader.open_memory(found) as source:
        layer = next(source.items())
    assert isinstance(layer, Layer)
    assert json.loads(layer.config_text or "")["c_info"]["name"] == "guest"
    assert findings(found) == []


def test_an_xl_file_around_a_legacy_stream_says_afterwards_that_it_holds_a_new_one() -> None:
    octets = build.xl(legacy_streams.hvm(8), flags=1)
    found = converted(octets, "xl")
    assert struct.unpack_from("<I", found, 36) == (3,)
    assert findings(found) == []


# Memory images


def test_memory_images_are_sources_by_their_kind(tmp_path: Path) -> None:
    image, out = tmp_path / "memory.bin", tmp_path / "out"
    image.write_bytes(page(1) + page(0) + page(3))
    result = run(f"raw:{image}", out, "--to", "libxl", "--drop-zero")
    assert result.exit_code == 0, result.output
    assert findings(out.read_bytes()) == []
    assert [type for _, type, _ in memory(out.read_bytes())] == [0, 0xE, 0]
    assert memory(out.read_bytes())[2][2] == page(3)
    result = run(f"raw:{image}", image, "--to", "libxl")
    assert (result.exit_code, "same file" in result.output) == (1, True)
    assert run(f"raw:{image},none=1", out, "--to", "libxl").exit_code == 2
    assert run(f"core:{tmp_path / 'absent'}", tmp_path / "none", "--to", "libxl").exit_code == 1
    assert sorted(os.listdir(tmp_path)) == ["memory.bin", "out"]


# The command, and bad input


def test_the_command_writes_a_file_and_says_what_it_left_out(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.write_bytes(build.xl(PLAIN_LIBXL) + TRAILER)
    result = run(source, out, "--to", "libxc3")
    assert (result.exit_code, out.read_bytes()) == (0, build.image())
    assert "left out: 44 octets" in result.output
    assert "left out: the xl envelope" in result.output


@pytest.mark.parametrize("to", ["libxc3", "libxc2", "libxl"])
def test_every_cut_of_an_input_is_an_error_that_leaves_nothing(to: str, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    octets = stream(page_data([(0, 0xE), (1, 0xF)], b""), *TAIL, raw(0), version=2)
    for options in ([], ["--flatten"], ["--batch", "1"]):
        for cut in range(0, len(octets), 5):
            source.write_bytes(octets[:cut])
            result = run(source, out, "--to", to, *options)
            assert result.exit_code == 1, (cut, result.output)
            assert os.listdir(tmp_path) == ["in"]
            assert cut == 0 or "offset" in result.output
            assert source.read_bytes() == octets[:cut]


def test_an_output_that_is_the_input_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_bytes(V2)
    (tmp_path / "link").symlink_to(source)
    os.link(source, tmp_path / "hard")
    for out in ("in", "link", "hard"):
        result = run(source, tmp_path / out, "--to", "libxc3")
        assert (result.exit_code, "same file" in result.output) == (1, True)
        assert source.read_bytes() == V2


def test_a_refused_conversion_keeps_what_had_the_name(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.write_bytes(hvm(pages(0, [1])))
    out.write_bytes(b"precious")
    result = run(source, out, "--to", "libxc2")
    assert (result.exit_code, out.read_bytes()) == (1, b"precious")
    assert "--lossy" in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--to", "tar"], 2, "tar"),
        (["--to", "libxc3", "--max-memory", "lots"], 2, "lots"),
        (["--to", "libxc3", "--batch", "0"], 2, "--batch"),
        (["--to", "libxc3", "--batch", "40000"], 2, "--batch"),
        (["--to", "libxc3", "--checkpoint", "0"], 2, "--checkpoint"),
        (["--to", "libxc3", "--checkpoint", "1"], 1, "no checkpoint 1"),
    ],
)
def test_wrong_options_are_told(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(hvm(pages(0, [1])))
    result = run(tmp_path / "in", tmp_path / "out", *arguments)
    assert (result.exit_code, message in result.output) == (code, True), result.output
    assert os.listdir(tmp_path) == ["in"]


CONVERT = [sys.executable, "-c", "from migstream.cli.convert import command; command()"]


@pytest.mark.parametrize("options", [[], ["--flatten"], ["--batch", "2", "--drop-zero"]])
def test_pipes_on_both_sides(options: list[str]) -> None:
    octets = hvm(pages(0, [1, 2, 3]))
    done = subprocess.run(
        [*CONVERT, "-", "-", "--to", "libxl", *options],
        input=octets,
        capture_output=True,
        check=True,
        timeout=60,
    )
    flatten, batch = "--flatten" in options, 2 if "--batch" in options else None
    expected = converted(octets, "libxl", flatten=flatten, batch=batch, drop_zero=batch is not None)
    assert done.stdout == expected
    assert (b"temporary file" in done.stderr) == bool(options)


def test_a_full_disk_is_an_error_that_names_the_output(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.write_bytes(hvm(pages(0, [1] * 64)))
    limited = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from migstream.cli.convert import command; command()"
    )
    for options in ([], ["--flatten"]):
        done = subprocess.run(
            [sys.executable, "-c", limited, source, out, "--to", "libxl", *options],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1
        assert f"{out}: " in done.stderr
        assert os.listdir(tmp_path) == ["in"]


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [*CONVERT, "-", tmp_path / "out", "--to", "libxl"], stdin=reading, stderr=subprocess.PIPE
    )
    os.close(reading)
    os.write(writing, hvm(pages(0, [1]))[:-100])
    deadline = time.monotonic() + 30
    while not os.listdir(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert os.listdir(tmp_path)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    os.close(writing)
    assert process.returncode != 0
    assert os.listdir(tmp_path) == []


def test_damage_is_told_with_its_place() -> None:
    with pytest.raises(TruncatedError) as caught:
        converted(hvm(pages(0, [1]))[:-9], "libxl")
    assert caught.value.offset is not None
    with pytest.raises(FormatError, match="found text: 'not a stream at all'"):
        converted(b"not a stream at all", "libxl")
