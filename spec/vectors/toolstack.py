"""libxl streams: each record, headers, byte orders, the emulator's data."""

from __future__ import annotations

import struct

from spec.vectors.case import Case, case
from spec.vectors.words import (
    CONTEXT_FOLLOWS,
    EMULATOR,
    ENDED,
    NESTED,
    OPTIONAL,
    PV_WHOLE,
    QEMU,
    STATIC,
    WHOLE,
    XENSTORE,
    hvm,
    in_libxl,
    patched,
)
from tests import build
from tests.build import CHECKPOINT_STATE, EMULATOR_CONTEXT, END, LIBXC_CONTEXT, XENSTORE_DATA, libxl, record


def emulator(code: int, emulator_id: int, index: int, data: bytes) -> bytes:
    """Return an emulator's record: its id, its index, data."""
    return record(code, struct.pack("<II", emulator_id, index) + data)


def xenstore(*strings: str) -> bytes:
    """Return EMULATOR_XENSTORE_DATA of QEMU: keys and values in turn."""
    return record(XENSTORE_DATA, EMULATOR + b"".join(text.encode() + b"\0" for text in strings))


_HEADER = [
    case(
        "libxl-version-1",
        "libxl version 1: the legacy format, which has no such header",
        patched(NESTED, 8, b"\0\0\0\x01"),
        "unsound",
        "libxl-version",
    ),
    case(
        "libxl-all-option-bits",
        "a libxl header with every option bit but that of the byte order",
        patched(NESTED, 12, b"\xff\xff\xff\xfe"),
        "sound",
        "libxl-options-reserved libxl-converted",
    ),
    case(
        "libxl-big-around-little",
        "a big-endian libxl stream around a little-endian image",
        libxl(
            record(LIBXC_CONTEXT, order="big"),
            WHOLE,
            record(EMULATOR_CONTEXT, struct.pack(">II", 2, 0) + b"QEVM", "big"),
            record(END, order="big"),
            order="big",
        ),
        "unsound",
        "libxl-big-endian",
    ),
    case(
        "libxl-little-around-big",
        "a little-endian libxl stream around a big-endian image",
        libxl(CONTEXT_FOLLOWS, build.image("big"), ENDED),
        "unsound",
        "image-big-endian layout-order-tolerated static-data-missing",
        missing="never",
    ),
    case(
        "libxl-wrong-ident",
        "a libxl stream whose ident is LibxlFmu",
        b"LibxlFmu" + NESTED[8:],
        "unsound",
        "stream-damaged",
        missing="never",
    ),
]

_RECORDS = [
    case(
        "libxl-pv",
        "a PV image in a libxl stream, without an emulator",
        libxl(CONTEXT_FOLLOWS, PV_WHOLE, ENDED),
        "sound",
        guest="pv",
    ),
    case("libxl-no-emulator", "an HVM image in a libxl stream, without an emulator", in_libxl(), "sound"),
    case("libxl-xenstore-and-emulator", "xenstore data and state of QEMU", in_libxl(XENSTORE, QEMU), "sound"),
    case(
        "libxl-no-image",
        "LIBXC_CONTEXT with libxl's END behind it instead of an image",
        libxl(CONTEXT_FOLLOWS, ENDED),
        "unsound",
        "stream-damaged",
        missing="never",
    ),
    case(
        "libxl-64-images",
        "64 images, each of a header and END, in one libxl stream, which has one",
        libxl(*[CONTEXT_FOLLOWS + hvm(ENDED)] * 64, ENDED),
        "unsound",
        "layout-missing layout-missing-usual libxl-context-repeated stream-damaged",
        missing="CPUID MSR",
    ),
    case(
        "libxl-unknown",
        "a mandatory libxl record of type 6",
        in_libxl(record(6, b"new")),
        "unsound",
        "record-unknown",
    ),
    case(
        "libxl-optional",
        "an optional libxl record of an unknown type, in front of the image and behind it",
        libxl(record(OPTIONAL | 6), CONTEXT_FOLLOWS, WHOLE, record(OPTIONAL | 7, b"new"), ENDED),
        "sound",
        "record-optional",
    ),
    case(
        "libxl-padding",
        "EMULATOR_CONTEXT whose padding is not zero",
        in_libxl(record(EMULATOR_CONTEXT, EMULATOR + b"Q", padding=b"\1" * 7)),
        "sound",
        "record-padding",
    ),
    case(
        "libxl-too-long",
        "EMULATOR_CONTEXT that announces more than 128 MiB",
        libxl(CONTEXT_FOLLOWS, WHOLE, struct.pack("<II", EMULATOR_CONTEXT, (128 << 20) + 1), EMULATOR),
        "unsound",
        "record-length body-unusual stream-truncated",
    ),
    *[
        case(
            f"libxl-{name}-with-body",
            f"{words} with a body",
            stream,
            "sound",
            "body-surplus",
        )
        for name, words, stream in (
            ("context", "LIBXC_CONTEXT", libxl(record(LIBXC_CONTEXT, b"libxc"), WHOLE, ENDED)),
            ("end", "libxl's END", libxl(CONTEXT_FOLLOWS, WHOLE, record(END, b"bye"))),
        )
    ],
    case(
        "libxl-checkpoint-state-short",
        "CHECKPOINT_STATE of two octets",
        in_libxl(record(CHECKPOINT_STATE, bytes(2))),
        "unsound",
        "body-malformed libxl-checkpoint-state",
    ),
    case("libxl-after-end", "octets behind libxl's END", NESTED + bytes(3), "sound", "after-end"),
    case(
        "libxl-image-refused",
        "an image that misses a page, in a sound libxl stream",
        libxl(CONTEXT_FOLLOWS, hvm(STATIC, ENDED), ENDED),
        "unsound",
        "layout-missing layout-missing-usual",
    ),
]

