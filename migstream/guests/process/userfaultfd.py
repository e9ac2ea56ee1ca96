"""Asynchronous write protection of memory by a userfaultfd, whoever opened it.

The kernel itself resolves a fault on a protected page and lets the writer go on; what remains is a mark in
the page table, which `pagemap` reads. Nobody has to answer faults, so the process cannot hang on us. Closing
the descriptor's last copy takes the protection away. Numbers: linux/userfaultfd.h (Linux 6.7 and later).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct

from migstream.errors import GuestError
from migstream.guests.process.ranges import MemoryRange

__all__ = ["UnsupportedError", "enable", "protect", "release"]

API = 0xAA
UFFDIO_API = 0xC018_AA3F  # {u64 api, features, ioctls}
UFFDIO_REGISTER = 0xC020_AA00  # {u64 start, length, mode, ioctls}
UFFDIO_UNREGISTER = 0x8010_AA01  # {u64 start, length}
UFFDIO_WRITEPROTECT = 0xC018_AA06  # {u64 start, length, mode}
MODE_WP = 2
WRITEPROTECT_ON = 1

FEATURES = {"PAGEFAULT_FLAG_WP": 1 << 0, "WP_HUGETLBFS_SHMEM": 1 << 12, "WP_UNPOPULATED": 1 << 13}
FEATURES["WP_ASYNC"] = 1 << 15

_PROTECTED_AT_A_TIME = 1 << 30  # octets for which one call holds the process's memory lock


class UnsupportedError(Exception):
    """The kernel cannot track this memory by write protection; the message says which and why."""


def enable(fd: int) -> None:
    """Ask for asynchronous protection, once for a descriptor. Raises `UnsupportedError` before Linux 6.7."""
    request = bytearray(struct.pack("=3Q", API, sum(FEATURES.values()), 0))
    try:
        fcntl.ioctl(fd, UFFDIO_API, request)
    except OSError as exc:
        raise UnsupportedError(
            f"the kernel {os.uname().release} has no asynchronous write protection ({exc.strerror}); "
            "Linux 6.7 and later have"
        ) from exc


def protect(fd: int, ranges: list[MemoryRange]) -> None:
    """Register and protect ``ranges``: each page counts as clean from here on.

    Raises `GuestError` for memory that is tracked already, `UnsupportedError` for memory that cannot be.
    """
    for each in ranges:
        try:
            fcntl.ioctl(
                fd, UFFDIO_REGISTER, bytearray(struct.pack("=4Q", each.address, each.length, MODE_WP, 0))
            )
        except OSError as exc:
            if exc.errno == errno.EBUSY:
                raise GuestError(
                    f"the memory {each} is already tracked by another userfaultfd, of another save of the "
                    "process or its own; end that first"
                ) from exc
            raise UnsupportedError(f"the memory {each} cannot be write-protected: {exc.strerror}") from exc
    for each in ranges:
        for start in range(each.address, each.end, _PROTECTED_AT_A_TIME):
            length = min(_PROTECTED_AT_A_TIME, each.end - start)
            try:
                fcntl.ioctl(
                    fd, UFFDIO_WRITEPROTECT, bytearray(struct.pack("=3Q", start, length, WRITEPROTECT_ON))
                )
            except OSError as exc:
                raise UnsupportedError(
                    f"the memory {each} cannot be write-protected: {exc.strerror}"
                ) from exc


def release(fd: int, ranges: list[MemoryRange]) -> None:
    """Take the protection off, even if somebody else holds a copy of ``fd``, and close it."""
    for each in ranges:
        with contextlib.suppress(OSError):  # not there any more: then nothing of ours is either
            fcntl.ioctl(fd, UFFDIO_UNREGISTER, bytearray(struct.pack("=2Q", each.address, each.length)))
    os.close(fd)
