"""Streams made by hand from the specification, for the tests: nothing here comes from the code under test."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SHARED = Path(__file__).parents[2] / "shared"
DATA = Path(__file__).parent / "data"
PAGE = 4096

# libxc's record types,
END, PAGE_DATA, X86_PV_INFO, X86_PV_P2M_FRAMES = 0x00, 0x01, 0x02, 0x03
VCPU_EXTENDED, X86_TSC_INFO, HVM_CONTEXT, HVM_PARAMS = 0x05, 0x08, 0x09, 0x0A
VERIFY, CHECKPOINT, STATIC_DATA_END = 0x0D, 0x0E, 0x10
# and libxl's.
LIBXC_CONTEXT, XENSTORE_DATA, EMULATOR_CONTEXT, CHECKPOINT_END, CHECKPOINT_STATE = 1, 2, 3, 4, 5


def sign(order: str) -> str:
    """Return struct's character for a byte order."""
    return {"little": "<", "big": ">"}[order]


def record(code: int, body: bytes = b"", order: str = "little", *, padding: bytes | None = None) -> bytes:
    """Return one record of libxc or libxl: type, body length, body, zeros up to the next multiple of 8."""
    pad = bytes(-len(body) % 8) if padding is None else padding
    return struct.pack(sign(order) + "II", code, len(body)) + body + pad


def header(order: str = "little", *, version: int = 3, guest: int = 2) -> bytes:
    """Return libxc's image header (big-endian in every image) and domain header."""
    image = struct.pack(">QIIHHI", 0xFFFF_FFFF_FFFF_FFFF, 0x58454E46, version, order == "big", 0, 0)
    return image + struct.pack(sign(order) + "IHHII", guest, 12, 0, 4, 21)


def page(fill: int) -> bytes:
    """Return a page whose octets are all ``fill``."""
    return bytes([fill]) * PAGE


def page_data(entries: list[int], pages: bytes, order: str = "little") -> bytes:
    """Return a PAGE_DATA record of entries (type << 60 | pfn) and pages."""
    head = struct.pack(f"{sign(order)}II{len(entries)}Q", len(entries), 0, *entries)
    return record(PAGE_DATA, head + pages, order)


def image(order: str = "little", *, end: bool = True) -> bytes:
    """Return a small libxc image of an HVM guest with two pages and one that is allocated only."""
    mark = sign(order)
    return (
        header(order)
        + record(STATIC_DATA_END, order=order)
        + page_data([0, 1, 0xE << 60 | 5], page(0x11) + page(0x22), order)
        + record(X86_TSC_INFO, struct.pack(mark + "IIQII", 1, 2_000_000, 77, 3, 0), order)
        + record(HVM_CONTEXT, b"context", order)
        + record(HVM_PARAMS, struct.pack(mark + "IIQQ", 1, 0, 1, 0xFEFFC), order)
        + (record(END, order=order) if end else b"")
    )


def libxl(*parts: bytes, order: str = "little") -> bytes:
    """Return a libxl header and what follows it."""
    return struct.pack(">QII", 0x4C6962786C466D74, 2, order == "big") + b"".join(parts)


def libxl_stream(order: str = "little") -> bytes:
    """Return a whole libxl stream around `image`."""
    emulator = struct.pack(sign(order) + "II", 2, 0)
    return libxl(
        record(LIBXC_CONTEXT, order=order),
        image(order),
        record(XENSTORE_DATA, emulator + b"key\0value\0", order),
        record(EMULATOR_CONTEXT, emulator + b"QEVM...", order),
        record(END, order=order),
        order=order,
    )


CONFIG = b'{"c_info": {"name": "guest"}}\0'


def xl(content: bytes, config: bytes = CONFIG, *, flags: int = 3, order: str = "little") -> bytes:
    """Return an xl save file around ``content``."""
    data = struct.pack(sign(order) + "I", len(config)) + config
    numbers = struct.pack(sign(order) + "IIII", 0x01020304, flags, 0, len(data))
    return b"Xen saved domain, xl format\n \0 \r" + numbers + data + content


XML = b"<domain type='xen'><name>guest</name></domain>\0"


def libvirt(content: bytes, xml: bytes = XML, *, version: int = 2) -> bytes:
    """Return a save image of libvirt's libxl driver around ``content``."""
    return b"libvirt-xml\n \0 \r" + struct.pack("<II40x", version, len(xml)) + xml + content


SEXPR = b"(domain (name guest) (vcpus 1) (image (linux (kernel /k))))"


def xend(content: bytes, config: bytes = SEXPR) -> bytes:
    """Return a save file of xend around ``content``."""
    return b"LinuxGuestRecord" + struct.pack(">i", len(config)) + config + content


XENOPS = b'((time 20140101T00:00:00Z)(word_size 64)(vm_str "<vm>")(xs_subtree()))'


def segment(code: int, body: bytes = b"", length: int | None = None) -> bytes:
    """Return a segment of xapi's suspend image: type, length, body."""
    return struct.pack("<qq", code, len(body) if length is None else length) + body


def xapi(*segments: bytes, xenops: bytes = XENOPS, end: bool = True) -> bytes:
    """Return a suspend image of xapi, version 2: Xenops, then ``segments``, then End."""
    return b"XenSavedDomv2-\n" + segment(0x0F, xenops) + b"".join(segments) + segment(0xFFFF) * end


def remus_stream(rounds: int = 2) -> bytes:
    """Return a libxl stream with ``rounds`` checkpoints behind the first, which then stops."""
    first = record(LIBXC_CONTEXT) + image(end=False)
    handed_over = record(CHECKPOINT) + record(EMULATOR_CONTEXT, bytes(8) + b"state") + record(CHECKPOINT_END)
    again = page_data([1], page(0x33)) + handed_over
    return libxl(first, handed_over, again * rounds)


@contextmanager
def fed(octets: bytes, *, piece: int = 1 << 16, keep_open: bool = False) -> Iterator[int]:
    """Give the reading end of a pipe that a thread writes ``octets`` to, ``piece`` at a time."""
    reader, writer = os.pipe()
    done = threading.Event()

    def write() -> None:
        try:
            for start in range(0, len(octets), piece):
                rest = memoryview(octets)[start : start + piece]
                while rest:
                    rest = rest[os.write(writer, rest) :]
        except BrokenPipeError:
            pass
        finally:
            if not keep_open:
                os.close(writer)
            done.set()

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        yield reader
    finally:
        os.close(reader)
        thread.join()
        if keep_open:
            os.close(writer)