_EMULATOR = [
    *[
        case(
            f"emulator-{emulator_id}-{index}",
            f"EMULATOR_CONTEXT of {name}, index {index}",
            in_libxl(emulator(EMULATOR_CONTEXT, emulator_id, index, b"state")),
            "sound",
        )
        for emulator_id, index, name in (
            (0, 0, "an unknown emulator"),
            (1, 0, "QEMU traditional"),
            (2, 1, "QEMU upstream"),
        )
    ],
    case(
        "emulator-reserved-id",
        "both emulator records with id 2^32 - 1",
        in_libxl(
            emulator(XENSTORE_DATA, 0xFFFF_FFFF, 0, b"key\0value\0"),
            emulator(EMULATOR_CONTEXT, 0xFFFF_FFFF, 0, b"state"),
        ),
        "sound",
        "emulator-unknown",
    ),
    case(
        "emulator-short",
        "EMULATOR_CONTEXT of 4 octets",
        in_libxl(record(EMULATOR_CONTEXT, bytes(4))),
        "unsound",
        "body-malformed",
    ),
    case(
        "xenstore-short",
        "EMULATOR_XENSTORE_DATA of 7 octets",
        in_libxl(record(XENSTORE_DATA, bytes(7))),
        "unsound",
        "body-malformed",
    ),
    case(
        "xenstore-foreign",
        "EMULATOR_XENSTORE_DATA behind a PV image",
        libxl(CONTEXT_FOLLOWS, PV_WHOLE, XENSTORE, ENDED),
        "unsound",
        "emulator-foreign",
        guest="pv",
    ),
    case(
        "xenstore-before-image",
        "EMULATOR_XENSTORE_DATA before LIBXC_CONTEXT",
        libxl(XENSTORE, CONTEXT_FOLLOWS, WHOLE, ENDED),
        "unsound",
        "emulator-before-image",
    ),
    case(
        "xenstore-pairs",
        "three pairs, one with an empty value",
        in_libxl(xenstore("a", "1", "b/c", "", "d-e_f@g", "x y")),
        "sound",
    ),
    case("xenstore-empty", "no pair", in_libxl(xenstore()), "sound", "emulator-empty"),
    case(
        "xenstore-empty-key",
        "a key of no character",
        in_libxl(xenstore("", "value")),
        "sound",
        "xenstore-characters",
    ),
    case("xenstore-odd", "three strings", in_libxl(xenstore("a", "1", "b")), "unsound", "xenstore-malformed"),
    case(
        "xenstore-unterminated",
        "a value without its NUL",
        in_libxl(record(XENSTORE_DATA, EMULATOR + b"key\0value")),
        "unsound",
        "xenstore-malformed",
    ),
    case(
        "xenstore-not-ascii",
        "a value with an umlaut in UTF-8",
        in_libxl(xenstore("name", "gr\u00fcn")),
        "sound",
        "xenstore-characters",
    ),
    case(
        "xenstore-not-utf-8",
        "a value that is no UTF-8",
        in_libxl(record(XENSTORE_DATA, EMULATOR + b"key\0\xff\xfe\0")),
        "sound",
        "xenstore-characters",
    ),
]

CASES: list[Case] = [*_HEADER, *_RECORDS, *_EMULATOR]
