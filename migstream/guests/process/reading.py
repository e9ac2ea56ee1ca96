"""Pages of a process, gathered from wherever they lie into one buffer that is used again."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from migstream.errors import GuestError
from migstream.guests.process import syscalls
from migstream.guests.process.ranges import MemoryRange
from migstream.guests.protocols import PAGE_SHIFT, PAGE_SIZE
from migstream.io.fd import IOV_MAX

__all__ = ["PageReader"]


class PageReader:
    """Reads pages of ``ranges`` from the process ``pid``; reading needs the right to trace it."""

    def __init__(self, pid: int, ranges: Sequence[MemoryRange]) -> None:
        self.pid = pid
        ordered = sorted(ranges, key=lambda each: each.first_pfn)
        self._first = np.array([each.first_pfn for each in ordered], np.uint64)
        self._end = np.array([each.end_pfn for each in ordered], np.uint64)
        self._address = np.array([each.address for each in ordered], np.uint64)
        self._buffer: npt.NDArray[np.uint8] = np.empty(0, np.uint8)

    def ranges_of(self, pfns: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
        """Return the number of the range, by PFN, that each of ``pfns`` lies in; -1 for none."""
        at = np.searchsorted(self._first, pfns, side="right") - 1
        outside = (at < 0) | (pfns >= self._end[at])
        return np.where(outside, np.intp(-1), at)

    def read(self, pfns: npt.NDArray[np.uint64]) -> memoryview:
        """Return the pages of ``pfns``, uint64[n] in any order, one behind the other.

        The memory is good until the next read. Raises `GuestError` for a PFN that is in no range, for a page
        that is not there any more, and when the process has ended.
        """
        at = self.ranges_of(pfns)
        if (at < 0).any():
            raise GuestError(f"PFN {int(pfns[at < 0][0]):#x} is in no range of process {self.pid}")
        if len(self._buffer) < len(pfns) * PAGE_SIZE:
            self._buffer = np.empty(len(pfns) * PAGE_SIZE, np.uint8)
        self._gather(((pfns - self._first[at]) << np.uint64(PAGE_SHIFT)) + self._address[at])
        return self._buffer.data[: len(pfns) * PAGE_SIZE]

    def _gather(self, addresses: npt.NDArray[np.uint64]) -> None:
        breaks = np.flatnonzero(np.diff(addresses) != PAGE_SIZE) + 1
        starts = np.concatenate(([0], breaks)) if len(addresses) else breaks
        lengths = np.diff(np.append(starts, len(addresses))) * PAGE_SIZE
        remote = np.stack((addresses[starts], lengths.astype(np.uint64)), axis=1)
        offset = 0
        for first in range(0, len(remote), IOV_MAX):
            pieces = np.ascontiguousarray(remote[first : first + IOV_MAX])
            offset += self._read(pieces, offset)

    def _read(self, pieces: npt.NDArray[np.uint64], offset: int) -> int:
        wanted = int(pieces[:, 1].sum())
        into = np.array([[self._buffer.ctypes.data + offset, wanted]], np.uint64)
        done = 0
        while done < wanted:  # the kernel reads 2 GiB at most, and stops before what it cannot read
            rest = _behind(pieces, done)
            into[0] = self._buffer.ctypes.data + offset + done, wanted - done
            try:
                done += syscalls.process_vm_readv(self.pid, into, rest)
            except OSError as exc:
                raise self._failed(int(rest[0, 0]), exc) from exc
        return wanted

    def _failed(self, address: int, exc: OSError) -> GuestError:
        if exc.errno == errno.EFAULT:
            return GuestError(
                f"process {self.pid} has no readable memory at {address:#x} any more; save it again, stopped "
                "(kill -STOP) or with range= for memory that stays"
            )
        if exc.errno in (errno.EPERM, errno.EACCES):
            return GuestError(
                f"the memory of process {self.pid} may not be read: {exc.strerror}; run as its user where "
                "tracing is allowed, or as root (CAP_SYS_PTRACE)"
            )
        return syscalls.gone(self.pid, exc) or GuestError(
            f"process {self.pid} cannot be read at {address:#x}: {exc.strerror}"
        )


def _behind(pieces: npt.NDArray[np.uint64], done: int) -> npt.NDArray[np.uint64]:
    """Return what is left of ``pieces`` behind their first ``done`` octets."""
    if not done:
        return pieces
    ends = np.cumsum(pieces[:, 1])
    first = int(np.searchsorted(ends, done, side="right"))
    rest = pieces[first:].copy()
    into_first = np.uint64(done) - (ends[first] - pieces[first, 1])
    rest[0, 0] += into_first
    rest[0, 1] -= into_first
    return rest
