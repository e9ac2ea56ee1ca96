"""What other tools put around a stream: xl, libvirt, xend, xapi; and files that are something else."""

from __future__ import annotations

import struct

from spec.vectors.case import Case, case
from spec.vectors.words import LIBXC_SEGMENT, NESTED, PV_WHOLE, WHOLE, XL_FILE, patched
from tests import legacy_streams
from tests.build import XENOPS, libvirt, segment, xapi, xend, xl

LEGACY = legacy_streams.hvm(8)


def damaged(name: str, description: str, octets: bytes) -> Case:
    """Return a case that cannot be framed from its start."""
    return case(name, description, octets, "unsound", "stream-damaged", missing="never")


_XL = [
    case(
        "xl-big-endian",
        "an xl file written on a big-endian host, with a little-endian stream",
        xl(NESTED, order="big"),
        "sound",
    ),
    damaged(
        "xl-byte-order",
        "an xl file whose byte order mark is in neither order",
        patched(XL_FILE, 32, b"\x02\x01\x04\x03"),
    ),
    damaged(
        "xl-config-2-gib",
        "an xl file that announces 2 GiB of optional data",
        patched(XL_FILE, 44, b"\xff\xff\xff\x7f"),
    ),
    damaged(
        "xl-optional-data-short",
        "an xl file with 2 octets of optional data, too few for a length",
        b"".join((XL_FILE[:44], struct.pack("<I", 2), bytes(2), NESTED)),
    ),
    damaged(
        "xl-config-too-long",
        "an xl file whose config is longer than the optional data",
        patched(XL_FILE, 48, b"\xff\0\0\0"),
    ),
    case(
        "xl-no-optional-data",
        "an xl file without optional data",
        XL_FILE[:44] + bytes(4) + NESTED,
        "unsound",
        "xl-config-absent",
    ),
    case(
        "xl-cfg",
        "an xl file whose config is an xl.cfg, as its flags say",
        xl(NESTED, config=b"name = 'guest'\n\0", flags=2),
        "sound",
    ),
    case(
        "xl-json-array",
        "an xl file whose config is a JSON array",
        xl(NESTED, config=b"[]\0"),
        "unsound",
        "xl-config-malformed",
    ),
    case(
        "xl-legacy",
        "an xl file of Xen 4.5, with a legacy stream as its flags say",
        xl(LEGACY, flags=1),
        "unsound",
        "stream-legacy",
        missing="never",
    ),
    damaged("xl-in-xl", "an xl file in an xl file", xl(XL_FILE)),
    case("xl-after-end", "octets behind an xl file", XL_FILE + b"more", "sound", "after-end"),
]

_LIBVIRT = [
    case(
        "libvirt-unused",
        "a libvirt image whose unused octets are set",
        patched(libvirt(NESTED), 63, b"\x01"),
        "sound",
        "reserved-field",
    ),
    case(
        "libvirt-legacy",
        "a libvirt image of version 1, with the legacy stream that it announces",
        libvirt(LEGACY, version=1),
        "unsound",
        "stream-legacy",
        missing="never",
    ),
    damaged(
        "libvirt-cloud-hypervisor",
        "a save image of libvirt's cloud-hypervisor driver, which has the same magic and another header",
        b"libvirt-xml\n \0 \r" + struct.pack("<I", 64) + bytes(44) + bytes(64),
    ),
    damaged(
        "libvirt-xml-2-gib",
        "a libvirt image that announces 2 GiB of XML",
        patched(libvirt(NESTED), 20, b"\xff\xff\xff\x7f"),
    ),
]

_XEND = [
    case(
        "xend-legacy",
        "a xend file with a whole legacy stream",
        xend(LEGACY),
        "unsound",
        "stream-legacy",
        missing="never",
    ),
    damaged("xend-libxl", "a xend file with a libxl stream, which xend never knew", xend(NESTED)),
    damaged(
        "xend-config-negative",
        "a xend file of before its present form: its config length is negative",
        patched(xend(LEGACY), 16, b"\x80\0\0\0"),
    ),
    case(
        "xend-config-atom",
        "a xend file whose config is an atom",
        xend(LEGACY, b"domain"),
        "unsound",
        "stream-legacy xend-config-malformed",
        missing="never",
    ),
]

