"""diff: what counts as a difference, how it is told, and its exit codes."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import zstandard
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

import migstream
from migstream.cli.diff import command
from migstream.diff import RANGES_KEPT, Report, StreamSide, diff
from migstream.guests import lime
from migstream.io.seekable import seekable
from migstream.records import libxc
from tests import build
from tests.streams import (
    CPUID,
    END,
    MSRS,
    PARAMS,
    STATIC_DATA_END,
    TAIL,
    TSC,
    PvGuest,
    page,
    page_data,
    pages,
    params,
    raw,
    stream,
)

XTAB, XALLOC = 0xF, 0xE
CAPTURES = build.SHARED / "streams"
needs_captures = pytest.mark.skipif(
    not CAPTURES.is_dir(), reason="the captures of real Xen are not beside the checkout"
)
BASE = stream(CPUID, MSRS, STATIC_DATA_END, pages(0, [1, 2, 3, 4]), *TAIL, END)


def run(*argv: str | Path, input: bytes | None = None) -> Result:
    return CliRunner().invoke(command, [str(arg) for arg in argv], input=input)


def compared(a: bytes, b: bytes, folder: Path) -> Report:
    (folder / "a").write_bytes(a)
    (folder / "b").write_bytes(b)
    with (
        migstream.open(folder / "a") as one,
        migstream.open(folder / "b") as other,
        seekable(one) as first,
        seekable(other) as second,
    ):
        return diff(StreamSide(first), StreamSide(second))


def xl_file(config: bytes) -> bytes:
    """Return an xl file with that config around `BASE`."""
    head = b"Xen saved domain, xl format\n \0 \r" + struct.pack("<IIII", 0x01020304, 3, 0, 4 + len(config))
    image = build.libxl(build.record(build.LIBXC_CONTEXT), BASE, build.record(0))
    return head + struct.pack("<I", len(config)) + config + image


def test_a_stream_equals_itself_and_the_exit_code_says_so(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(BASE)
    result = run(tmp_path / "a", tmp_path / "a")
    assert result.exit_code == 0
    assert result.stdout == "pages equal: 4\nequal\n"


def test_other_batches_and_more_passes_are_no_difference(tmp_path: Path) -> None:
    other = stream(
        *(CPUID, MSRS, STATIC_DATA_END, pages(2, [9, 9]), page_data([(0, XTAB)], b""), pages(1, [2, 3])),
        *(pages(3, [4]), pages(0, [1]), *TAIL, END),
    )
    assert compared(BASE, other, tmp_path).equal


def test_pages_are_told_apart_by_pfn(tmp_path: Path) -> None:
    one = stream(STATIC_DATA_END, pages(0, [1, 2, 3, 4, 5]), page_data([(9, XTAB), (10, XTAB)], b""), END)
    other = stream(
        STATIC_DATA_END,
        pages(1, [2, 7, 7]),
        page_data([(4, 1), (8, 0), (9, XALLOC), (10, XTAB)], page(5) + page(8)),
        END,
    )
    report = compared(one, other, tmp_path)
    assert report.changed.ranges == [(2, 3)]
    assert report.only_a.ranges == [(0, 0)]
    assert report.only_b.ranges == [(8, 8)]
    assert report.types.ranges == [(4, 4), (9, 9)]
    assert report.equal_pages == 2
    result = run(tmp_path / "a", tmp_path / "b")
    assert result.exit_code == 1
    assert "pages changed: 2, PFN 0x2-0x3\npages only in A: 1, PFN 0x0\n" in result.stdout


def test_fields_of_headers_and_records_are_named(tmp_path: Path) -> None:
    tsc = libxc.X86TscInfo(mode=1, khz=1, nsec=77, incarnation=3)
    longer = params(STORE_PFN=5, CONSOLE_PFN=9)
    other = stream(MSRS, STATIC_DATA_END, pages(0, [1, 2, 3, 4]), tsc, TAIL[1], longer, END, version=2)
    found = {(d.where, d.field): (d.a, d.b) for d in compared(BASE, other, tmp_path).differences}
    assert found == {
        ("libxc ImageHeader", "version"): ("3", "2"),
        ("libxc X86_CPUID_POLICY", None): ("present", None),
        ("libxc X86_TSC_INFO", "khz"): ("2600000", "1"),
        ("libxc HVM_PARAMS", "params"): (
            "32 octets, from 24 on 08 00 00 00 00 00 00 00",
            "32 octets, from 24 on 09 00 00 00 00 00 00 00",
        ),
        ("records", "libxc X86_CPUID_POLICY"): ("1", None),
    }


def test_records_of_one_kind_are_matched_by_their_vcpu(tmp_path: Path) -> None:
    guest = PvGuest()
    head = guest.info(), STATIC_DATA_END, guest.p2m_frames(), guest.memory(), TSC
    one = stream(*head, guest.basic(0), guest.basic(1), END, guest=libxc.GuestType.PV)
    other = stream(*head, guest.basic(1), PvGuest(edx=4).basic(0), END, guest=libxc.GuestType.PV)
    (difference,) = compared(one, other, tmp_path).differences
    assert difference.where == "libxc X86_PV_VCPU_BASIC of vCPU 0"
    assert difference.field == "context"
    assert (difference.a or "").startswith("5168 octets, from 616 on 03")


def test_bodies_of_unknown_records_count(tmp_path: Path) -> None:
    one = stream(STATIC_DATA_END, raw(0x8000_0077, b"aaaaaaaa"), pages(0, [1]), END)
    other = stream(STATIC_DATA_END, raw(0x8000_0077, b"aaaaaaab"), pages(0, [1]), END)
    (difference,) = compared(one, other, tmp_path).differences
    assert difference.where == "records"
    assert difference.a != difference.b


def test_state_around_the_image_is_compared(tmp_path: Path) -> None:
    def libxl(state: bytes) -> bytes:
        emulator = build.record(build.EMULATOR_CONTEXT, struct.pack("<II", 2, 0) + state)
        return build.libxl(build.record(build.LIBXC_CONTEXT), BASE, emulator, build.record(0))

    (difference,) = compared(libxl(b"one"), libxl(b"two"), tmp_path).differences
    assert difference.where == "libxl EMULATOR_CONTEXT of emulator 2, index 0"
    assert (difference.field, difference.a) == ("emulator_ctx", "3 octets, from 0 on 6f 6e 65")
    one, other = (build.xapi(build.segment(0xF0) + BASE, build.segment(0xF11, x)) for x in (b"a", b"b"))
    (difference,) = compared(one, other, tmp_path).differences
    assert (difference.where, difference.field) == ("records", "xapi Varstored")


def test_configs_are_compared_by_their_keys(tmp_path: Path) -> None:
    one = xl_file(b'{"c_info": {"name": "a", "x": [1, 2]}}\0')
    other = xl_file(b'{"c_info": {"x": [1, 3], "name": "a"}, "new": 1}\0')
    found = [d[1:] for d in compared(one, other, tmp_path).differences if d.where == "xl SaveFileConfig"]
    assert found == [("c_info.x[1]", "2", "3"), ("new", None, "1")]


def test_only_records_or_only_pages_are_compared_when_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(BASE)
    other = stream(CPUID, MSRS, STATIC_DATA_END, pages(0, [1, 2, 3, 9]), *TAIL, END)
    (tmp_path / "pages").write_bytes(other)
    (tmp_path / "records").write_bytes(stream(CPUID, STATIC_DATA_END, pages(0, [1, 2, 3, 4]), *TAIL, END))
    assert run("--no-pages", tmp_path / "a", tmp_path / "pages").exit_code == 0
    assert run("--only-pages", tmp_path / "a", tmp_path / "pages").exit_code == 1
    assert run("--no-pages", tmp_path / "a", tmp_path / "records").exit_code == 1
    assert run("--only-pages", tmp_path / "a", tmp_path / "records").exit_code == 0
    assert run("--only-pages", "--no-pages", tmp_path / "a", tmp_path / "a").exit_code == 2


def test_the_json_form_has_everything(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(BASE)
    (tmp_path / "b").write_bytes(
        stream(CPUID, MSRS, STATIC_DATA_END, pages(1, [2, 3, 9]), TSC, TAIL[1], PARAMS, END)
    )
    result = run("--json", tmp_path / "a", tmp_path / "b")
    assert result.exit_code == 1
    nothing = {"count": 0, "ranges": []}
    assert json.loads(result.stdout) == {
        "equal": False,
        "differences": [],
        "pages": {
            "equal": 2,
            "changed": {"count": 1, "ranges": [[3, 3]]},
            "only_a": {"count": 1, "ranges": [[0, 0]]},
            "only_b": nothing,
            "types": nothing,
        },
    }


def test_a_stream_and_an_image_are_compared_by_their_pages(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(BASE)
    (tmp_path / "raw").write_bytes(page(1) + page(2) + page(3) + page(4))
    (tmp_path / "lime").write_bytes(lime.range_header(1, 3) + page(2) + page(3) + page(5))
    assert run(tmp_path / "a", f"raw:{tmp_path / 'raw'}").exit_code == 0
    result = run(f"lime:{tmp_path / 'lime'}", tmp_path / "a")
    assert result.exit_code == 1
    assert result.stdout == (
        "pages changed: 1, PFN 0x3\npages only in B: 1, PFN 0x0\npages equal: 2\ndifferent\n"
    )
    assert run("--no-pages", tmp_path / "a", f"raw:{tmp_path / 'raw'}").exit_code == 2


@pytest.mark.parametrize("content", [None, b"", b"no stream at all", BASE[:-9]])
def test_what_cannot_be_read_is_exit_code_two(content: bytes | None, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(BASE)
    if content is not None:
        (tmp_path / "b").write_bytes(content)
    result = run(tmp_path / "a", tmp_path / "b")
    assert result.exit_code == 2
    assert str(tmp_path / "b") in result.stderr


def test_text_of_a_stream_is_escaped(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(xl_file(b'{"\\u001b[2J": "\\u001b[1m"}\0'))
    (tmp_path / "b").write_bytes(xl_file(b"{}\0"))
    result = run("--no-pages", tmp_path / "a", tmp_path / "b")
    assert result.exit_code == 1
    assert "[2J: " in result.stdout
    assert "\x1b" not in result.stdout


def test_ranges_are_bounded_and_counts_are_not(tmp_path: Path) -> None:
    n = 2 * (RANGES_KEPT + 50)
    one = stream(STATIC_DATA_END, page_data([(i, 0) for i in range(n)], bytes(4096 * n)), END)
    other = stream(STATIC_DATA_END, page_data([(i, XALLOC if i % 2 else XTAB) for i in range(n)], b""), END)
    third = stream(STATIC_DATA_END, page_data([(i, XTAB) for i in range(n)], b""), END)
    assert compared(one, other, tmp_path).only_a.ranges == [(0, n - 1)]
    report = compared(other, third, tmp_path)
    assert report.types.count == n // 2
    assert len(report.types.ranges) == RANGES_KEPT


guests = st.dictionaries(st.integers(0, 700), st.sampled_from([1, 2, 3, None]) | st.just(1), max_size=40)


@settings(max_examples=60, deadline=None)
@given(guests, guests, st.integers(1, 9))
def test_the_report_is_what_comparing_dictionaries_says(
    tmp_path_factory: pytest.TempPathFactory, a: dict[int, int | None], b: dict[int, int | None], batch: int
) -> None:
    def made(guest: dict[int, int | None], size: int) -> bytes:
        items = list(guest.items())
        records = [
            page_data(
                [(pfn, XTAB if fill is None else 0) for pfn, fill in items[i : i + size]],
                b"".join(page(fill) for _, fill in items[i : i + size] if fill is not None),
            )
            for i in range(0, len(items), size)
        ]
        return stream(STATIC_DATA_END, *records, TSC, END)

    report = compared(made(a, batch), made(b, 1000), tmp_path_factory.mktemp("diff"))
    in_a = {pfn: fill for pfn, fill in a.items() if fill is not None}
    in_b = {pfn: fill for pfn, fill in b.items() if fill is not None}
    both = in_a.keys() & in_b.keys()
    assert report.changed.count == sum(in_a[pfn] != in_b[pfn] for pfn in both)
    assert report.only_a.count == len(in_a.keys() - in_b.keys())
    assert report.only_b.count == len(in_b.keys() - in_a.keys())
    assert report.equal_pages == sum(in_a[pfn] == in_b[pfn] for pfn in both)
    assert report.types.count == 0
    inside = [pfn for first, last in report.only_a.ranges for pfn in range(first, last + 1)]
    assert inside == sorted(in_a.keys() - in_b.keys())


@needs_captures
def test_a_capture_and_xens_own_dump_differ_in_page_tables_only(tmp_path: Path) -> None:
    core = tmp_path / "core"
    with (CAPTURES / "tinypv-save-p.core.zst").open("rb") as packed, core.open("wb") as out:
        zstandard.ZstdDecompressor().copy_stream(packed, out)
    result = run("--json", CAPTURES / "tinypv-save-p.xl.zst", f"core:{core}")
    assert result.exit_code == 1
    found = json.loads(result.stdout)["pages"]
    assert found["equal"] == 1024 - 5
    assert found["changed"] == {"count": 5, "ranges": [[0x2A0, 0x2A4]]}


@needs_captures
def test_a_live_capture_differs_from_a_save_of_the_same_guest_in_what_ran_on() -> None:
    result = run(CAPTURES / "tinypv-migrate-live.xl.zst", CAPTURES / "tinypv-save-p.xl.zst")
    assert result.exit_code == 1
    assert "X86_TSC_INFO, nsec" in result.stdout
    assert "pages equal: 615" in result.stdout
