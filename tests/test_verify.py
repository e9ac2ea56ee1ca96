"""verify: every rule is broken by some stream, and only streams that break one are found unsound."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migstream.io import reader
from migstream.verification import RULES, Severity, Verdict, verify
from spec.vectors import rules, sound
from spec.vectors.words import ENDED, PAGES, STATIC, TAIL, WHOLE, XL_FILE, hvm
from tests.build import header, record

#: rule -> a stream that breaks it, and streams that break none: cases of the conformance corpus
BROKEN = {case.name: case.octets for case in rules.CASES}
SOUND = {case.name: case.octets for case in sound.CASES}


def judge(octets: bytes) -> Verdict:
    """Return verify's verdict on ``octets``."""
    return verify(reader.open_memory(octets))


def test_every_rule_has_a_stream_that_breaks_it() -> None:
    assert BROKEN.keys() == RULES.keys()


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_found(rule: str) -> None:
    verdict = judge(BROKEN[rule])
    assert rule in verdict.counts
    assert verdict.sound() == (not verdict.count(Severity.ERROR))
    if RULES[rule].severity is Severity.ERROR:
        assert not verdict.sound()


@pytest.mark.parametrize("rule", [r for r in BROKEN if RULES[r].severity is not Severity.ERROR])
def test_a_warning_or_note_alone_leaves_a_stream_sound(rule: str) -> None:
    others = {"image-options-reserved": set(), "xl-config-surplus": {"xl-config-malformed"}}.get(rule, set())
    errors = {f.rule.id for f in judge(BROKEN[rule]).findings if f.severity is Severity.ERROR}
    assert errors <= others


@pytest.mark.parametrize("kind", SOUND)
def test_a_stream_by_the_specification_has_no_findings_but_notes(kind: str) -> None:
    verdict = judge(SOUND[kind])
    assert [str(f) for f in verdict.findings if f.severity is not Severity.NOTE] == []
    assert verdict.sound(strict=True)


def test_strict_counts_warnings() -> None:
    verdict = judge(BROKEN["layout-order-tolerated"])
    assert verdict.sound()
    assert not verdict.sound(strict=True)


#: rule -> (layer, record index, where the finding has to point, as an offset into BROKEN[rule])
PLACES: dict[str, tuple[str, int | None, Callable[[bytes], int]]] = {
    "image-version": ("libxc", None, lambda _: 12),
    "libxl-version": ("libxl", None, lambda _: 8),
    "xl-mandatory-flags": ("xl", None, lambda _: 36),
    "page-type": ("libxc", 4, lambda octets: octets.index(struct.pack("<QII", 7 << 60 | 3, 8, 24)) - 16),
    "libvirt-version": ("libvirt", None, lambda _: 16),
    "libvirt-xml-malformed": ("libvirt", None, lambda _: 64),
    "xend-config-malformed": ("xend", None, lambda _: 27),
    "xapi-segment-length": ("xapi", 1, lambda octets: octets.index(WHOLE) - 8),
    "record-length": ("libxc", 3, lambda octets: len(octets) - 4),
    "stream-truncated": ("libxc", None, len),
    "after-end": ("libxc", None, lambda octets: len(octets) - 4),
    "record-padding": ("libxc", 4, lambda octets: octets.index(b"x\0\0\x01") + 1),
}


@pytest.mark.parametrize("rule", PLACES)
def test_a_finding_points_at_the_octet(rule: str) -> None:
    layer, index, offset = PLACES[rule]
    octets = BROKEN[rule]
    finding = next(f for f in judge(octets).findings if f.rule.id == rule)
    assert (finding.layer, finding.offset) == (layer, offset(octets))
    assert (finding.record.index if finding.record else None) == index


def test_findings_of_one_rule_are_counted_but_not_all_kept() -> None:
    verdict = judge(hvm(STATIC, PAGES, record(0x80000000) * 5000, TAIL, ENDED))
    assert verdict.counts["record-optional"] == 5000
    assert len(verdict.findings) == 100
    assert verdict.omitted == 4900
    assert verdict.count(Severity.NOTE) == 5000


@given(cut=st.integers(min_value=0, max_value=len(XL_FILE) - 1))
def test_a_cut_stream_is_never_sound(cut: int) -> None:
    verdict = judge(XL_FILE[:cut])
    assert not verdict.sound()
    assert {"stream-truncated", "stream-damaged"} & verdict.counts.keys()


@given(at=st.integers(min_value=0, max_value=len(XL_FILE) - 1), bit=st.integers(min_value=0, max_value=7))
def test_a_flipped_bit_never_stops_verify(at: int, bit: int) -> None:
    octets = bytearray(XL_FILE)
    octets[at] ^= 1 << bit
    verdict = judge(bytes(octets))
    assert all(0 <= f.offset <= len(octets) for f in verdict.findings)


@given(st.binary(max_size=400))
def test_garbage_behind_good_headers_never_stops_verify(garbage: bytes) -> None:
    verdict = judge(header() + STATIC + garbage)
    assert not verdict.sound()
