"""Legacy streams made by hand from Xen 4.4's save code: nothing here comes from the code under test."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

PAGE = 4096
HVM_PARAM_CHUNK = struct.Struct("<iIQ")  # id, padding, value

VERIFY_MODE, VCPU_INFO, IDENT_PT, VM86_TSS, TMEM, TMEM_EXTRA = -1, -2, -3, -4, -5, -6
TSC_INFO, CONSOLE_PFN, LAST_CHECKPOINT, ACPI_IOPORTS, VIRIDIAN = -7, -8, -9, -10, -11
COMPRESSED_DATA, ENABLE_COMPRESSION, GENERATION_ID, PAGING_RING = -12, -13, -14, -15
ACCESS_RING, SHARING_RING, TOOLSTACK, IOREQ_SERVER, NR_IOREQ_SERVER = -16, -17, -18, -19, -20

XTAB = 0xF000_0000  # what stands for a PFN that could not be mapped


def page(fill: int) -> bytes:
    """Return a page whose octets are all ``fill``."""
    return bytes([fill]) * PAGE


def mark(id: int) -> bytes:
    """Return a chunk without a body; 0 ends a body."""
    return struct.pack("<i", id)


def param(id: int, value: int) -> bytes:
    """Return a chunk with an HVM parameter."""
    return HVM_PARAM_CHUNK.pack(id, 0, value)


def tsc(mode: int = 1, nsec: int = 77, khz: int = 2_600_000, incarnation: int = 3) -> bytes:
    """Return a TSC_INFO chunk."""
    return struct.pack("<iIQII", TSC_INFO, mode, nsec, khz, incarnation)


def vcpu_info(highest: int, *words: int) -> bytes:
    """Return a VCPU_INFO chunk with its bitmap."""
    return struct.pack(f"<ii{len(words)}Q", VCPU_INFO, highest, *words)


def toolstack(data: bytes) -> bytes:
    """Return a TOOLSTACK chunk."""
    return struct.pack("<iI", TOOLSTACK, len(data)) + data


def mapping(phys: int, start: int, size: int, name: bytes, width: int) -> bytes:
    """Return one of libxl's physmap entries; ``name`` with its NUL."""
    return struct.pack("<QQQI", phys, start, size, len(name)) + name + bytes(4 if width == 8 else 0)


def physmap(*mappings: bytes) -> bytes:
    """Return libxl's toolstack data, version 1."""
    return struct.pack("<II", 1, len(mappings)) + b"".join(mappings)


@dataclass(frozen=True)
class Words:
    """What depends on the toolstack's word size: ``width`` is 4 or 8."""

    width: int

    def words(self, *values: int) -> bytes:
        """Return values of type unsigned long."""
        return struct.pack(f"<{len(values)}{'I' if self.width == 4 else 'Q'}", *values)

    def batch(self, entries: Sequence[int], pages: bytes = b"") -> bytes:
        """Return a batch of entries (type << 28 | PFN) and its pages."""
        return struct.pack("<i", len(entries)) + self.words(*entries) + pages

    def compressed(self, data: bytes) -> bytes:
        """Return a COMPRESSED_DATA chunk."""
        return struct.pack("<i", COMPRESSED_DATA) + self.words(len(data)) + data


def hvm_tail(
    context: bytes = b"hvm context", magic: tuple[int, int, int] = (0xFEFFB, 0xFEFFD, 0xFEFFC)
) -> bytes:
    """Return an HVM tail: I/O request, buffered I/O request and store PFNs, then the HVM context."""
    return struct.pack("<QQQI", *magic, len(context)) + context


def qemu(state: bytes = b"QEVM state", signature: bytes = b"DeviceModelRecord0002") -> bytes:
    """Return QEMU's record; with a length where the signature has one."""
    to_end = signature == b"QemuDeviceModelRecord"
    return signature + (b"" if to_end else struct.pack("<I", len(state))) + state


def hvm(width: int = 8, *chunks: bytes, p2m_size: int = 0x100000, tail: bytes | None = None) -> bytes:
    """Return a stream of an HVM guest: two pages, ``chunks``, and the tail."""
    words = Words(width)
    return (
        words.words(p2m_size)
        + words.batch([0, 1], page(0x11) + page(0x22))
        + b"".join(chunks)
        + mark(0)
        + (hvm_tail() + qemu() if tail is None else tail)
    )


BASIC_SIZE = {4: 2800, 8: 5168}


def extended_info(width: int, guest_width: int, *, extended: bool = True, xsave: int = 0) -> bytes:
    """Return the extended info of a PV guest; ``xsave``: octets of xsave state, its header included."""
    size = BASIC_SIZE[guest_width]
    blocks = b"vcpu" + struct.pack("<I", size) + bytes([0xEE]) * size
    if extended:
        blocks += b"extv" + struct.pack("<I", 0)
    if xsave:
        blocks += b"xcnt" + struct.pack("<II", 4, xsave)
    return b"\xff" * width + struct.pack("<I", len(blocks)) + blocks


@dataclass
class PvGuest:
    """A PV guest of 1024 PFNs: the p2m in PFN 4 (and 5), a top page table in PFN 6."""

    width: int = 8  # of the toolstack
    guest_width: int = 8
    extended: bool = True
    xsave: int = 0  # octets of a vCPU's xsave state, without its header
    vcpus: tuple[int, ...] = (0,)
    unmapped: tuple[int, ...] = ()
    info: bytes | None = None

    def start(self) -> bytes:
        words = Words(self.width)
        info = self.info
        if info is None:
            info = extended_info(
                self.width,
                self.guest_width,
                extended=self.extended,
                xsave=self.xsave + 16 if self.xsave else 0,
            )
        frames = words.words(4, 5) if self.guest_width == 8 else words.words(4)
        return words.words(1024) + info + frames

    def memory(self) -> bytes:
        top = 4 if self.guest_width == 8 else 3
        entries = [0, 1, 2, 3, 4, 5, (8 | top) << 28 | 6, XTAB]
        return Words(self.width).batch(entries, b"".join(page(0x40 + pfn) for pfn in range(7)))

    def vcpu(self, vcpu_id: int) -> bytes:
        context = bytes([0x10 + vcpu_id]) * BASIC_SIZE[self.guest_width]
        if self.extended:
            context += bytes([0x20 + vcpu_id]) * 128
        if self.xsave:
            context += struct.pack("<QQ", 7, self.xsave) + bytes([0x30 + vcpu_id]) * self.xsave
        return context

    def tail(self) -> bytes:
        unmapped = struct.pack("<I", len(self.unmapped)) + Words(self.width).words(*self.unmapped)
        return unmapped + b"".join(self.vcpu(i) for i in self.vcpus) + page(0x5A)

    def stream(self, *chunks: bytes) -> bytes:
        """Return the whole stream, ``chunks`` behind its pages."""
        info = vcpu_info(max(self.vcpus), sum(1 << i for i in self.vcpus))
        return (
            self.start()
            + tsc()
            + self.memory()
            + info
            + b"".join(chunks)
            + mark(LAST_CHECKPOINT)
            + mark(0)
            + self.tail()
        )
