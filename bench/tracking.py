"""A look for written pages against the bare ioctl that it is made of."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import struct
import time
from collections.abc import Iterator

import numpy as np

from bench.timing import Row, compare
from migstream.bitmap import PfnBitmap
from migstream.guests.process.ranges import MemoryRange
from migstream.guests.process.tracking import DirtyTracker, track

__all__ = ["rows"]

PAGE = 4096
PAGEMAP_SCAN = 0xC060_6610  # linux/fs.h
CLEAN = 3  # protect again what is reported; fail on memory that is not tracked
WRITTEN = 1 << 1


def rows(*, quick: bool = False) -> list[Row]:
    """Measure; ``quick`` on 64 MiB instead of 1 GiB. No rows where the kernel cannot track."""
    size = 64 << 20 if quick else 1 << 30
    with _tracked(size) as (memory, address, tracker):
        if tracker.name != "userfaultfd":
            print(f"no row on scans of written pages: {tracker.why}")
            return []
        return [_clean(memory, address, tracker, share) for share in (0.01, 0.5)]


@contextlib.contextmanager
def _tracked(size: int) -> Iterator[tuple[np.ndarray, int, DirtyTracker]]:
    """Yield memory of this process, uint8[pages, 4096], its address and its tracker."""
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_NOHUGEPAGE)
    memory = np.frombuffer(mapping, np.uint8).reshape(-1, PAGE)
    memory[:, 0] = 1  # all of it is there, as a machine's is
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    tracker = track(os.getpid(), [MemoryRange(address, size, 0)])
    try:
        yield memory, address, tracker
    finally:
        tracker.close()


def _clean(memory: np.ndarray, address: int, tracker: DirtyTracker, share: float) -> Row:
    chosen = np.random.default_rng(7).permutation(len(memory))[: int(len(memory) * share)]
    found = PfnBitmap(len(memory))
    runs = np.zeros((len(memory), 3), np.uint64)
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)

    def ours() -> float:
        memory[chosen, 0] += 1
        started = time.perf_counter()
        tracker.clean(found)
        seconds = time.perf_counter() - started
        assert len(found) == len(chosen)
        return seconds

    def bare() -> float:
        memory[chosen, 0] += 1
        end = address + memory.nbytes
        # fmt: off
        argument = bytearray(struct.pack(
            "=12Q", 96, CLEAN, address, end, 0, runs.ctypes.data, len(runs), 0, 0, WRITTEN, 0, WRITTEN
        ))
        # fmt: on
        started = time.perf_counter()
        fcntl.ioctl(pagemap, PAGEMAP_SCAN, argument)
        return time.perf_counter() - started

    try:
        seconds, reference, ratio = compare(ours, bare, runs=15)
    finally:
        os.close(pagemap)
    what = f"written pages of {memory.nbytes / (1 << 30):.2g} GiB, {share:.0%} of them written"
    return Row(
        f"{what}, into a bitmap, against the bare `PAGEMAP_SCAN`, times as long",
        f"{1000 * seconds:.1f} ms",
        f"{1000 * reference:.1f} ms",
        1 / ratio,
        3,
        False,
    )
