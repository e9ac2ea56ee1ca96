"""The save engine: a guest's memory and state onto a descriptor, while it runs or standing still.

Theory of operation. A save is a straight line with one loop:

    headers, static data, STATIC_DATA_END, layout records
    +-> memory: plain       suspend; every page
    |           live        log on; precopy rounds until the policy stops them; suspend; what is still dirty
    |           checkpoint  suspend; what got dirty since the last one
    |   state records
    |   plain: leave the loop
    |   CHECKPOINT, then the callbacks, of which each may end the save (0) or break it off (< 0)
    +---+
    END

The order of records and callbacks, and every check, are those of ``xc_domain_save``
(tools/libs/guest/xg_sr_save.c). What is held besides the guest: two bits a page (dirty, deferred) here, one
in the guest's own log.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt

from migstream.bitmap import PfnBitmap
from migstream.channel import ChannelError, SendingChannel, read_dirty_pfn_list
from migstream.engine import StreamType
from migstream.errors import GuestError, MigstreamError
from migstream.guests.protocols import PAGE_SIZE, SaveSource
from migstream.policies import Decision, PrecopyPolicy, PrecopyStats, xen_default
from migstream.progress import PassKind, PassReport, PassStart, Progress
from migstream.records import array_of, libxc
from migstream.records.libxc import GuestType
from migstream.records.page_types import DATA_TYPES, TYPE_SHIFT, PageType

__all__ = ["BATCH_SIZE", "MAX_BATCH_SIZE", "ChannelError", "SaveCallbacks", "SaveError", "SaveResult", "save"]

BATCH_SIZE = 1024  # PFNs in a PAGE_DATA record: MAX_BATCH_SIZE of xg_sr_common.h
MAX_BATCH_SIZE = 32_704  # PFNs whose entries and pages together stay below the longest record, 128 MiB
XEN_VERSION = (4, 14)  # the first Xen that wrote this version of the format

# Indexed by page type, whatever octet a guest may give for one.
_HAS_DATA = np.isin(np.arange(256), sorted(DATA_TYPES))
_KNOWN = np.isin(np.arange(256), list(PageType))


class SaveError(MigstreamError):
    """A save that was broken off: by its policy, or by a callback."""


@dataclass(frozen=True)
class SaveCallbacks:
    """What a save asks its caller, with the meanings of Xen's ``struct save_callbacks`` (xenguest.h).

    ``suspend`` stops the guest; 0: it failed. Default: the source's own `suspend`.
    ``precopy_policy`` is asked twice a round of a live save.
    ``postcopy`` lets the guest run on once a checkpoint is written; > 0: go on, 0: end the save without an
    error, < 0: fail. Default: the source's own `resume`.
    ``checkpoint`` is called for every checkpoint that is written: the place to wait for the receiver's
    acknowledgement and for the next interval; answers as for ``postcopy``, but in a COLO stream 0 fails
    too. Needed by Remus and COLO.
    ``wait_checkpoint`` waits until COLO needs the next checkpoint; answers as for ``postcopy``. Needed by
    COLO.
    """

    suspend: Callable[[], int] | None = None
    precopy_policy: PrecopyPolicy | None = None
    postcopy: Callable[[], int] | None = None
    checkpoint: Callable[[], int] | None = None
    wait_checkpoint: Callable[[], int] | None = None


@dataclass
class SaveResult:
    """What a save did.

    ``pages`` counts those with content, ``octets`` everything written; ``iterations`` are rounds of
    precopy. ``downtime_s`` is how long the guest stood still before it was complete in the stream, of
    a checkpointed stream up to the first checkpoint. ``ended`` says how the stream ends: behind an
    END record, or as checkpointed streams do that are ended on purpose, behind a checkpoint.
    ``warnings`` hold what went wrong without harm to the stream.
    """

    stream_type: StreamType
    pages: int = 0
    octets: int = 0
    iterations: int = 0
    checkpoints: int = 0
    seconds: float = 0.0
    downtime_s: float = 0.0
    ended: str = "end"
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, object]:
        """Return the fields, the stream type by its name."""
        return {**asdict(self), "stream_type": self.stream_type.value}


def save(
    source: SaveSource,
    fd: int,
    *,
    live: bool = False,
    stream_type: StreamType = StreamType.PLAIN,
    callbacks: SaveCallbacks | None = None,
    recv_fd: int | None = None,
    debug: bool = False,
    batch_size: int = BATCH_SIZE,
    bandwidth_limit: float | None = None,
    timeout_s: float | None = None,
    xen_version: tuple[int, int] = XEN_VERSION,
    xen_back_channel: bool = False,
    progress: Progress | None = None,
) -> SaveResult:
    """Write ``source`` to the descriptor ``fd`` as a libxc stream of version 3, and return what was done.

    A plain save leaves the guest suspended when it succeeds; checkpointed ones start live whatever
    ``live`` says, and leave the guest as the callbacks do. On any failure the dirty log is switched off
    and a guest that this save suspended is resumed, then the error goes on to the caller.

    ``recv_fd`` is COLO's back channel; ``xen_back_channel`` reads its lists in the form that Xen itself
    writes, which differs from the specification (`read_dirty_pfn_list`). ``debug`` sends all memory twice
    for the receiver to compare (plain live saves only, as in Xen). ``batch_size`` is in PFNs a PAGE_DATA
    record, ``bandwidth_limit`` in octets a second. ``timeout_s`` bounds each wait for a receiver that
    does not read. ``xen_version`` is told to the receiver, for information.

    Raises `ValueError` for arguments that do not fit together, `GuestError`, `SaveError` (policy or
    callback), `ChannelError` (the receiver is gone, the disk is full), `DeadlineError`, and `StreamError`
    for a damaged back channel. Source: xg_sr_save.c, xc_domain_save.
    """
    callbacks = callbacks or SaveCallbacks()
    _check_arguments(stream_type, callbacks, recv_fd, batch_size)
    with SendingChannel(fd, bandwidth_limit=bandwidth_limit, timeout_s=timeout_s) as channel:
        return _Save(
            source=source,
            channel=channel,
            callbacks=callbacks,
            stream_type=stream_type,
            live=live or stream_type.checkpointed,
            debug=debug,
            batch_size=batch_size,
            xen_version=xen_version,
            receive_dirty=lambda dirty: read_dirty_pfn_list(
                _required(recv_fd), dirty, xen_form=xen_back_channel, timeout_s=timeout_s
            ),
            progress=progress or Progress(),
        ).run()


def _check_arguments(
    stream_type: StreamType, callbacks: SaveCallbacks, recv_fd: int | None, batch_size: int
) -> None:
    needed = {
        "a checkpoint callback": stream_type.checkpointed and callbacks.checkpoint is None,
        "a wait_checkpoint callback": stream_type is StreamType.COLO and callbacks.wait_checkpoint is None,
        "recv_fd, its back channel": stream_type is StreamType.COLO and recv_fd is None,
    }
    for what, lacking in needed.items():
        if lacking:
            raise ValueError(f"a save of type {stream_type.value} needs {what}")
    if not 1 <= batch_size <= MAX_BATCH_SIZE:
        raise ValueError(f"a batch has 1 to {MAX_BATCH_SIZE} PFNs, not {batch_size}")


def _required(recv_fd: int | None) -> int:
    assert recv_fd is not None  # _check_arguments saw to it
    return recv_fd


@dataclass
class _Save:
    """One save under way."""

    source: SaveSource
    channel: SendingChannel
    callbacks: SaveCallbacks
    stream_type: StreamType
    live: bool
    debug: bool
    batch_size: int
    xen_version: tuple[int, int]
    receive_dirty: Callable[[PfnBitmap], int]
    progress: Progress

    def __post_init__(self) -> None:
        size = self.source.max_pfn + 1
        self.dirty = PfnBitmap(size)
        self.deferred = PfnBitmap(size)
        self.result = SaveResult(self.stream_type)
        self.passes = 0
        self.sending_s = 0.0
        self.logging = False
        self.ran_before = not self.source.suspended
        self.log_taken_at = self.stopped_at = 0.0

    def run(self) -> SaveResult:
        started = time.monotonic()
        try:
            self._write_stream()
        except BaseException as failure:
            self._stop_log(failure)
            self._give_back(failure)
            raise
        self._stop_log(None)
        self.result.octets = self.channel.written
        self.result.seconds = time.monotonic() - started
        return self.result

    def _stop_log(self, failure: BaseException | None) -> None:
        """Switch the dirty log off; that it fails is told, but spoils nothing (as in Xen)."""
        if self.logging:
            self._harmless(self.source.disable_dirty_log, "the dirty log could not be switched off", failure)

    def _give_back(self, failure: BaseException) -> None:
        """Let the guest run on here: its stream is not complete, so nobody else can own it."""
        if self.ran_before and self.source.suspended:
            self._harmless(self.source.resume, "the guest could not be resumed", failure)

    def _harmless(self, action: Callable[[], None], trouble: str, failure: BaseException | None) -> None:
        try:
            action()
        except (MigstreamError, OSError) as exc:
            if failure is None:
                self.result.warnings.append(f"{trouble}: {exc}")
            else:
                failure.add_note(f"{trouble}: {exc}")

    # The stream

    def _write_stream(self) -> None:
        source, channel = self.source, self.channel
        major, minor = self.xen_version
        channel.header(
            libxc.ImageHeader(),
            libxc.DomainHeader(type=source.guest_type, xen_major=major, xen_minor=minor),
        )
        channel.records(source.static_records())
        channel.records([libxc.StaticDataEnd()])
        channel.records(source.layout_records())
        send_memory = self._send_live if self.live else self._send_stopped
        while True:
            send_memory()
            self._check_suspended()
            channel.records(source.state_records())
            if not self.stream_type.checkpointed:
                break
            send_memory = self._send_checkpoint
            if not self._checkpoint():
                self.result.ended = "checkpoint"
                return
        channel.records([libxc.End()])
        self.result.downtime_s = time.monotonic() - self.stopped_at

    def _checkpoint(self) -> bool:
        """Write a CHECKPOINT record and ask whether there shall be another one."""
        self.channel.records([libxc.Checkpoint()])
        self.result.checkpoints += 1
        if self.result.checkpoints == 1:
            self.result.downtime_s = time.monotonic() - self.stopped_at
        callbacks = self.callbacks
        if self.stream_type is StreamType.COLO:
            if not self._ask("checkpoint", callbacks.checkpoint):
                raise SaveError("the checkpoint callback failed: it answered 0")
            return self._ask("postcopy", callbacks.postcopy or self._resume) and self._ask(
                "wait_checkpoint", callbacks.wait_checkpoint
            )
        return self._ask("postcopy", callbacks.postcopy or self._resume) and self._ask(
            "checkpoint", callbacks.checkpoint
        )

    def _ask(self, name: str, callback: Callable[[], int] | None) -> bool:
        assert callback is not None  # _check_arguments saw to it
        answer = callback()
        if answer < 0:
            raise SaveError(f"the {name} callback failed: it answered {answer}")
        return answer > 0

    def _resume(self) -> int:
        self.source.resume()
        return 1

    # Memory

    def _send_stopped(self) -> None:
        self._suspend()
        self.dirty.fill()
        self._send_pass("memory", self.dirty.size)

    def _send_live(self) -> None:
        self._start_log()
        self._precopy()
        self._suspend_and_send_dirty("stop-and-copy")
        if self.debug and self.stream_type is StreamType.PLAIN:
            self._send_to_compare()

    def _send_checkpoint(self) -> None:
        self._suspend_and_send_dirty("checkpoint")

    def _precopy(self) -> None:
        """Send pages while the guest runs. As Xen does, pages that the policy saw are sent when it stops."""
        policy = self.callbacks.precopy_policy or xen_default
        self.dirty.fill()
        stats = PrecopyStats(0, 0, self.dirty.size)
        dirty_count = stats.dirty_count
        while True:
            decision = policy(stats)
            if dirty_count and decision is not Decision.ABORT:
                self._send_pass("precopy", dirty_count, stats.dirty_rate)
            if decision is not Decision.CONTINUE_PRECOPY:
                break
            self.result.iterations += 1
            written = stats.total_written + dirty_count
            stats = PrecopyStats(self.result.iterations, written, -1, self._bandwidth, None)
            decision = policy(stats)
            if decision is not Decision.CONTINUE_PRECOPY:
                break
            dirty_count, dirty_rate = self._take_log()
            stats = PrecopyStats(self.result.iterations, written, dirty_count, self._bandwidth, dirty_rate)
        if decision is Decision.ABORT:
            raise SaveError(
                f"the policy broke the save off after {self.result.iterations} rounds of precopy, "
                f"{stats.total_written} pages written"
            )

    def _suspend_and_send_dirty(self, kind: PassKind) -> None:
        self._suspend()
        dirty_count, dirty_rate = self._take_log()
        dirty_count += len(self.deferred)
        self.dirty |= self.deferred
        if kind == "checkpoint" and self.stream_type is StreamType.COLO:
            self.receive_dirty(self.dirty)
        self.deferred.clear()
        self._send_pass(kind, dirty_count, dirty_rate)

    def _send_to_compare(self) -> None:
        self.channel.records([libxc.Verify()])
        self.dirty.fill()
        self._send_pass("verify", self.dirty.size)
        self.source.peek_dirty_log(self.dirty)
        if written_to := len(self.dirty):
            self.result.warnings.append(f"{written_to} pages were written to while the guest was suspended")

    def _send_pass(self, kind: PassKind, expected: int, dirty_rate: float | None = None) -> None:
        """Send what is in ``self.dirty``; ``expected`` is how many PFNs that should be, for the display."""
        downtime_s = None if self._bandwidth is None else expected * PAGE_SIZE / self._bandwidth
        self.progress.begin(PassStart(kind, self.passes, expected, dirty_rate, downtime_s))
        started, before, entries = time.monotonic(), self.channel.written, 0
        for pfns in self.dirty.batches(self.batch_size):
            octets = self._send_batch(pfns)
            entries += len(pfns)
            self.progress.advance(len(pfns), octets)
        seconds = time.monotonic() - started
        octets = self.channel.written - before
        self.sending_s += seconds
        self.progress.end(PassReport(kind, self.passes, entries, octets, seconds, dirty_rate, downtime_s))
        self.passes += 1

    def _send_batch(self, pfns: npt.NDArray[np.uint64]) -> int:
        """Write one PAGE_DATA record; return its octets. A batch without any page is written as well."""
        types = self.source.page_types(pfns)
        _check_types(pfns, types)
        if self.source.guest_type is GuestType.PV and not self.source.suspended:
            # A PFN without a frame may get one before the end, which no log tells (Xen: INVALID_MFN).
            self.deferred.add(pfns[types == PageType.XTAB])
        has_data = _HAS_DATA[types]
        pages: list[memoryview] = []
        if has_data.any():
            wanted = pfns[has_data]
            buffers, waiting = self.source.pages(wanted, types[has_data])
            pages = list(buffers)
            count = len(wanted)
            if waiting.any():
                self._defer_waiting(wanted[waiting])
                types = types.copy()
                types[np.flatnonzero(has_data)[waiting]] = PageType.XTAB
                count -= int(np.count_nonzero(waiting))
            _check_octets(pages, count, pfns)
            self.result.pages += count
        entries = (types.astype(np.uint64) << np.uint64(TYPE_SHIFT)) | pfns
        return self.channel.pages(array_of(8, entries), pages)

    def _defer_waiting(self, pfns: npt.NDArray[np.uint64]) -> None:
        if self.source.suspended:
            raise GuestError(
                f"the page table at PFN {int(pfns[0]):#x} cannot be read although the guest is suspended"
            )
        self.deferred.add(pfns)

    # The guest

    def _suspend(self) -> None:
        self.stopped_at = time.monotonic()
        if self.callbacks.suspend is None:
            self.source.suspend()
        elif self.callbacks.suspend() == 0:
            raise SaveError("the suspend callback failed: it answered 0")
        self._check_suspended()

    def _check_suspended(self) -> None:
        if not self.source.suspended:
            raise GuestError("the guest has not been suspended: it must have stopped with reason suspend")

    def _start_log(self) -> None:
        try:
            self.source.enable_dirty_log()
        except GuestError as refused:
            # It may be on already, to follow video memory: off and on again, as Xen does.
            try:
                self.source.disable_dirty_log()
                self.source.enable_dirty_log()
            except GuestError:
                raise refused from None
        self.logging = True
        self.log_taken_at = time.monotonic()

    def _take_log(self) -> tuple[int, float]:
        """Move the guest's log into ``self.dirty``; return its pages, and octets dirtied a second."""
        self.source.clean_dirty_log(self.dirty)
        now = time.monotonic()
        since, self.log_taken_at = now - self.log_taken_at, now
        count = len(self.dirty)
        return count, count * PAGE_SIZE / max(since, 1e-9)

    @property
    def _bandwidth(self) -> float | None:
        """Octets a second that the channel took, over all passes so far."""
        return self.channel.written / self.sending_s if self.sending_s > 0 else None


def _check_types(pfns: npt.NDArray[np.uint64], types: npt.NDArray[np.uint8]) -> None:
    known = _KNOWN[types]
    if not known.all():
        at = int(np.argmin(known))
        raise GuestError(f"PFN {int(pfns[at]):#x} has the page type {int(types[at]):#x}, which is unknown")


def _check_octets(pages: list[memoryview], count: int, pfns: npt.NDArray[np.uint64]) -> None:
    octets = sum(page.nbytes for page in pages)
    if octets != count * PAGE_SIZE:
        raise GuestError(
            f"the guest gave {octets} octets for {count} pages of PFNs {int(pfns[0]):#x} to "
            f"{int(pfns[-1]):#x}, not {count * PAGE_SIZE}"
        )
