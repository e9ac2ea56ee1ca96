"""inspect: what is in a stream, from small ones built by hand and from real captures."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from migstream.inspection import Line, Report, inspect
from migstream.io import reader
from tests import build
from tests.build import (
    CHECKPOINT,
    DATA,
    END,
    HVM_PARAMS,
    PAGE,
    SHARED,
    STATIC_DATA_END,
    VERIFY,
    X86_TSC_INFO,
    header,
    page,
    page_data,
    record,
)

STREAMS = SHARED / "streams"


def look(octets: bytes, *, count_zero: bool = False) -> tuple[dict[str, Any], list[Line]]:
    """Return inspect's report as JSON, through JSON, and its lines."""
    report = Report()
    lines = list(inspect(reader.open_memory(octets), report, count_zero=count_zero))
    loaded: dict[str, Any] = json.loads(json.dumps(report.to_json()))
    return loaded, lines


def look_at_file(path: Path) -> dict[str, Any]:
    report = Report()
    with reader.open(path) as stream:
        for _ in inspect(stream, report):
            pass
    loaded: dict[str, Any] = json.loads(json.dumps(report.to_json()))
    return loaded


def test_an_xl_file_shows_all_three_layers_and_its_config() -> None:
    octets = build.xl(build.libxl_stream())
    report, _ = look(octets)
    libxl_at = 48 + 4 + len(build.CONFIG)
    assert [(layer["name"], layer["offset"], layer["version"]) for layer in report["layers"]] == [
        ("xl", 0, None),
        ("libxl", libxl_at, 2),
        ("libxc", libxl_at + 24, 3),
    ]
    assert report["config"] == {"c_info": {"name": "guest"}}
    assert (report["guest_type"], report["page_size"], report["xen_version"]) == ("hvm", 4096, "4.21")
    assert (report["error"], report["ending"], report["bytes"]) == (None, "end", len(octets))


def test_records_are_counted_by_layer_and_type() -> None:
    report, lines = look(build.libxl_stream())
    assert {name: s["count"] for name, s in report["records"]["libxl"].items()} == {
        "LIBXC_CONTEXT": 1,
        "EMULATOR_XENSTORE_DATA": 1,
        "EMULATOR_CONTEXT": 1,
        "END": 1,
    }
    assert report["records"]["libxc"]["PAGE_DATA"]["bytes"] == 8 + 3 * 8 + 2 * PAGE
    assert [line.index for line in lines] == list(range(len(lines)))


def test_pages_are_counted_by_type_with_their_range() -> None:
    report, _ = look(build.image())
    assert report["pages"]["by_type"] == {"NOTAB": 2, "XALLOC": 1}
    assert (report["pages"]["pfn_min"], report["pages"]["pfn_max"]) == (0, 5)
    assert (report["pages"]["pfns"], report["pages"]["distinct"], report["pages"]["with_data"]) == (3, 3, 2)
    assert report["pages"]["zero"] is None


def test_zero_pages_are_counted_on_request() -> None:
    pages = page(0) + page(1) + bytes(PAGE - 1) + b"\x01" + page(0)
    octets = header() + record(STATIC_DATA_END) + page_data([1, 2, 3, 4], pages) + record(END)
    report, lines = look(octets, count_zero=True)
    assert report["pages"]["zero"] == 2
    assert "2 zero pages" in lines[1].text


def test_a_pfn_sent_again_starts_a_pass() -> None:
    batches = [page_data(pfns, page(1) * len(pfns)) for pfns in ([0, 1, 2], [3, 9], [1, 9], [2], [9, 4])]
    octets = header() + record(STATIC_DATA_END) + b"".join(batches) + record(END)
    report, _ = look(octets)
    assert [(p["number"], p["records"], p["pfns"]) for p in report["passes"]] == [
        (1, 2, 5),
        (2, 2, 3),
        (3, 1, 2),
    ]
    assert report["passes"][1]["offset"] == 40 + 8 + len(batches[0]) + len(batches[1])
    assert (report["pages"]["distinct"], report["pass_count"]) == (6, 3)


def test_passes_know_checkpoints_and_the_verify_pass() -> None:
    octets = (
        header()
        + record(STATIC_DATA_END)
        + page_data([0, 1], page(1) * 2)
        + record(CHECKPOINT)
        + page_data([1], page(2))
        + record(CHECKPOINT)
        + record(VERIFY)
        + page_data([0, 1], page(1) + page(2))
        + record(END)
    )
    report, _ = look(octets)
    assert [(p["checkpoint"], p["verify"]) for p in report["passes"]] == [(0, False), (1, False), (2, True)]
    assert report["checkpoints"] == 2


def test_missing_static_data_and_their_end_are_told() -> None:
    v3, _ = look(build.image())
    assert v3["static_data"] == {
        "present": [],
        "missing": ["CPUID", "MSR"],
        "end": "explicit",
        "end_offset": 40,
    }
    pages = page_data([0], page(1))
    v2, _ = look(header(version=2) + record(X86_TSC_INFO, bytes(24)) + pages + record(END))
    assert (v2["static_data"]["end"], v2["static_data"]["end_offset"]) == ("inferred", 40 + 32)


def test_lines_decode_records() -> None:
    _, lines = look(build.image())
    text = {line.type: line.text for line in lines}
    assert text["X86_TSC_INFO"] == "mode=ALWAYS_EMULATE khz=2000000 nsec=77 incarnation=3"
    assert text["HVM_PARAMS"] == "1 parameters: STORE_PFN=0xfeffc"
    assert text["PAGE_DATA"] == "3 PFNs 0x0..0x5: NOTAB 2, XALLOC 1"


