"""LiME memory images: ranges of physical memory, each behind a header of 32 octets.

Source: LiME's doc/README.md. The end address of a range is inclusive, and readers such as volatility3 want
the ranges in ascending order.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from migstream.errors import FormatError
from migstream.guests.protocols import PAGE_SIZE
from migstream.io import fd as fdio

__all__ = ["RANGE", "range_header", "ranges"]

MAGIC = 0x4C694D45  # "EMiL" in the file
VERSION = 1
RANGE = struct.Struct("<IIQQ8x")  # magic, version, first address, last address
RANGES_MAX = 1 << 22  # that are read of a file, each of which is a step of its own


def range_header(first_pfn: int, pages: int) -> bytes:
    """Return what stands before ``pages`` pages from ``first_pfn`` on."""
    start = first_pfn * PAGE_SIZE
    return RANGE.pack(MAGIC, VERSION, start, start + pages * PAGE_SIZE - 1)


def ranges(fd: int) -> npt.NDArray[np.uint64]:
    """Return the ranges of a LiME file: address, offset of its octets in the file, octets; uint64[n, 3].

    Raises `FormatError` for what is none, or is cut off.
    """
    size = fdio.file_size(fd) or 0
    found: list[tuple[int, int, int]] = []
    at = 0
    while at < size:
        head = fdio.pread(fd, RANGE.size, at)
        if len(head) < RANGE.size:
            raise FormatError(
                f"a range's header is cut off after {len(head)} of {RANGE.size} octets", offset=at
            )
        magic, version, first, last = RANGE.unpack(head)
        if (magic, version) != (MAGIC, VERSION) or last < first:
            raise FormatError(
                f"expected LiME's magic {MAGIC:#x}, version 1 and an ascending range, found {magic:#x}, "
                f"{version} and {first:#x} to {last:#x}",
                offset=at,
            )
        length = last - first + 1
        at += RANGE.size
        if at + length > size:
            raise FormatError(f"the range from {first:#x} on has {size - at} of {length} octets", offset=size)
        if len(found) == RANGES_MAX:
            raise FormatError(f"more than {RANGES_MAX} ranges", offset=at)
        found.append((first, at, length))
        at += length
    if not found:
        raise FormatError("the file is empty; expected a LiME header", offset=0)
    return np.array(found, np.uint64)
