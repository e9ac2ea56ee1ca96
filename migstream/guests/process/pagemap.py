"""Which pages were written: the kernel's PAGEMAP_SCAN, straight into the words of a bitmap.

The kernel answers with runs. A run is entered as two flipped bits, at its start and behind its end; when
all are in, a running exclusive-or over the bits fills what lies between. So the work grows with the runs and
with the words, not with the pages. Numbers: linux/fs.h, ``struct pm_scan_arg``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from migstream.bitmap import PfnBitmap
from migstream.errors import GuestError
from migstream.guests.process.ranges import MemoryRange
from migstream.guests.protocols import PAGE_SHIFT, PAGE_SIZE

__all__ = ["PagemapScanner", "fill_between", "flip"]

PAGEMAP_SCAN = 0xC060_6610
#: size, flags, start, end, walk_end (out), vec, vec_len, max_pages, inverted, mask, any-of mask, return mask
ARGUMENT = struct.Struct("=12Q")
WALK_END_AT = 4 * 8
WP_MATCHING = 1 << 0  # protect again what is reported, in the same step
CHECK_WPASYNC = 1 << 1  # fail on memory that is not write-protected asynchronously
PAGE_IS_WRITTEN = 1 << 1

ENTRY = 8  # octets a page of the map itself

RUNS_AT_A_TIME = 1 << 15  # of 24 octets each: {u64 start, end, categories}


class PagemapScanner:
    """Reads and clears the marks of written pages in ``ranges`` of the process ``pid``."""

    def __init__(self, pid: int, ranges: Sequence[MemoryRange]) -> None:
        """Open the process's page map. Raises `OSError`."""
        self.pid = pid
        self.ranges = ranges
        self._fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._runs = np.zeros((RUNS_AT_A_TIME, 3), np.uint64)

    def scan(self, into: PfnBitmap, *, clean: bool) -> None:
        """Replace ``into`` by the PFNs written; with ``clean``, each counts as clean from its look-up on.

        Raises `GuestError` when the process has ended, or when memory was mapped anew.
        """
        into.clear()
        words = into.words
        for each in self.ranges:
            self._scan(words, each, WP_MATCHING | CHECK_WPASYNC if clean else CHECK_WPASYNC)
        fill_between(words)
        if not os.pread(self._fd, ENTRY, self.ranges[0].address // PAGE_SIZE * ENTRY):
            # A scan of memory that is gone finds nothing, and succeeds.
            raise GuestError(f"process {self.pid} has ended, or runs another program now: save it again")

    def _scan(self, words: npt.NDArray[np.uint64], memory: MemoryRange, flags: int) -> None:
        start = memory.address
        while start < memory.end:
            # fmt: off
            argument = bytearray(ARGUMENT.pack(
                ARGUMENT.size, flags, start, memory.end, 0, self._runs.ctypes.data, RUNS_AT_A_TIME, 0,
                0, PAGE_IS_WRITTEN, 0, PAGE_IS_WRITTEN,
            ))
            # fmt: on
            try:
                count = fcntl.ioctl(self._fd, PAGEMAP_SCAN, argument)
            except OSError as exc:
                raise self._failed(memory, exc) from exc
            (start,) = struct.unpack_from("=Q", argument, WALK_END_AT)
            edges = self._runs[:count, :2].reshape(-1) - np.uint64(memory.address)
            flip(words, (edges >> np.uint64(PAGE_SHIFT)) + np.uint64(memory.first_pfn))

    def _failed(self, memory: MemoryRange, exc: OSError) -> GuestError:
        if exc.errno == errno.EPERM:
            return GuestError(
                f"process {self.pid} mapped memory within {memory} anew while its writes were tracked; save "
                "it again, stopped (kill -STOP) or without --live"
            )
        return GuestError(f"the writes of process {self.pid} to {memory} cannot be read: {exc.strerror}")

    def close(self) -> None:
        """Close the page map. Closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def flip(words: npt.NDArray[np.uint64], bits: npt.NDArray[np.uint64]) -> None:
    """Flip ``bits``, uint64[n] numbers of bits, ascending, maybe equal; one past the end is left out."""
    if len(bits) and int(bits[-1]) >= 64 * len(words):  # the end of a run that reaches the bitmap's
        bits = bits[:-1]
    if not len(bits):
        return
    at = (bits >> np.uint64(6)).astype(np.intp)
    firsts = np.concatenate(([0], np.flatnonzero(at[1:] != at[:-1]) + 1))  # of the bits in each word
    words[at[firsts]] ^= np.bitwise_xor.reduceat(np.uint64(1) << (bits & np.uint64(63)), firsts)


def fill_between(words: npt.NDArray[np.uint64]) -> None:
    """Set each bit, in place, to the exclusive-or of itself and all bits below."""
    for shift in (1, 2, 4, 8, 16, 32):
        words ^= words << np.uint64(shift)
    odd = words >> np.uint64(63)  # whether a run goes on into the next word
    carry = np.bitwise_xor.accumulate(odd)
    words[1:] ^= np.uint64(0) - carry[:-1]