_XAPI = [
    case(
        "xapi-every-segment",
        "a xapi image with every segment that xapi restores",
        xapi(
            LIBXC_SEGMENT,
            *[segment(code, b"state") for code in (0xF00, 0xF11, 0xF12, 0xF13)],
            segment(0xF10),
        ),
        "sound",
    ),
    case("xapi-pv", "a xapi image of a PV guest", xapi(segment(0xF0, PV_WHOLE, 0)), "sound", guest="pv"),
    case(
        "xapi-image-refused",
        "a xapi image whose libxc image has no END",
        xapi(segment(0xF0, WHOLE[:-8], 0), end=False),
        "unsound",
        "stream-truncated",
    ),
    damaged(
        "xapi-demu-measured-by-nobody",
        "a vGPU's state in a segment of length 0",
        xapi(segment(0xF10, b"demu's own", 0)),
    ),
    damaged("xapi-negative-length", "a segment of the length -1", xapi(segment(0xF11, b"", -1))),
    case(
        "xapi-libxl",
        "a libxl stream in a xapi image, which no xapi reads",
        xapi(segment(0xF1, NESTED, 0)),
        "unsound",
        "xapi-segment-unread",
    ),
    case(
        "xapi-legacy",
        "a legacy stream in a xapi image",
        xapi(segment(0xF2, LEGACY, 0)),
        "unsound",
        "stream-legacy",
        missing="never",
    ),
    case(
        "xapi-version-1",
        "a xapi image of version 1, which is a legacy stream",
        b"XenSavedDomain\n" + LEGACY,
        "unsound",
        "stream-legacy",
        missing="never",
    ),
    case(
        "xapi-xenops-unbalanced",
        "a xapi image whose Xenops lacks a parenthesis",
        xapi(LIBXC_SEGMENT, xenops=XENOPS[:-1]),
        "unsound",
        "xapi-xenops-malformed",
    ),
]


def crc(octets: bytes) -> bytes:
    """Return zlib's CRC-32, which gzip and xz use, in 4 octets."""
    import zlib

    return struct.pack("<I", zlib.crc32(octets))


def stored_zstd(octets: bytes) -> bytes:
    """Return a zstd frame of one raw block (RFC 8878): single segment, content size of 4 octets."""
    head = struct.pack("<IBI", 0xFD2F_B528, 0b1010_0000, len(octets))
    return head + (len(octets) << 3 | 1).to_bytes(3, "little") + octets


def stored_gzip(octets: bytes) -> bytes:
    """Return a gzip member of one stored block (RFC 1951, RFC 1952)."""
    head = bytes.fromhex("1f8b 08 00 00000000 00 ff")
    block = struct.pack("<BHH", 1, len(octets), len(octets) ^ 0xFFFF) + octets
    return head + block + crc(octets) + struct.pack("<I", len(octets))


def stored_xz(octets: bytes) -> bytes:
    """Return an xz stream of one block of one uncompressed LZMA2 chunk (the .xz file format, 1.2)."""

    def multibyte(number: int) -> bytes:
        return bytes([number]) if number < 0x80 else bytes([number & 0x7F | 0x80]) + multibyte(number >> 7)

    flags = b"\0\x01"  # check: CRC-32
    head = bytes.fromhex("02 00 2101 08 000000")  # 12 octets, one filter: LZMA2, dictionary of 64 KiB
    head += crc(head)
    data = struct.pack(">BH", 1, len(octets) - 1) + octets + b"\0"
    block = head + data + bytes(-len(data) % 4) + crc(octets)
    index = b"\0\x01" + multibyte(len(head) + len(data) + 4) + multibyte(len(octets))
    index += bytes(-len(index) % 4)
    index += crc(index)
    tail = struct.pack("<I", len(index) // 4 - 1) + flags
    return b"\xfd7zXZ\0" + flags + crc(flags) + block + index + crc(tail) + tail + b"YZ"


_PACKED = [
    *[
        case(f"packed-{name}", f"an xl file compressed by {name}", pack(XL_FILE), "sound")
        for name, pack in (("zstd", stored_zstd), ("gzip", stored_gzip), ("xz", stored_xz))
    ],
    case(
        "packed-cut",
        "an xl file compressed by gzip, of which the end is missing",
        stored_gzip(XL_FILE)[:-200],
        "unsound",
        "stream-truncated",
    ),
]

_FOREIGN = [
    damaged("foreign-elf", "an ELF file", b"\x7fELF\x02\x01\x01" + bytes(57)),
    damaged("foreign-qemu", "a QEMU migration stream", b"QEVM\0\0\0\x03" + bytes(56)),
    damaged("foreign-text", "text", b"name = 'guest'\nmemory = 64\n"),
    damaged("foreign-zeros", "nothing but zeros", bytes(512)),
    damaged("foreign-libvirt-qemu", "a save image of libvirt's QEMU driver", b"LibvirtQemudSave" + bytes(80)),
    damaged("foreign-qemu-tail", "the QEMU tail of a legacy save, alone", legacy_streams.qemu()),
]

CASES: list[Case] = [*_XL, *_LIBVIRT, *_XEND, *_XAPI, *_PACKED, *_FOREIGN]
