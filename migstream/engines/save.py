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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace

from migstream.bitmap import PfnBitmap
from migstream.engines.channel import ChannelError, SendingChannel, read_dirty_pfn_list
from migstream.engines.common import StreamType
from migstream.engines.policies import Decision, PrecopyPolicy, PrecopyStats, xen_default
from migstream.engines.progress import PassKind, Progress
from migstream.engines.save_passes import MemoryPasses
from migstream.errors import GuestError, MigstreamError, UnsettledError
from migstream.guests.protocols import PAGE_SIZE, HasNotes, SaveSource
from migstream.records import libxc

__all__ = [
    "BATCH_SIZE",
    "MAX_BATCH_SIZE",
    "ChannelError",
    "SaveCallbacks",
    "SaveError",
    "SaveResult",
    "owning",
    "save",
]

BATCH_SIZE = 1024  # PFNs in a PAGE_DATA record: MAX_BATCH_SIZE of xg_sr_common.h
MAX_BATCH_SIZE = 32_704  # PFNs whose entries and pages together stay below the longest record, 128 MiB
XEN_VERSION = (4, 14)  # the first Xen that wrote this version of the format


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
    ``warnings`` hold what went wrong without harm to the stream, ``notes`` what the source has to say.
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
    notes: list[str] = field(default_factory=list)

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

    def receive_dirty(into: PfnBitmap) -> int:
        assert recv_fd is not None  # _check_arguments saw to it
        return read_dirty_pfn_list(recv_fd, into, xen_form=xen_back_channel, timeout_s=timeout_s)

    with SendingChannel(fd, bandwidth_limit=bandwidth_limit, timeout_s=timeout_s) as channel:
        memory = MemoryPasses(source, channel, batch_size=batch_size, progress=progress or Progress())
        engine = _Save(
            source,
            channel,
            memory,
            stream_type=stream_type,
            callbacks=callbacks,
            receive_dirty=receive_dirty,
        )
        return engine.run(live=live or stream_type.checkpointed, debug=debug, xen_version=xen_version)


@contextmanager
def owning(source: SaveSource) -> Iterator[None]:
    """Resume ``source``, if it ran before, when the block fails: for what must succeed beyond `save`.

    Not so for an `UnsettledError`: the guest may run elsewhere, and never runs twice.
    """
    ran_before = not source.suspended
    try:
        yield
    except UnsettledError:
        raise
    except BaseException as failure:
        try:
            if ran_before and source.suspended:
                source.resume()
        except MigstreamError as exc:  # a guest that is gone is not what went wrong first
            failure.add_note(f"the guest could not be resumed: {exc}")
        raise


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


