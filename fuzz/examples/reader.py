"""A small reader of libxc images with five planted bugs: something for ``migstream fuzz`` to find.

It prints what is in an image, and exits with 1 and one line where it refuses one. A sound image never
trips it. The bugs are of the kind that real readers of this format had; each is marked, and each shows
itself as another exception in another function, or as a hang.

    python fuzz/examples/reader.py IMAGE
"""

from __future__ import annotations

import struct
import sys

PAGE = 4096
PAGES = 1 << 20  # of guest memory that it has room for: 4 GiB
OPTIONAL = 1 << 31

END, PAGE_DATA, TSC_INFO, HVM_CONTEXT, HVM_PARAMS, VERIFY = 0x00, 0x01, 0x08, 0x09, 0x0A, 0x0D
STATIC_DATA_END, CPUID_POLICY, MSR_POLICY = 0x10, 0x11, 0x12
PV_RECORDS = range(0x02, 0x08)
TYPE_NAMES = {0: "normal", 0xD: "broken", 0xE: "allocate only", 0xF: "invalid"}
TYPE_NAMES |= {pin | level: f"L{level} table" for pin in (0, 8) for level in (1, 2, 3, 4)}
WITHOUT_DATA = (0xD, 0xE, 0xF)


def refused(reason: str) -> SystemExit:
    """Make the exception that ends the reader with exit code 1, and says why."""
    return SystemExit(f"refused: {reason}")


class Reader:
    """Walks through an image."""

    def __init__(self, image: bytes) -> None:
        self.image = image
        self.position = 0
        self.kinds = bytearray(PAGES)  # each page's type

    def take(self, length: int) -> bytes:
        """Return the next octets."""
        octets = self.image[self.position : self.position + length]
        if len(octets) < length:
            raise refused(f"the image ends at {len(self.image)}, within {length} octets at {self.position}")
        self.position += length
        return octets

    def skip(self, length: int) -> None:
        """Pass over octets."""
        left = length
        while left:
            # BUG py-2: at the end of the image nothing is skipped any more, and left never becomes 0.
            skipped = min(left, len(self.image) - self.position)
            self.position += skipped
            left -= skipped

    def headers(self) -> None:
        """Check and print the image header and the domain header."""
        marker, ident, version, options = struct.unpack(">QIIH6x", self.take(24))
        if marker != (1 << 64) - 1 or ident != 0x58454E46:
            raise refused("not a libxc image")
        if version < 2 or options & 1:  # a version 4, which does not exist, is let in: seen by --differential
            raise refused(f"version {version}, options {options:#x}")
        guest, page_shift, major, minor = struct.unpack("<IH2xII", self.take(16))
        if guest not in (1, 2) or page_shift != 12:
            raise refused(f"guest type {guest}, page shift {page_shift}")
        print(f"version {version}, {('PV', 'HVM')[guest - 1]} guest of Xen {major}.{minor}")

    def records(self) -> None:
        """Read the records up to END."""
        while True:
            code, length = struct.unpack("<II", self.take(8))
            padding = -length % 8
            if code & OPTIONAL:
                self.skip(length + padding)
                continue
            body = self.take(length)
            self.take(padding)
            if code == END:
                return
            if code == PAGE_DATA:
                self.page_data(body)
            elif code == TSC_INFO:
                self.tsc_info(body)
            elif code == HVM_PARAMS:
                self.hvm_params(body)
            elif code in (HVM_CONTEXT, CPUID_POLICY, MSR_POLICY) or code in PV_RECORDS or code == 0x0C:
                print(f"record {code:#x}, {length} octets")
            elif code not in (VERIFY, STATIC_DATA_END):
                raise refused(f"record of type {code:#x}")

    def page_data(self, body: bytes) -> None:
        """Take the pages of a record."""
        if len(body) < 8:
            raise refused(f"PAGE_DATA of {len(body)} octets")
        count = int.from_bytes(body[:4], "little")
        # BUG py-4: the count is not held against the length of the body.
        entries = struct.unpack_from(f"<{count}Q", body, 8)
        pages = sum(entry >> 60 not in WITHOUT_DATA for entry in entries)
        if len(body) != 8 + 8 * count + PAGE * pages:
            raise refused(f"PAGE_DATA of {len(body)} octets for {count} entries with {pages} pages")
        for entry in entries:
            self.place(entry & (1 << 52) - 1, entry >> 60)

    def place(self, pfn: int, kind: int) -> None:
        """Note a page."""
        # BUG py-3: page types 5 to 8 are reserved, and not in the table.
        print(f"PFN {pfn:#x}: {self.type_name(kind)}")
        # BUG py-1: a PFN is an index, whatever the size of memory.
        self.kinds[pfn] = kind

    def type_name(self, kind: int) -> str:
        """Return the name of a page type."""
        return TYPE_NAMES[kind]

    def tsc_info(self, body: bytes) -> None:
        """Print the state of the time stamp counter."""
        if len(body) != 24:
            raise refused(f"X86_TSC_INFO of {len(body)} octets")
        mode, khz, nsec, incarnation = struct.unpack("<IIQI4x", body)
        print(f"TSC mode {mode}, {khz} kHz, {nsec} ns, incarnation {incarnation}")

    def hvm_params(self, body: bytes) -> None:
        """Read the parameters."""
        if len(body) < 8:
            raise refused(f"HVM_PARAMS of {len(body)} octets")
        count = int.from_bytes(body[:4], "little")
        # BUG py-5: the count is trusted with an allocation, before it is held against the length.
        table: list[tuple[int, int] | None] = [None] * count
        if len(body) != 8 + 16 * count:
            raise refused(f"HVM_PARAMS of {len(body)} octets for {count} parameters")
        for number in range(count):
            table[number] = struct.unpack_from("<QQ", body, 8 + 16 * number)
        print(f"{len(table)} parameters")


def main() -> None:
    """Read the image that is named on the command line."""
    with open(sys.argv[1], "rb") as file:
        reader = Reader(file.read())
    reader.headers()
    reader.records()


if __name__ == "__main__":
    main()
