"""Streams that end too early: one cut at each kind of place."""

from __future__ import annotations

from spec.vectors.case import Case, case
from spec.vectors.words import (
    CONTEXT,
    ENDED,
    FIRST_CHECKPOINT,
    LIBXC_SEGMENT,
    NESTED,
    PAGES,
    PV,
    PV_WHOLE,
    QEMU,
    STATIC,
    TSC,
    WHOLE,
    XL_FILE,
    in_hvm,
)
from tests.build import CONFIG, LIBXC_CONTEXT, XML, header, libvirt, record, segment, xapi

XAPI = xapi(LIBXC_SEGMENT, segment(0xF11, b"efivars"))
LIBVIRT = libvirt(NESTED)
HEADERS = len(header())


def into(stream: bytes, part: bytes, octets: int) -> bytes:
    """Return ``stream`` up to so many octets of ``part``; counted from its end where negative."""
    start = stream.index(part)
    return stream[: start + (octets if octets >= 0 else len(part) + octets)]


def image(name: str, where: str, octets: bytes, rules: str = "", *, told: bool = True) -> Case:
    """Return a case of an HVM image that ends ``where``."""
    return case(
        name,
        f"an HVM image that ends {where}",
        octets,
        "unsound",
        f"stream-truncated {rules}",
        "refuse",
        missing="" if told else "never",
    )


def nested(name: str, description: str, octets: bytes, *, told: bool = True, rules: str = "") -> Case:
    """Return a case of an envelope or libxl stream that ends too early."""
    return case(
        name, description, octets, "unsound", f"stream-truncated {rules}", missing="" if told else "never"
    )


_IMAGES = [
    image("cut-empty", "before its first octet", b"", told=False),
    image("cut-in-marker", "inside the marker", WHOLE[:5], told=False),
    image("cut-in-id", "inside the id", WHOLE[:10], told=False),
    image("cut-in-image-header", "inside the image header", WHOLE[:20], told=False),
    image("cut-behind-image-header", "behind the image header", WHOLE[:24], told=False),
    image("cut-in-domain-header", "inside the domain header", WHOLE[:39], told=False),
    image("cut-behind-headers", "behind the headers", WHOLE[:HEADERS], told=False),
    image("cut-in-first-record-header", "inside its first record's header", WHOLE[: HEADERS + 4], told=False),
    image("cut-behind-record-header", "behind a record's header", into(WHOLE, TSC, 8)),
    image("cut-in-record-header", "inside a record's header", into(WHOLE, TSC, 3)),
    image("cut-in-policy", "inside a policy", WHOLE[: HEADERS + 8 + 10], told=False),
    image("cut-in-static-data", "behind the policies", into(WHOLE, STATIC, -8), told=False),
    image("cut-in-page-data-head", "inside PAGE_DATA's head", into(WHOLE, PAGES, 8 + 4)),
    image("cut-in-entries", "inside PAGE_DATA's entries", into(WHOLE, PAGES, 8 + 8 + 12)),
    image("cut-before-pages", "between PAGE_DATA's entries and pages", into(WHOLE, PAGES, 8 + 8 + 16)),
    image("cut-in-page", "inside a page", into(WHOLE, PAGES, 8 + 8 + 16 + 100)),
    image("cut-between-pages", "between two pages", into(WHOLE, PAGES, 8 + 8 + 16 + 4096)),
    image("cut-in-last-page", "one octet before PAGE_DATA does", into(WHOLE, PAGES, -1)),
    image("cut-between-records", "between two records", into(WHOLE, TSC, 0)),
    image("cut-in-body", "inside a body", into(WHOLE, TSC, -1)),
    image(
        "cut-in-padding",
        "inside the padding of a record",
        into(in_hvm(record(0x8000_0000, b"x")), record(0x8000_0000, b"x"), -3),
        "record-optional",
    ),
    image("cut-before-end", "without END", WHOLE[: -len(ENDED)]),
    image("cut-in-end", "one octet before END does", WHOLE[:-1]),
    case(
        "cut-in-vcpu",
        "a PV image that ends inside a vCPU's context",
        into(PV_WHOLE, PV.basic(), 3000),
        "unsound",
        "stream-truncated",
        "refuse",
        missing="",
        guest="pv",
    ),
    case(
        "cut-before-first-checkpoint",
        "a Remus image whose sender is gone before its first checkpoint: there is nothing to fail over to",
        into(FIRST_CHECKPOINT, CONTEXT, 0),
        "unsound",
        "stream-truncated",
        "refuse",
        missing="",
        stream_type="remus",
    ),
]

_NESTED = [
    nested("cut-in-xl-magic", "an xl file that ends inside its magic", XL_FILE[:20], told=False),
    nested("cut-in-xl-header", "an xl file that ends inside its header", XL_FILE[:40], told=False),
    nested("cut-behind-xl-header", "an xl file that ends behind its header", XL_FILE[:48], told=False),
    nested("cut-in-config", "an xl file that ends inside its config", into(XL_FILE, CONFIG, 10), told=False),
    nested(
        "cut-behind-config",
        "an xl file that ends behind its config",
        into(XL_FILE, CONFIG, len(CONFIG)),
        told=False,
    ),
    nested("cut-in-libxl-ident", "a libxl stream that ends inside its ident", NESTED[:7], told=False),
    nested("cut-in-libxl-header", "a libxl stream that ends inside its header", NESTED[:14], told=False),
    nested("cut-behind-libxl-header", "a libxl stream of a header", NESTED[:16], told=False),
    nested(
        "cut-behind-libxc-context",
        "a libxl stream that ends behind LIBXC_CONTEXT",
        NESTED[: 16 + len(record(LIBXC_CONTEXT))],
        told=False,
    ),
    nested("cut-behind-image", "a libxl stream that ends behind the image", into(NESTED, QEMU, 0)),
    nested("cut-in-emulator", "a libxl stream that ends inside EMULATOR_CONTEXT", into(NESTED, QEMU, -2)),
    nested("cut-before-libxl-end", "a libxl stream without END", NESTED[: -len(ENDED)]),
    nested("cut-in-libvirt-header", "a libvirt image that ends inside its header", LIBVIRT[:63], told=False),
    nested("cut-in-xml", "a libvirt image that ends inside the XML", into(LIBVIRT, XML, 20), told=False),
    nested(
        "cut-in-segment-header",
        "a xapi image that ends inside a segment's header",
        into(XAPI, LIBXC_SEGMENT, 12),
        told=False,
    ),
    nested(
        "cut-behind-segment-header",
        "a xapi image that ends where its libxc image should start",
        into(XAPI, LIBXC_SEGMENT, 16),
        told=False,
    ),
    nested("cut-in-segment", "a xapi image that ends inside a segment", into(XAPI, b"efivars", 3)),
    nested("cut-before-xapi-end", "a xapi image without the segment End", XAPI[:-16]),
]

CASES: list[Case] = [*_IMAGES, *_NESTED]
