"""The descriptors between two engines: sending with a rate and a deadline, COLO's back channel."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import numpy as np

from migstream.bitmap import PfnBitmap
from migstream.errors import DeadlineError, FormatError, MigstreamError, RecordRef, TruncatedError
from migstream.io import fd as fdio
from migstream.io.writer import StreamWriter
from migstream.records import (
    MAX_RECORD_LENGTH,
    Array,
    Declaration,
    Record,
    libxc,
    record_name,
)

__all__ = ["ChannelError", "SendingChannel", "TokenBucket", "read_dirty_pfn_list", "send_dirty_pfn_list"]

BURST_S = 0.05  # seconds' worth of tokens that may be saved up: evens out passes, not whole pauses
PFNS_AT_ONCE = 1 << 16  # of a dirty list: 512 KiB, however long it is
_RECEIVER_GONE = {errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ESHUTDOWN}


class ChannelError(MigstreamError):
    """The descriptor that a stream is written to takes no more: its reader is gone, or it is full."""


class TokenBucket:
    """Holds a rate of ``octets_per_s``: `take` sleeps, never spins, until the octets may pass.

    What is asked for passes at once and is then waited for, so a single request may be of any size.
    """

    def __init__(
        self,
        octets_per_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not octets_per_s > 0:
            raise ValueError(f"a bandwidth limit is more than 0 octets a second, not {octets_per_s:g}")
        self._rate = octets_per_s
        self._clock, self._sleep = clock, sleep
        self._tokens = 0.0
        self._filled_at = clock()

    def take(self, octets: int) -> None:
        """Take tokens for ``octets``; sleep off what was not there."""
        now = self._clock()
        earned = (now - self._filled_at) * self._rate
        self._tokens = min(self._tokens + earned, self._rate * BURST_S) - octets
        self._filled_at = now
        if self._tokens < 0:
            self._sleep(-self._tokens / self._rate)


class SendingChannel:
    """A `StreamWriter` with a bandwidth limit, and errors that say what became of the receiver.

    With ``timeout_s`` the descriptor is non-blocking while the channel is in use (for everybody who
    shares it): only then does a write come back from a receiver that stopped in the middle of it.
    """

    def __init__(
        self, fd: int, *, bandwidth_limit: float | None = None, timeout_s: float | None = None
    ) -> None:
        self._writer = StreamWriter(fd, timeout_s=timeout_s)
        self._bucket = TokenBucket(bandwidth_limit) if bandwidth_limit is not None else None
        self._unblocked = timeout_s is not None and os.get_blocking(fd)
        if self._unblocked:
            os.set_blocking(fd, False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._unblocked:
            os.set_blocking(self._writer.fd, True)

    @property
    def written(self) -> int:
        """Octets written so far."""
        return self._writer.written

    def header(self, *headers: Declaration) -> None:
        """Write headers, all at once."""
        with self._sending():
            self._writer.header(*headers)

    def records(self, records: Iterable[Record]) -> None:
        """Write small records."""
        for record in records:
            with self._sending():
                self._writer.record(record)

    def pages(self, entries: Array[int], pages: Sequence[memoryview]) -> int:
        """Write one PAGE_DATA record, as `StreamWriter.pages`; return its octets."""
        with self._sending():
            before = self.written
            self._writer.pages(entries, pages)
            return self.written - before

    @contextmanager
    def _sending(self) -> Iterator[None]:
        before = self.written
        try:
            yield
        except DeadlineError as exc:
            raise DeadlineError(f"the receiver stopped reading after {before} octets: {exc}") from None
        except OSError as exc:
            if exc.errno in _RECEIVER_GONE:
                raise ChannelError(
                    f"the receiver closed the stream after {before} octets; its own message says why"
                ) from exc
            raise ChannelError(f"the stream cannot be written after {before} octets: {exc.strerror}") from exc
        if self._bucket is not None:
            self._bucket.take(self.written - before)


def read_dirty_pfn_list(
    fd: int, into: PfnBitmap, *, xen_form: bool = False, timeout_s: float | None = None
) -> int:
    """Read a CHECKPOINT_DIRTY_PFN_LIST record from COLO's back channel into a bitmap; return its entries.

    Xen's own restore writes the record with a header of 16 octets, the last 8 of them zero, where the
    specification has 8 (xg_sr_restore.c, send_checkpoint_dirty_pfn_list); ``xen_form`` reads it so.
    Raises `TruncatedError`, and `FormatError` for another record, a length that is no multiple of 8, or
    a PFN beyond the guest. Source: xg_sr_save.c, colo_merge_secondary_dirty_bitmap.
    """
    wanted = libxc.CheckpointDirtyPfnList
    head_size = libxc.RecordHeader.head_size
    head = libxc.RecordHeader.parse(_exactly(fd, head_size, timeout_s))
    ref = RecordRef(0, record_name("libxc", head.type))
    if head.type != wanted.code:
        raise _refusal(f"expected {wanted.type} on the back channel, found {ref.type}", ref, 0)
    if head.length % 8 or head.length > MAX_RECORD_LENGTH:
        limit = f"a multiple of 8, at most {MAX_RECORD_LENGTH}"
        raise _refusal(f"the list is {head.length} octets long; expected {limit}", ref, 4)
    if xen_form:
        _exactly(fd, 8, timeout_s)
    left = head.length // 8
    while left:
        count = min(left, PFNS_AT_ONCE)
        pfns = np.frombuffer(_exactly(fd, 8 * count, timeout_s), "<u8").astype(np.uint64)
        if int(pfns.max()) >= into.size:
            found = int(pfns[pfns >= into.size][0])
            raise _refusal(f"PFN {found:#x} is beyond the guest, which ends below {into.size:#x}", ref, 8)
        into.add(pfns)
        left -= count
    return head.length // 8


def send_dirty_pfn_list(fd: int, dirty: PfnBitmap, *, timeout_s: float | None = None) -> int:
    """Write ``dirty`` as a CHECKPOINT_DIRTY_PFN_LIST record to COLO's back channel; return its entries.

    The header has the 8 octets that the specification gives it, unlike Xen's own (`read_dirty_pfn_list`).
    Raises `BrokenPipeError` or `ConnectionError` when the primary is gone, `DeadlineError` when it does not
    read, `ValueError` for more PFNs than a record can list.
    """
    count = len(dirty)
    if 8 * count > MAX_RECORD_LENGTH:
        raise ValueError(f"{count} dirty PFNs do not fit a record of at most {MAX_RECORD_LENGTH} octets")
    head = libxc.RecordHeader(type=libxc.CheckpointDirtyPfnList.code, length=8 * count).build()
    fdio.write_vectors(fd, [head], timeout_s)
    for pfns in dirty.batches(PFNS_AT_ONCE):
        fdio.write_vectors(fd, [pfns.astype("<u8").data.cast("B")], timeout_s)
    return count


def _exactly(fd: int, length: int, timeout_s: float | None) -> bytes:
    octets = fdio.read(fd, length, timeout_s)
    if len(octets) < length:
        raise TruncatedError(
            f"the back channel ends: expected {length} octets more, found {len(octets)}", layer="libxc"
        )
    return octets


def _refusal(message: str, record: RecordRef, offset: int) -> FormatError:
    return FormatError(message, offset=offset, layer="libxc", record=record, hint="offsets are the record's")
