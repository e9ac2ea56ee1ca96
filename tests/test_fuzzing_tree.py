"""Trees: whatever is taken apart builds to the same octets, and edits come out as they are meant."""

from __future__ import annotations

import struct
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from migstream.fuzzing.tree import Header, Raw, Record, Tree
from tests import build, legacy_streams

WHOLE = {
    "libxc": build.image(),
    "libxc big-endian": build.image("big"),
    "libxl": build.libxl_stream(),
    "libxl big-endian": build.libxl_stream("big"),
    "xl": build.xl(build.libxl_stream()),
    "xl big-endian": build.xl(build.libxl_stream("big"), order="big"),
    "libvirt": build.libvirt(build.libxl_stream()),
    "xapi": build.xapi(build.segment(0xF0), build.image(), build.segment(0xF00, b"QEVM")),
    "xapi, unmeasured": build.xapi(build.segment(0xF0, b"", 99), build.image()),
    "remus": build.remus_stream(),
    "trailer": build.image() + b"behind",
    "legacy hvm": legacy_streams.hvm(),
    "legacy pv": legacy_streams.PvGuest().stream(),
    "xend": build.xend(legacy_streams.hvm()),
}


@pytest.mark.parametrize("octets", WHOLE.values(), ids=WHOLE)
def test_a_stream_builds_to_its_own_octets_wherever_it_is_cut(octets: bytes) -> None:
    cuts = [*range(0, min(len(octets), 400), 3), *range(400, len(octets), 977), len(octets)]
    for cut in cuts:
        assert Tree.parse(octets[:cut]).build() == octets[:cut]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_octets_build_to_themselves(data: st.DataObject) -> None:
    octets = bytearray(data.draw(st.sampled_from([b"", *WHOLE.values()])))
    for _ in range(data.draw(st.integers(0, 6))):
        at = data.draw(st.integers(0, len(octets)))
        octets[at : at + data.draw(st.integers(0, 12))] = data.draw(st.binary(max_size=12))
    assert Tree.parse(bytes(octets)).build() == octets


def test_nodes_are_named_and_in_order() -> None:
    assert Tree.parse(WHOLE["libxl"]).labels() == [
        "libxl LibxlHeader",
        "libxl LIBXC_CONTEXT",
        "libxc ImageHeader",
        "libxc DomainHeader",
        "libxc STATIC_DATA_END",
        "libxc PAGE_DATA",
        "libxc X86_TSC_INFO",
        "libxc HVM_CONTEXT",
        "libxc HVM_PARAMS",
        "libxc END",
        "libxl EMULATOR_XENSTORE_DATA",
        "libxl EMULATOR_CONTEXT",
        "libxl END",
    ]
    assert Tree.parse(WHOLE["trailer"]).labels()[-1] == "raw trailer"
    assert Tree.parse(b"nonsense").labels() == ["raw unframed"]


def test_a_legacy_stream_comes_apart_by_its_chunks() -> None:
    labels = Tree.parse(WHOLE["xend"]).labels()
    assert labels[:3] == ["xend XendHeader", "legacy HEADER", "legacy PAGES"]
    assert labels[-1] == "legacy TAIL"


def test_a_new_body_brings_its_length_and_padding() -> None:
    record = Record.of("libxc", 9, b"seven", "big")
    assert record.build() == struct.pack(">II", 9, 5) + b"seven" + bytes(3)
    assert record.with_body(b"").build() == struct.pack(">II", 9, 0)


def test_lengths_and_padding_may_lie() -> None:
    record = replace(Record.of("libxc", 9, b"seven"), length=99, padding=b"XX")
    assert record.build() == struct.pack("<II", 9, 99) + b"sevenXX"


def test_a_segment_has_no_padding() -> None:
    assert Record.of("xapi", 0xF00, b"QEVM").build() == struct.pack("<qq", 0xF00, 4) + b"QEVM"


@pytest.mark.parametrize(("name", "at"), [("xl", 44), ("xl big-endian", 44), ("libvirt", 20), ("xend", 16)])
def test_new_content_of_an_envelope_brings_its_length(name: str, at: int) -> None:
    tree = Tree.parse(WHOLE[name])
    head = tree.nodes[0]
    assert isinstance(head, Header)
    tree.nodes[0] = head.with_content(b"short")
    order = ">" if name in ("xl big-endian", "xend") else "<"
    assert struct.unpack_from(order + "I", tree.build(), at) == (5,)
    assert b"short" in tree.build()


def test_a_copy_is_edited_without_the_first_changing() -> None:
    tree = Tree.parse(WHOLE["libxc"])
    copy = tree.copy()
    del copy.nodes[2:]
    copy.nodes.append(Raw("raw noise", b"noise"))
    assert tree.build() == WHOLE["libxc"]
    assert copy.build() == WHOLE["libxc"][:40] + b"noise"
