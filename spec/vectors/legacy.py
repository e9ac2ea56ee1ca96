"""Legacy streams (version 1), of 32-bit and 64-bit toolstacks: no present restore takes them."""

from __future__ import annotations

from spec.vectors.case import Case, case
from tests import legacy_streams as old
from tests.legacy_streams import PvGuest, Words, mark, page


def legacy(name: str, description: str, octets: bytes, guest: str = "hvm") -> Case:
    """Return a case of a legacy stream."""
    return case(
        name,
        description,
        octets,
        "unsound",
        "stream-legacy",
        "refuse",
        guest="pv" if guest == "pv" else "hvm",
    )


def checkpointed(width: int, *chunks: bytes) -> bytes:
    """Return the body and tail of a state, and those of a second one of ``chunks``."""
    tail = old.hvm_tail() + old.qemu(signature=b"RemusDeviceModelState")
    return old.hvm(width, tail=tail) + b"".join(chunks) + mark(0) + tail


def compressed(width: int) -> bytes:
    """Return a stream whose second state has its pages as deltas: the whole page, then one word of it."""
    words = Words(width)
    whole = b"\x80" + page(0x33)
    first = old.hvm(
        width,
        mark(old.ENABLE_COMPRESSION),
        tail=old.hvm_tail() + old.qemu(signature=b"RemusDeviceModelState"),
    )
    return (
        first
        + words.batch([3])
        + words.compressed(whole)
        + mark(0)
        + old.hvm_tail()
        + old.qemu(signature=b"RemusDeviceModelState")
    )


CASES: list[Case] = [
    case_
    for width in (4, 8)
    for case_ in (
        legacy(
            f"hvm-{8 * width}",
            f"an HVM guest, saved by a {8 * width}-bit toolstack",
            old.hvm(width, mark(old.LAST_CHECKPOINT)),
        ),
        legacy(
            f"pv-64-{8 * width}",
            f"a 64-bit PV guest, saved by a {8 * width}-bit toolstack",
            PvGuest(width).stream(),
            "pv",
        ),
        legacy(
            f"pv-32-{8 * width}",
            f"a 32-bit PV guest, saved by a {8 * width}-bit toolstack",
            PvGuest(width, 4).stream(),
            "pv",
        ),
        legacy(
            f"chunks-{8 * width}",
            f"parameters, TSC_INFO, libxl's data and a verify pass, {8 * width}-bit toolstack",
            old.hvm(
                width,
                old.tsc(),
                *[
                    old.param(id, 0xFE000)
                    for id in (old.IDENT_PT, old.VM86_TSS, old.CONSOLE_PFN, old.VIRIDIAN)
                ],
                old.toolstack(old.physmap(old.mapping(0xF000_0000, 0xE000_0000, 0x80_0000, b"vga\0", width))),
                mark(old.VERIFY_MODE),
                Words(width).batch([0], page(0x11)),
                mark(old.LAST_CHECKPOINT),
            ),
        ),
        legacy(
            f"remus-{8 * width}",
            f"two states of an HVM guest, {8 * width}-bit toolstack",
            checkpointed(width, Words(width).batch([1], page(9))),
        ),
        legacy(
            f"compressed-{8 * width}",
            f"a second state with compressed pages, {8 * width}-bit toolstack",
            compressed(width),
        ),
        legacy(
            f"cut-{8 * width}",
            f"an HVM guest, the stream cut in its first page, {8 * width}-bit toolstack",
            old.hvm(width)[:1000],
        ),
    )
]
