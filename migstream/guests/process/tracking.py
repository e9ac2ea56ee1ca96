"""Tracking which pages of a process are written: the one way in, `track`, which chooses how.

Write protection by a userfaultfd is exact and costs the process one light fault for each page that it
writes; comparing with a copy works everywhere and costs memory and time. The first is taken where the kernel
and the permissions allow it. What the trackers see, and what not, is in docs/processes.md.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

from migstream.bitmap import PfnBitmap
from migstream.guests.memory import Memory
from migstream.guests.process import syscalls, userfaultfd
from migstream.guests.process.pagemap import PagemapScanner
from migstream.guests.process.ranges import MemoryRange, check
from migstream.guests.process.shadow import ShadowTracker
from migstream.guests.process.tracer import RefusedError, Tracer
from migstream.guests.process.userfaultfd import UnsupportedError

__all__ = ["DirtyTracker", "MemoryRange", "WriteProtectTracker", "track"]


class DirtyTracker(Protocol):
    """Which pages of a process were written since it was made, or cleaned."""

    @property
    def name(self) -> str:
        """``userfaultfd`` or ``shadow``."""

    @property
    def why(self) -> str:
        """One sentence on why this one was chosen."""

    @property
    def copy(self) -> Memory | None:
        """Where the pages to send are to be taken from, by PFN; ``None``: from the process's own memory.

        The shadow tracker's copy must be sent, for the reason that its module gives.
        """

    def clean(self, into: PfnBitmap) -> None:
        """Replace ``into`` by the PFNs written, and count each as clean, in one step. Raises `GuestError`."""

    def peek(self, into: PfnBitmap) -> None:
        """Replace ``into`` by the PFNs written, and keep them. Raises `GuestError`."""

    def close(self) -> None:
        """Stop tracking: the process is as it was. Closing twice is harmless."""


class WriteProtectTracker:
    """Tracks ``ranges`` of the process ``pid`` by the userfaultfd ``fd`` of that process, which it owns."""

    name = "userfaultfd"
    copy = None

    def __init__(self, pid: int, ranges: Sequence[MemoryRange], fd: int, why: str) -> None:
        """Start to track. Raises `GuestError` and `UnsupportedError`; ``fd`` is closed then."""
        self.why = why
        self._fd = fd
        self._ranges = list(ranges)
        try:
            self._scanner = PagemapScanner(pid, ranges)
        except OSError as exc:
            os.close(fd)
            raise syscalls.gone(pid, exc) or UnsupportedError(f"/proc/{pid}/pagemap: {exc.strerror}") from exc
        try:
            userfaultfd.enable(fd)
            userfaultfd.protect(fd, self._ranges)
        except BaseException:
            self.close()
            raise

    def clean(self, into: PfnBitmap) -> None:
        """Replace ``into`` by the PFNs written, and protect them again. Raises `GuestError`."""
        self._scanner.scan(into, clean=True)

    def peek(self, into: PfnBitmap) -> None:
        """Replace ``into`` by the PFNs written. Raises `GuestError`."""
        self._scanner.scan(into, clean=False)

    def close(self) -> None:
        """Take the protection off. Closing twice is harmless."""
        if self._fd >= 0:
            userfaultfd.release(self._fd, self._ranges)
            self._fd = -1
            self._scanner.close()


def track(
    pid: int,
    ranges: Sequence[MemoryRange],
    *,
    views: Sequence[memoryview | None] | None = None,
    uffd: int | None = None,
    tracer: Tracer | None = None,
) -> DirtyTracker:
    """Start to track writes of the process ``pid`` to ``ranges``; every page is clean from here on.

    ``views`` are own mappings of the same pages, one for each range or ``None``, with which the shadow
    tracker saves the reading. ``uffd`` is a userfaultfd that the process itself opened and handed over
    (`handover`); it is taken over. Otherwise the process is made to open one by ``tracer``, or one made here.

    Raises `GuestError`: the process has ended, its memory is tracked by somebody else, it may not be read.
    """
    check(ranges)
    try:
        if uffd is None:
            uffd, why = _open_userfaultfd(pid, tracer)
        else:
            why = "the process handed its userfaultfd over"
        return WriteProtectTracker(pid, ranges, uffd, why)
    except (UnsupportedError, RefusedError) as exc:
        return ShadowTracker(pid, ranges, views, f"memory is compared with a copy, because {exc}")


def _open_userfaultfd(pid: int, tracer: Tracer | None) -> tuple[int, str]:
    """Return a userfaultfd of the process's memory, and how it came, or raise what says why there is none."""
    _probe()
    if pid == os.getpid():
        return syscalls.userfaultfd(), "it is this process itself"
    why = "the process was made to open a userfaultfd"
    if tracer is not None:
        return tracer.userfaultfd(), why
    with Tracer(pid) as own:
        return own.userfaultfd(), why


def _probe() -> None:
    """Find out on this process whether the kernel can track, before another one is touched."""
    try:
        fd = syscalls.userfaultfd()
    except OSError as exc:
        raise UnsupportedError(f"the kernel has no userfaultfd for us: {exc.strerror}") from exc
    try:
        userfaultfd.enable(fd)
    finally:
        os.close(fd)
