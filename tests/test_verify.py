"""verify: every rule is broken by some stream, and only streams that break one are found unsound."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migstream.io import reader
from migstream.verification import RULES, Severity, Verdict, verify
from tests import build
from tests.build import (
    CHECKPOINT,
    CHECKPOINT_END,
    CHECKPOINT_STATE,
    EMULATOR_CONTEXT,
    END,
    HVM_CONTEXT,
    HVM_PARAMS,
    LIBXC_CONTEXT,
    STATIC_DATA_END,
    VCPU_EXTENDED,
    VERIFY,
    X86_PV_INFO,
    X86_PV_P2M_FRAMES,
    X86_TSC_INFO,
    XENSTORE_DATA,
    header,
    libvirt,
    libxl,
    page,
    page_data,
    record,
    segment,
    xapi,
    xend,
    xl,
)

VCPU_BASIC, VCPU_XSAVE, SHARED_INFO, TOOLSTACK, VCPU_MSRS = 0x04, 0x06, 0x07, 0x0B, 0x0C
DIRTY_PFN_LIST, CPUID_POLICY, MSR_POLICY = 0x0F, 0x11, 0x12

CPUID = record(CPUID_POLICY, struct.pack("<6I", 0, 0xFFFFFFFF, 13, 1, 2, 3))
MSR = record(MSR_POLICY, struct.pack("<IIQ", 0xCE, 0, 1 << 31))
STATIC = CPUID + MSR + record(STATIC_DATA_END)
PAGES = page_data([0, 1], page(1) + page(2))
TSC = record(X86_TSC_INFO, struct.pack("<IIQII", 0, 2_000_000, 77, 1, 0))
PARAMS = record(HVM_PARAMS, struct.pack("<IIQQ", 1, 0, 1, 0xFEFFC))
CONTEXT = record(HVM_CONTEXT, b"context!")
TAIL = TSC + PARAMS + CONTEXT
ENDED = record(END)

PV_INFO = record(X86_PV_INFO, struct.pack("<BB6x", 8, 4))
P2M = record(X86_PV_P2M_FRAMES, struct.pack("<IIQQ", 0, 0x3FF, 5, 6))
VCPU = struct.pack("<II", 0, 0)
BASIC = record(VCPU_BASIC, VCPU + bytes(5168))
PV_TAIL = TSC + record(SHARED_INFO, bytes(4096)) + BASIC
EMULATOR = struct.pack("<II", 2, 0)


def hvm(*parts: bytes, start: bytes | None = None) -> bytes:
    """Return an HVM image of ``parts`` behind its headers."""
    return (header() if start is None else start) + b"".join(parts)


def pv(*parts: bytes) -> bytes:
    """Return a PV image of ``parts`` behind its headers."""
    return header(guest=1) + b"".join(parts)


def patched(octets: bytes, offset: int, new: bytes) -> bytes:
    """Return ``octets`` with ``new`` in place of what stands at ``offset``."""
    return octets[:offset] + new + octets[offset + len(new) :]


WHOLE = hvm(STATIC, PAGES, TAIL, ENDED)
PV_WHOLE = pv(PV_INFO, STATIC, P2M, PAGES, PV_TAIL, ENDED)
NESTED = libxl(record(LIBXC_CONTEXT), WHOLE, record(EMULATOR_CONTEXT, EMULATOR + b"QEVM"), ENDED)
XL = xl(NESTED)
LIBXC_SEGMENT = segment(0xF0, WHOLE, 0)
FIRST_CHECKPOINT = hvm(STATIC, PAGES, TAIL, record(CHECKPOINT))
REMUS = libxl(record(LIBXC_CONTEXT), FIRST_CHECKPOINT, record(CHECKPOINT_END))


def in_hvm(*parts: bytes) -> bytes:
    """Return a whole HVM image with ``parts`` between the pages and the state."""
    return hvm(STATIC, PAGES, *parts, TAIL, ENDED)


def in_libxl(*parts: bytes) -> bytes:
    """Return a whole libxl stream with ``parts`` behind the image."""
    return libxl(record(LIBXC_CONTEXT), WHOLE, *parts, ENDED)


def entries(*values: int, pages: bytes = b"") -> bytes:
    return page_data(list(values), pages)


#: rule -> a stream that breaks it
BROKEN: dict[str, bytes] = {
    "xl-mandatory-flags": xl(NESTED, flags=7),
    "xl-not-stream-v2": xl(NESTED, flags=1),
    "xl-optional-flags": patched(XL, 40, b"\x01"),
    "xl-config-absent": xl(NESTED, config=b""),
    "xl-config-malformed": xl(NESTED, config=b"name = 'guest'\n\0"),
    "xl-config-surplus": patched(XL, 48, struct.pack("<I", len(build.CONFIG) - 4)),
    "xl-without-libxl": xl(WHOLE),
    "libvirt-version": libvirt(NESTED, version=3),
    "libvirt-not-stream-v2": libvirt(NESTED, version=1),
    "libvirt-xml-absent": libvirt(NESTED, b""),
    "libvirt-xml-malformed": libvirt(NESTED, b"<domain/>"),
    "libvirt-without-libxl": libvirt(WHOLE),
    "xend-config-malformed": xend(b"", b"(domain"),
    "xapi-segment-unknown": xapi(LIBXC_SEGMENT, segment(0x0F02, b"new")),
    "xapi-segment-unread": xapi(LIBXC_SEGMENT, segment(0x0F01, b"QEVM")),
    "xapi-segment-length": xapi(segment(0xF0, WHOLE)),
    "xapi-xenops-malformed": xapi(LIBXC_SEGMENT, xenops=b"((time 0))"),
    "xapi-image-absent": xapi(),
    "stream-legacy": xend(struct.pack("<QI", 1024, 0xFFFF_FFFF) + bytes([0xFF] * 4 + [0] * 64)),
    "libxl-version": patched(NESTED, 8, b"\0\0\0\x03"),
    "libxl-big-endian": build.libxl_stream("big"),
    "libxl-options-reserved": patched(NESTED, 12, b"\x80\0\0\0"),
    "libxl-converted": patched(NESTED, 12, b"\0\0\0\x02"),
    "libxl-context-absent": libxl(ENDED),
    "libxl-context-repeated": libxl(record(LIBXC_CONTEXT), WHOLE, record(LIBXC_CONTEXT), WHOLE, ENDED),
    "libxl-checkpoint-end": in_libxl(record(CHECKPOINT_END)),
    "libxl-checkpoint-open": libxl(record(LIBXC_CONTEXT), FIRST_CHECKPOINT, ENDED),
    "libxl-checkpoint-state": in_libxl(record(CHECKPOINT_STATE, struct.pack("<I", 0))),
    "emulator-foreign": libxl(
        record(LIBXC_CONTEXT), PV_WHOLE, record(EMULATOR_CONTEXT, EMULATOR + b"QEVM"), ENDED
    ),
    "emulator-before-image": libxl(
        record(EMULATOR_CONTEXT, EMULATOR + b"QEVM"), record(LIBXC_CONTEXT), WHOLE, ENDED
    ),
    "emulator-unknown": in_libxl(record(EMULATOR_CONTEXT, struct.pack("<II", 3, 0) + b"x")),
    "emulator-empty": in_libxl(record(EMULATOR_CONTEXT, EMULATOR)),
    "xenstore-malformed": in_libxl(record(XENSTORE_DATA, EMULATOR + b"key\0")),
    "xenstore-characters": in_libxl(record(XENSTORE_DATA, EMULATOR + b"a key\0\x1b[2J\0")),
    "image-version": patched(WHOLE, 12, b"\0\0\0\x04"),
    "image-big-endian": build.image("big"),
    "image-options-reserved": patched(WHOLE, 16, b"\0\x02"),
    "domain-type": patched(WHOLE, 24, b"\x03"),
    "domain-page-shift": patched(WHOLE, 28, b"\x0d"),
    "domain-converted": patched(WHOLE, 32, bytes(4)),
    "stream-damaged": libxl(record(LIBXC_CONTEXT), b"this is no image header."),
    "stream-truncated": WHOLE[:-4],
    "stream-ends-in-checkpoint": REMUS + PAGES[:100],
    "stream-ends-at-checkpoint": REMUS + PAGES,
    "after-end": WHOLE + b"more",
    "after-end-xl-message": XL + b"domain is yours, you are cleared to unpause\0",
    "record-length": hvm(STATIC, struct.pack("<II", HVM_CONTEXT, 0xFFFFFFFF)),
    "record-padding": in_hvm(record(0x80000000, b"x", padding=b"\0\0\x01\0\0\0\0")),
    "record-unknown": in_hvm(record(0x7FFFFFFF, b"what?")),
    "record-optional": in_hvm(record(0x80000000)),
    "body-malformed": hvm(STATIC, PAGES, record(X86_TSC_INFO, bytes(8)), TAIL, ENDED),
    "body-length": hvm(STATIC, PAGES, record(X86_TSC_INFO, bytes(32)), PARAMS, CONTEXT, ENDED),
    "body-unusual": hvm(STATIC, PAGES, TSC, PARAMS, record(HVM_CONTEXT, bytes(9 << 20)), ENDED),
    "body-surplus": hvm(STATIC, PAGES, TAIL, record(END, b"bye")),
    "reserved-field": patched(WHOLE, 20, b"\x01"),
    "page-data-count": in_hvm(entries()),
    "page-data-length": in_hvm(entries(2, pages=page(3) + page(4))),
    "page-type": in_hvm(entries(7 << 60 | 3)),
    "page-reserved-bits": in_hvm(entries(1 << 55 | 3, pages=page(3))),
    "page-duplicate": in_hvm(entries(3, 3, pages=page(3) + page(4))),
    "page-table-in-hvm": in_hvm(entries(1 << 60 | 3, pages=page(3))),
    "page-beyond-p2m": pv(PV_INFO, STATIC, P2M, entries(0x400, pages=page(3)), PV_TAIL, ENDED),
    "pv-info": pv(record(X86_PV_INFO, struct.pack("<BB6x", 8, 3)), STATIC, P2M, PAGES, PV_TAIL, ENDED),
    "p2m-range": pv(
        PV_INFO, STATIC, record(X86_PV_P2M_FRAMES, struct.pack("<II", 9, 8)), PAGES, PV_TAIL, ENDED
    ),
    "p2m-length": pv(
        PV_INFO, STATIC, record(X86_PV_P2M_FRAMES, struct.pack("<IIQ", 0, 0x3FF, 5)), PAGES, PV_TAIL, ENDED
    ),
    "vcpu-context-size": pv(
        PV_INFO, STATIC, P2M, PAGES, PV_TAIL, record(VCPU_EXTENDED, VCPU + bytes(129)), ENDED
    ),
    "vcpu-empty": pv(PV_INFO, STATIC, P2M, PAGES, PV_TAIL, record(VCPU_XSAVE, VCPU), ENDED),
    "hvm-params-empty": hvm(STATIC, PAGES, TSC, record(HVM_PARAMS, bytes(8)), CONTEXT, ENDED),
    "hvm-param-unknown": hvm(
        STATIC, PAGES, TSC, record(HVM_PARAMS, struct.pack("<IIQQ", 1, 0, 99, 0)), CONTEXT, ENDED
    ),
    "hvm-param-repeated": hvm(
        STATIC, PAGES, TSC, record(HVM_PARAMS, struct.pack("<II4Q", 2, 0, 1, 5, 1, 6)), CONTEXT, ENDED
    ),
    "tsc-mode": hvm(STATIC, PAGES, record(X86_TSC_INFO, b"\x09" + bytes(23)), PARAMS, CONTEXT, ENDED),
    "layout-foreign": in_hvm(PV_INFO),
    "layout-back-channel": in_hvm(record(DIRTY_PFN_LIST, bytes(8))),
    "layout-deprecated": in_hvm(record(TOOLSTACK, b"blob")),
    "layout-order": hvm(PAGES, STATIC, TAIL, ENDED),
    "layout-order-tolerated": hvm(STATIC, PAGES, TSC, CONTEXT, PARAMS, ENDED),
    "layout-repeated": hvm(STATIC, record(STATIC_DATA_END), PAGES, TAIL, ENDED),
    "layout-repeated-tolerated": in_hvm(TSC),
    "layout-static-late": in_hvm(CPUID),
    "layout-missing": hvm(STATIC, TAIL, ENDED),
    "layout-missing-usual": hvm(STATIC, PAGES, TSC, ENDED),
    "static-data-inferred": hvm(PAGES, TAIL, ENDED, start=header(version=2)),
    "static-data-missing": hvm(record(STATIC_DATA_END), PAGES, TAIL, ENDED),
    "static-data-in-v2": hvm(CPUID, PAGES, TAIL, ENDED, start=header(version=2)),
}  # fmt: skip

SOUND = {
    "HVM image": WHOLE,
    "PV image": PV_WHOLE,
    "libxl stream": NESTED,
    "xl file": XL,
    "libvirt image": libvirt(NESTED),
    "xapi image": xapi(LIBXC_SEGMENT, segment(0xF11, b"efivars"), segment(0xF00, b"QEVM")),
    "bare Remus image": FIRST_CHECKPOINT + page_data([1], page(9)) + TAIL + record(CHECKPOINT) + ENDED,
    "Remus in libxl": REMUS + page_data([1], page(9)) + TAIL + record(CHECKPOINT) + record(CHECKPOINT_END),
    "COLO in libxl": REMUS + record(CHECKPOINT_STATE, bytes(4)) + page_data([1], page(9)) + TAIL,
    "verify pass": hvm(STATIC, PAGES, record(VERIFY), PAGES, TAIL, ENDED),
    "32-bit PV image": pv(
        record(X86_PV_INFO, struct.pack("<BB6x", 4, 3)),
        STATIC,
        record(X86_PV_P2M_FRAMES, struct.pack("<IIQ", 0, 0x3FF, 5)),
        PAGES,
        TSC + record(SHARED_INFO, bytes(4096)) + record(VCPU_BASIC, VCPU + bytes(2800)),
        record(VCPU_MSRS, VCPU + bytes(32)),
        ENDED,
    ),
}


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


@given(cut=st.integers(min_value=0, max_value=len(XL) - 1))
def test_a_cut_stream_is_never_sound(cut: int) -> None:
    verdict = judge(XL[:cut])
    assert not verdict.sound()
    assert {"stream-truncated", "stream-damaged"} & verdict.counts.keys()


@given(at=st.integers(min_value=0, max_value=len(XL) - 1), bit=st.integers(min_value=0, max_value=7))
def test_a_flipped_bit_never_stops_verify(at: int, bit: int) -> None:
    octets = bytearray(XL)
    octets[at] ^= 1 << bit
    verdict = judge(bytes(octets))
    assert all(0 <= f.offset <= len(octets) for f in verdict.findings)


@given(st.binary(max_size=400))
def test_garbage_behind_good_headers_never_stops_verify(garbage: bytes) -> None:
    verdict = judge(header() + STATIC + garbage)
    assert not verdict.sound()