class _Save:
    """One save under way."""

    def __init__(
        self,
        source: SaveSource,
        channel: SendingChannel,
        memory: MemoryPasses,
        *,
        stream_type: StreamType,
        callbacks: SaveCallbacks,
        receive_dirty: Callable[[PfnBitmap], int],
    ) -> None:
        self.source = source
        self.channel = channel
        self.memory = memory
        self.stream_type = stream_type
        self.callbacks = callbacks
        self.receive_dirty = receive_dirty
        self.result = SaveResult(stream_type)
        self._ours_to_resume = not source.suspended
        self._logging = False
        self._log_taken_at = self._stopped_at = 0.0

    def run(self, *, live: bool, debug: bool, xen_version: tuple[int, int]) -> SaveResult:
        started = time.monotonic()
        try:
            self._write_stream(xen_version, live=live, debug=debug)
        except BaseException as failure:
            self._stop_log(failure)
            self._give_back(failure)
            raise
        self._stop_log(None)
        self.result.pages = self.memory.pages
        self.result.octets = self.channel.written
        self.result.seconds = time.monotonic() - started
        if isinstance(self.source, HasNotes):
            self.result.notes += self.source.notes()
        return self.result

    def _stop_log(self, failure: BaseException | None) -> None:
        """Switch the dirty log off; that it fails is told, but spoils nothing (as in Xen)."""
        if self._logging:
            self._harmless(self.source.disable_dirty_log, "the dirty log could not be switched off", failure)

    def _give_back(self, failure: BaseException) -> None:
        """Let the guest run on here: its stream is not complete, so nobody else can own it."""
        if self._ours_to_resume:
            self._harmless(self._resume_if_suspended, "the guest could not be resumed", failure)

    def _resume_if_suspended(self) -> None:
        if self.source.suspended:
            self.source.resume()

    def _harmless(self, action: Callable[[], None], trouble: str, failure: BaseException | None) -> None:
        try:
            action()
        except (MigstreamError, OSError) as exc:
            if failure is None:
                self.result.warnings.append(f"{trouble}: {exc}")
            else:
                failure.add_note(f"{trouble}: {exc}")

    # The stream

    def _write_stream(self, xen_version: tuple[int, int], *, live: bool, debug: bool) -> None:
        source, channel = self.source, self.channel
        major, minor = xen_version
        domain = libxc.DomainHeader(type=source.guest_type, xen_major=major, xen_minor=minor)
        channel.header(libxc.ImageHeader(), domain)
        channel.records(source.static_records())
        channel.records([libxc.StaticDataEnd()])
        channel.records(source.layout_records())
        if live:
            self._send_live()
        else:
            self._send_stopped()
        if debug and live and not self.stream_type.checkpointed:
            self._send_to_compare()
        self._send_state()
        if self.stream_type.checkpointed:
            while self._checkpoint():
                self._suspend_and_send_dirty("checkpoint")
                self._send_state()
            self.result.ended = "checkpoint"
        else:
            channel.records([libxc.End()])
            self._ours_to_resume = False  # the receiver has all of it
            self.result.downtime_s = time.monotonic() - self._stopped_at

    def _send_state(self) -> None:
        self._check_suspended()
        self.channel.records(self.source.state_records())

    def _checkpoint(self) -> bool:
        """Write a CHECKPOINT record, make the callbacks, and return whether there is to be another one."""
        self.channel.records([libxc.Checkpoint()])
        self.result.checkpoints += 1
        if self.result.checkpoints == 1:
            self.result.downtime_s = time.monotonic() - self._stopped_at
        callbacks = self.callbacks
        postcopy = callbacks.postcopy or self._resume
        if self.stream_type is StreamType.REMUS:
            return _ask("postcopy", postcopy) and _ask("checkpoint", callbacks.checkpoint)
        if not _ask("checkpoint", callbacks.checkpoint):
            raise SaveError("the checkpoint callback failed: it answered 0, which ends no COLO stream")
        return _ask("postcopy", postcopy) and _ask("wait_checkpoint", callbacks.wait_checkpoint)

    def _resume(self) -> int:
        self.source.resume()
        return 1

    # Memory

    def _send_stopped(self) -> None:
        self._suspend()
        self.memory.dirty.fill()
        self.memory.send("memory", self.memory.dirty.size)

    def _send_live(self) -> None:
        self._start_log()
        self.memory.guest_runs = True
        self._precopy(self.callbacks.precopy_policy or xen_default)
        self._suspend_and_send_dirty("stop-and-copy")

    def _precopy(self, policy: PrecopyPolicy) -> None:
        """Send memory while the guest runs, until the policy has enough.

        It is asked before a pass, whose pages are sent even if it says stop, and again behind it.
        """
        memory = self.memory
        memory.dirty.fill()
        stats = PrecopyStats(iteration=0, total_written=0, dirty_count=memory.dirty.size)
        while True:
            decision = policy(stats)
            if stats.dirty_count and decision is not Decision.ABORT:
                memory.send("precopy", stats.dirty_count, stats.dirty_rate)
            if decision is not Decision.CONTINUE_PRECOPY:
                break
            self.result.iterations += 1
            stats = PrecopyStats(
                iteration=self.result.iterations,
                total_written=stats.total_written + stats.dirty_count,
                dirty_count=-1,
                bandwidth=memory.bandwidth,
            )
            decision = policy(stats)
            if decision is not Decision.CONTINUE_PRECOPY:
                break
            dirty_count, dirty_rate = self._take_log()
            stats = replace(stats, dirty_count=dirty_count, dirty_rate=dirty_rate)
        if decision is Decision.ABORT:
            raise SaveError(
                f"the policy broke the save off after {self.result.iterations} rounds of precopy, "
                f"{stats.total_written} pages written"
            )

    def _suspend_and_send_dirty(self, kind: PassKind) -> None:
        self._suspend()
        memory = self.memory
        dirty_count, dirty_rate = self._take_log()
        memory.dirty |= memory.deferred
        dirty_count += len(memory.deferred)
        if kind == "checkpoint" and self.stream_type is StreamType.COLO:
            self.receive_dirty(memory.dirty)
        memory.deferred.clear()
        memory.send(kind, dirty_count, dirty_rate)

    def _send_to_compare(self) -> None:
        memory = self.memory
        self.channel.records([libxc.Verify()])
        memory.dirty.fill()
        memory.send("verify", memory.dirty.size)
        self.source.peek_dirty_log(memory.dirty)
        if written_to := len(memory.dirty):
            self.result.warnings.append(f"{written_to} pages were written to while the guest was suspended")

    # The guest

    def _suspend(self) -> None:
        self._stopped_at = time.monotonic()
        if self.callbacks.suspend is None:
            self.source.suspend()
        elif self.callbacks.suspend() == 0:
            raise SaveError("the suspend callback failed: it answered 0")
        self._check_suspended()
        self.memory.guest_runs = False

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
        self._logging = True
        self._log_taken_at = time.monotonic()

    def _take_log(self) -> tuple[int, float]:
        """Move the guest's log into ``memory.dirty``; return its pages, and octets dirtied a second."""
        self.source.clean_dirty_log(self.memory.dirty)
        now = time.monotonic()
        since_s, self._log_taken_at = now - self._log_taken_at, now
        count = len(self.memory.dirty)
        return count, count * PAGE_SIZE / max(since_s, 1e-9)


def _ask(name: str, callback: Callable[[], int] | None) -> bool:
    assert callback is not None  # _check_arguments saw to it
    answer = callback()
    if answer < 0:
        raise SaveError(f"the {name} callback failed: it answered {answer}")
    return answer > 0