def test_a_body_that_does_not_fit_is_an_error_and_the_rest_is_still_shown() -> None:
    bad = record(HVM_PARAMS, struct.pack("<IIQQ", 7, 0, 1, 2))
    octets = header() + record(STATIC_DATA_END) + bad + record(X86_TSC_INFO, bytes(24)) + record(END)
    report, lines = look(octets)
    assert [line.type for line in lines] == ["STATIC_DATA_END", "HVM_PARAMS", "X86_TSC_INFO", "END"]
    assert report["error"]["record"] == {"index": 1, "type": "HVM_PARAMS"}
    assert report["error"]["offset"] == 40 + 8 + 8  # the count, first in the body
    assert "count is 7" in report["error"]["message"]


def test_a_cut_stream_shows_everything_up_to_the_cut() -> None:
    octets = build.image()
    for cut in range(len(octets)):
        report, lines = look(octets[:cut])
        assert report["error"] is not None
        assert report["error"]["offset"] == cut
        assert report["error"]["layer"] == ("libxc" if cut else None)
        whole = [start for start in _record_starts(octets) if start + 8 <= cut]
        assert [line.offset for line in lines] == whole


def _record_starts(octets: bytes) -> list[int]:
    starts, at = [], 40
    while at < len(octets):
        starts.append(at)
        at += 8 + (struct.unpack_from("<I", octets, at + 4)[0] + 7) // 8 * 8
    return starts


def test_the_config_may_be_text() -> None:
    report, _ = look(build.xl(build.libxl_stream(), config=b"name = 'x'\n", flags=2))
    assert report["config"] == "name = 'x'\n"


def test_pfns_above_the_tracked_ones_are_counted_but_not_told_apart() -> None:
    octets = header() + record(STATIC_DATA_END) + page_data([1 << 40 | 0xF << 60, 3], page(1)) + record(END)
    report, _ = look(octets)
    assert report["pages"]["pfns"] == 2
    assert (report["pages"]["distinct"], report["pages"]["distinct_exact"]) == (1, False)


def test_types_of_records_without_end_are_bounded() -> None:
    strange = b"".join(record(0x80000000 + i) for i in range(1000))
    report, _ = look(header() + strange + record(END))
    assert len(report["records"]["libxc"]) <= 257
    assert sum(s["count"] for s in report["records"]["libxc"].values()) == 1001


def test_the_json_keys_are_those_that_are_documented() -> None:
    report, lines = look(build.xl(build.libxl_stream()))
    documented = (Path(__file__).parents[1] / "spec" / "inspect.md").read_text()
    keys = [*report, *report["pages"], *report["static_data"], *report["passes"][0], *report["layers"][0]]
    keys += [key for line in lines for key in line.to_json()]
    assert [key for key in keys if f"`{key}`" not in documented] == []


# Real captures; what is expected was read off them by hand, or stands in the captures' own notes.

EXPECTED = {
    "tinypv-save-p": {"guest_type": "pv", "checkpoints": 0, "pass_count": 1, "distinct": 1024},
    "tinypv-migrate-live": {"guest_type": "pv", "checkpoints": 0, "pass_count": 6, "distinct": 1024},
    "tinypvb8-xsave-save-c2": {"guest_type": "pv", "checkpoints": 0, "pass_count": 1, "distinct": 2048},
    "tinypv-remus": {"guest_type": "pv", "checkpoints": 20, "pass_count": 26, "distinct": 1024},
    "tinypvh-save-c": {"guest_type": "hvm", "checkpoints": 0, "pass_count": 1, "distinct": 1044480},
    "hvm16-save": {"guest_type": "hvm", "checkpoints": 0, "pass_count": 1, "distinct": 1044480},
    "hvm32-rich-save-c": {"guest_type": "hvm", "checkpoints": 0, "pass_count": 1, "distinct": 1044480},
    "linux-pv-save-p": {"guest_type": "pv", "checkpoints": 0, "pass_count": 1, "distinct": 24576},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_real_captures(name: str) -> None:
    path = next((p for p in (DATA / f"{name}.xl.zst", STREAMS / f"{name}.xl.zst") if p.exists()), None)
    if path is None:
        pytest.skip("the captures beside the project are absent, and this one is not in tests/data")
    report = look_at_file(path)
    expected = EXPECTED[name]
    assert {key: report[key] for key in ("guest_type", "checkpoints", "pass_count")} == {
        key: expected[key] for key in ("guest_type", "checkpoints", "pass_count")
    }
    assert report["pages"]["distinct"] == expected["distinct"]
    assert (report["xen_version"], report["static_data"]["missing"], report["error"]) == ("4.17", [], None)
    assert report["config"]["c_info"]["type"] in {"pv", "pvh", "hvm"}


def test_ballooned_pages_of_a_real_guest_are_holes() -> None:
    report = look_at_file(DATA / "tinypvb8-xsave-save-c2.xl.zst")
    assert report["pages"]["by_type"]["XTAB"] == 16
    assert report["records"]["libxc"]["X86_PV_VCPU_XSAVE"]["count"] == 1


def test_the_closing_message_of_a_real_migration_is_a_trailer() -> None:
    report = look_at_file(DATA / "tinypv-migrate-live.xl.zst")
    assert report["trailer"] == {"offset": 12508485, "bytes": 44}
