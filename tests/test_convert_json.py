"""Streams as JSON and back: the same octets, and no document that is not one gets through."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from migstream.cli.convert import command
from migstream.converting import ConvertError
from migstream.converting.json_target import LARGE

from . import build
from .conversions import captures, converted, unpacked
from .streams import PvGuest, hvm, page, page_data, pages, raw, stream
from .test_roundtrip import HAND_MADE


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def outermost(octets: bytes) -> str:
    names = {b"Xen ": "xl", b"Libx": "libxl", b"libx": "libxl", b"libv": "libvirt"}
    return names.get(octets[:4], "libxc3")


@pytest.mark.parametrize("name", HAND_MADE)
def test_what_was_made_by_hand_comes_back_octet_for_octet(name: str) -> None:
    octets = HAND_MADE[name]
    assert converted(converted(octets, "json"), outermost(octets)) == octets


@pytest.mark.parametrize("capture", captures(), ids=lambda path: path.name.split(".")[0])
def test_captures_come_back_from_a_document_with_its_pages_beside_it(capture: Path, tmp_path: Path) -> None:
    octets = unpacked(capture)
    document, again = tmp_path / "a.json", tmp_path / "again"
    assert run(capture, document, "--to", "json").exit_code == 0
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.json.pages"]
    assert json.loads(document.read_text())["bulk"] == "a.json.pages"
    result = run(document, again, "--to", "xl")
    assert (result.exit_code, again.read_bytes() == octets) == (0, True), result.output


def test_a_document_can_be_read_by_people_and_programs() -> None:
    document = json.loads(converted(hvm(page_data([(4, 0), (5, 0), (9, 0xF)], page(1) + page(2))), "json"))
    assert document["bulk"] is None
    kinds = [header["kind"] for header in document["items"][0]["headers"]]
    assert kinds == ["ImageHeader", "DomainHeader"]
    (found,) = [item for item in document["items"] if item.get("record") == "PAGE_DATA"]
    assert found["runs"] == [[4, 2, 0], [9, 1, 0xF]]


def test_other_options_apply_before_the_document_is_written_and_after_it_is_read() -> None:
    octets = hvm(pages(0, [1, 2]), pages(1, [3]))
    flat = converted(octets, "libxc3", flatten=True)
    assert converted(converted(octets, "json", flatten=True), "libxc3") == flat
    assert converted(converted(octets, "json"), "libxc3", flatten=True) == flat
    assert converted(converted(build.xl(build.libxl_stream()), "json"), "libxc3", lossy=True) == build.image()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 0x20), st.binary(max_size=60), st.integers(0, 255)).filter(
            lambda found: found[0] not in (0, 1)
        ),
        max_size=6,
    )
)
def test_any_records_come_back(found: list[tuple[int, bytes, int]]) -> None:
    octets = stream(*(raw(code, body, padding=padding) for code, body, padding in found), raw(0))
    assert converted(converted(octets, "json"), "libxc3", lossy=True) == octets


def test_large_bodies_and_entries_with_reserved_bits_come_back() -> None:
    reserved = raw(1, bytes([2, 0, 0, 0, 9, 0, 0, 0]) + b"\1\0\0\0\0\0\x70\1" + b"\xff" * 8)
    octets = hvm(raw(9, bytes(LARGE)), reserved) + b"more"
    assert converted(converted(octets, "json"), "libxc3") == octets


def broken(change: Any) -> bytes:
    document = json.loads(converted(PvGuest().stream(), "json"))
    change(document)
    return json.dumps(document).encode()


def page_record(document: Any) -> Any:
    return next(item for item in document["items"] if "runs" in item)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="other"), 'no "format"'),
        (lambda d: d.update(version=2), "version is 2"),
        (lambda d: d.update(items={}), "no list of items"),
        (lambda d: d.update(bulk="../etc/passwd"), "beside the document"),
        (lambda d: d.update(bulk="/etc/passwd"), "beside the document"),
        (lambda d: d.update(bulk=".."), "beside the document"),
        (lambda d: d.update(bulk=7), "beside the document"),
        (lambda d: d["items"].insert(0, 5), "item 0 .*expected an object"),
        (lambda d: d["items"].pop(0), "item 0 .*no headers"),
        (lambda d: d["items"][0]["headers"][0].update(kind="Head"), "item 0 .*'Head' is missing"),
        (lambda d: d["items"][0]["headers"][0].update(version=-1), "item 0 .*version"),
        (lambda d: d["items"][0].update(order="middle"), "item 0 .*'middle' is missing"),
        (lambda d: d["items"][1].pop("fields"), "item 1 .*'fields' is missing"),
        (lambda d: d["items"][1].update(code=-1), "item 1"),
        (lambda d: d["items"][1]["fields"].pop("guest_width"), "item 1 .*guest_width is missing"),
        (lambda d: page_record(d).update(runs=[[0, 1 << 40, 0]]), "longer than a record may be"),
        (lambda d: page_record(d).update(runs=[[0, 0, 0]]), "longer than|no run"),
        (lambda d: page_record(d).update(runs=[[-1, 1, 0]]), "no run"),
        (lambda d: page_record(d).update(runs=[[0, 1, 16]]), "no run"),
        (lambda d: page_record(d).update(runs=[7]), "item"),
        (lambda d: page_record(d).update(runs=[["a", "b", "c"]]), "item"),
        (lambda d: page_record(d).update(pages={"base64": "!"}), "base64"),
        (lambda d: page_record(d).update(pages={"offset": 0, "octets": 9}), "not in the file beside"),
        (lambda d: page_record(d).update(pages={"offset": -1, "octets": 9}), "no place"),
        (lambda d: page_record(d).update(padding="00"), "octets of padding"),
    ],
)
def test_a_document_that_describes_no_stream_is_refused(change: Any, message: str) -> None:
    with pytest.raises(ConvertError, match=message):
        converted(broken(change), "libxc3")


@pytest.mark.parametrize("octets", [b"{", b"{}", b"{" * 100_000, b'{"a":' * 100_000, b'{"format": 1e999}'])
def test_what_only_looks_like_a_document_is_refused(octets: bytes) -> None:
    with pytest.raises(ConvertError, match="JSON"):
        converted(octets, "xl")


def test_nothing_is_left_when_a_document_cannot_be_written(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_bytes(hvm(pages(0, [1]))[:-20])
    result = run(source, tmp_path / "out.json", "--to", "json")
    assert (result.exit_code, os.listdir(tmp_path)) == (1, ["in"])
    assert run(source, "-", "--to", "json").exit_code == 2
    pages_file = tmp_path / "out.json.pages"
    source.rename(pages_file)
    result = run(pages_file, tmp_path / "out.json", "--to", "json")
    assert (result.exit_code, "same file" in result.output) == (1, True)
