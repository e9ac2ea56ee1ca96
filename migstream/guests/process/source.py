"""The memory of a process as a guest to save from, while it runs or stopped for the moment.

What is saved is its memory, and nothing of its processor registers, files and threads: the stream is an HVM
image that can be verified, searched and compared, and restored to a file. Nobody can start it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from migstream.bitmap import PfnBitmap
from migstream.errors import GuestError
from migstream.guests.image import SuspendedImage
from migstream.guests.memory import run_bounds
from migstream.guests.process.mappings import Mapping, Selection, everything_writable, read_mappings
from migstream.guests.process.ranges import MemoryRange, numbered
from migstream.guests.process.reading import PageReader
from migstream.guests.process.tracer import Tracer
from migstream.guests.process.tracking import DirtyTracker, track
from migstream.guests.protocols import PAGE_SIZE
from migstream.records import Record
from migstream.records.libxc import GuestType, Hypervisor, Origin
from migstream.records.page_types import PageType

__all__ = ["PFN_LIMIT", "ProcessSource"]

PFN_LIMIT = 1 << 32  # 16 TiB of memory: sanitizers reserve more than anybody would want to save


class ProcessSource(SuspendedImage):
    """Memory of the process ``pid`` as a `SaveSource`.

    ``select`` picks the mappings; their pages are numbered from PFN 0, by address and without gaps (`ranges`
    says which is where). Memory of a file that the process shares is read through an own mapping of the file
    where it may be opened; all other is copied from the process, into one buffer that the next `pages` uses
    again. ``uffd`` is a userfaultfd that the process handed over (`handover.accept`).

    Close it, or use it as a context manager: the process then runs on, untracked, and nothing is left in it.
    """

    def __init__(
        self,
        pid: int,
        select: Selection = everything_writable,
        guest_type: GuestType = GuestType.HVM,
        *,
        uffd: int | None = None,
    ) -> None:
        """Look at the process, without touching it. Raises `GuestError`; ``uffd`` is the caller's then."""
        if pid == os.getpid():
            raise GuestError("migstream cannot save itself: it would have to stop")
        self.pid = pid
        self._select = select
        self._mappings = select(read_mappings(pid))
        if not self._mappings:
            raise GuestError(f"process {pid} has no memory that it can write; name some with range=")
        #: Which memory is at which PFNs, ascending.
        self.ranges: list[MemoryRange] = numbered([(each.start, each.end) for each in self._mappings])
        if self.ranges[-1].end_pfn > PFN_LIMIT:
            raise GuestError(
                f"process {pid} has {self.ranges[-1].end_pfn >> 28} TiB of memory mapped, most of it unused; "
                "name what is wanted with range= or mapping="
            )
        super().__init__(guest_type, max_pfn=self.ranges[-1].end_pfn - 1)
        self._views = [_own_mapping(pid, each) for each in self._mappings]
        self._mapped = np.array([view is not None for view in self._views], np.bool_)
        self._reader = PageReader(pid, self.ranges)
        self._uffd = uffd
        self._tracker: DirtyTracker | None = None
        self._notes: list[str] = []
        self._tracer = Tracer(pid)

    def notes(self) -> Sequence[str]:
        """Return how writes were tracked, and why so."""
        return self._notes

    def static_records(self) -> Sequence[Record]:
        """Return an ORIGIN that says where which PFNs lie: a property for each range."""
        octets = sum(each.length for each in self.ranges)
        properties = [("pid", str(self.pid))]
        for each, mapping in zip(self.ranges, self._mappings, strict=True):
            what = f"{each} {mapping.permissions} {mapping.name}"
            properties.append((f"pfn {each.first_pfn:#x}", what.rstrip()))
        return [
            Origin(
                hypervisor=Hypervisor.PROCESS,
                vcpus=0,
                ram_size=octets,
                ram_below_4g=octets,
                data=Origin.pack(properties),
            )
        ]

    # Pages

    def page_types(self, pfns: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
        """Return NOTAB for all: memory that was never touched is zeros to the process, too."""
        return np.full(len(pfns), PageType.NOTAB, np.uint8)

    def pages(
        self, pfns: npt.NDArray[np.uint64], types: npt.NDArray[np.uint8]
    ) -> tuple[Sequence[memoryview], npt.NDArray[np.bool_]]:
        """Return the pages, good until the next call; none of them ever has to wait. Raises `GuestError`."""
        waiting = np.zeros(len(pfns), np.bool_)
        if self._tracker is not None and self._tracker.copy is not None:
            return self._tracker.copy.views(pfns), waiting
        if not self._mapped.any():
            return [self._reader.read(pfns)], waiting
        at = self._reader.ranges_of(pfns)
        copied = self._reader.read(pfns[~self._mapped[at] | (at < 0)])
        buffers: list[memoryview] = []
        for part in np.split(np.arange(len(pfns)), np.flatnonzero(np.diff(at)) + 1):
            view = self._views[at[part[0]]]
            if view is None:
                buffers.append(copied[: len(part) * PAGE_SIZE])
                copied = copied[len(part) * PAGE_SIZE :]
            else:
                numbers = pfns[part] - np.uint64(self.ranges[at[part[0]]].first_pfn)
                buffers += [view[start:end] for start, end in run_bounds(numbers, PAGE_SIZE)]
        return buffers, waiting

    # The dirty log

    def enable_dirty_log(self) -> None:
        """Start to track writes, by whichever way works. Raises `GuestError` if they are tracked already."""
        self.disable_dirty_log()
        uffd, self._uffd = self._uffd, None  # good for one tracker
        # Without our views: to compare with a file that the process cuts short would be our end (SIGBUS).
        self._tracker = track(self.pid, self.ranges, uffd=uffd, tracer=self._tracer)
        self._notes = [f"writes were tracked by {self._tracker.name}: {self._tracker.why}"]

    def disable_dirty_log(self) -> None:
        """Stop to track writes; nothing of it is left in the process."""
        if self._tracker is not None:
            self._tracker.close()
            self._tracker = None

    def clean_dirty_log(self, into: PfnBitmap) -> None:
        """Move the log into ``into``. Raises `GuestError` if it is off, or the process has ended."""
        self._log.clean(into)

    def peek_dirty_log(self, into: PfnBitmap) -> None:
        """Copy the log into ``into``. Raises `GuestError` if it is off, or the process has ended."""
        self._log.peek(into)

    @property
    def _log(self) -> DirtyTracker:
        if self._tracker is None:
            raise GuestError("the dirty log is off; enable it before asking what is dirty")
        return self._tracker

    # Stopping

    def suspend(self) -> None:
        """Stop every thread of the process, and make sure that its memory is what it was at the start.

        Raises `GuestError` if it has ended, may not be traced, or mapped or unmapped memory meanwhile.
        """
        self._tracer.stop()
        now = self._select(read_mappings(self.pid))
        if [(each.start, each.end) for each in now] != [(each.start, each.end) for each in self._mappings]:
            self._tracer.resume()
            raise self._changed(now)

    def _changed(self, now: Sequence[Mapping]) -> GuestError:
        before = {(each.start, each.end) for each in self._mappings}
        after = {(each.start, each.end) for each in now}
        start, end = min(before ^ after)
        return GuestError(
            f"process {self.pid} mapped or unmapped memory while it was saved, first at {start:#x}-{end:#x}; "
            f"stop it before (kill -STOP {self.pid}, later kill -CONT), or name memory that stays with range="
        )

    def resume(self) -> None:
        """Let the process run on. Raises `GuestError` if it was stopped no longer."""
        self._tracer.resume()

    @property
    def suspended(self) -> bool:
        """Whether the process is stopped by us, and nobody else can let it run."""
        return self._tracer.holds

    def close(self) -> None:
        """Leave the process as it was. Closing twice is harmless."""
        self.disable_dirty_log()
        self._tracer.close()
        if self._uffd is not None:
            os.close(self._uffd)
            self._uffd = None


def _own_mapping(pid: int, mapping: Mapping) -> memoryview | None:
    """Return our own view of a mapping that shares its pages with a file, ``None`` for any other."""
    if not mapping.shared_file:
        return None
    length = mapping.end - mapping.start
    with contextlib.suppress(OSError, ValueError):  # it may take CAP_SYS_ADMIN; reading the process does not
        fd = os.open(f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if mapping.offset + length <= os.fstat(fd).st_size:  # else there is no memory behind its end
                own = mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ, offset=mapping.offset)
                return memoryview(own)
        finally:
            os.close(fd)
    return None
