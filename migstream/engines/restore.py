"""The restore engine: a stream from a descriptor into a guest.

Theory of operation. Records are applied as they come, until the first CHECKPOINT. From there on a stream
describes one state after the other, and half of one must never reach the guest, so records wait:

    headers                   version, byte order, guest type, page size
    records                   applied one by one
    |  plain: END             complete: processors, frames, rings
    +> CHECKPOINT             checkpoint callback; what waits is applied, then (COLO) the guest runs:
       |                      complete, restore_results, postcopy, wait_checkpoint, suspend, dirty list sent
       records                wait, unread
       CHECKPOINT             and so on
       END, or no more input  what waits is dropped; complete (Remus) and done

A failure to *read* before the first checkpoint is an error; after it, it means that the sender is gone,
and the guest lives on from the last complete checkpoint: `Outcome.FAILED_OVER`. A record that is *wrong*
is an error always, and so is what a callback or the target refuses.

A libxl stream or an xl file around the image is unwrapped. There a checkpoint is complete at libxl's
CHECKPOINT_END, and a plain stream at libxl's END, after the emulator's state; a target that is a
`TakesEmulator` is given that last of all.

The order of checks and callbacks is that of ``xc_domain_restore`` (tools/libs/guest/xg_sr_restore.c);
``spec/engines.md`` has it in words, with each deliberate difference and its reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from migstream.bitmap import PfnBitmap
from migstream.engines.channel import send_dirty_pfn_list
from migstream.engines.common import CheckpointAction, Missing, StreamType
from migstream.engines.progress import PassKind, Progress
from migstream.engines.restore_checks import check_headers, check_place, check_record_limit, refusal
from migstream.engines.restore_records import RecordApplier
from migstream.engines.restore_report import MISMATCHES_LISTED, LibxlRecords, Outcome, Passes, RestoreResult
from migstream.engines.restore_spill import CheckpointSpill, SpillError
from migstream.errors import DeadlineError, FormatError, GuestError, StreamError
from migstream.guests.protocols import PAGE_SIZE, RestoredRings, RestoreTarget, TakesEmulator
from migstream.io import reader
from migstream.io.reader import Frame, Layer, Stream
from migstream.layout import Layout
from migstream.records import libxc, libxl
from migstream.records.libxc import GuestType

__all__ = ["Outcome", "RestoreCallbacks", "RestoreResult", "SpillError", "read_guest_type", "restore"]

SPILL_SLACK = 256 << 20  # octets that a checkpoint's records may take beyond one copy of every page


@dataclass(frozen=True)
class RestoreCallbacks:
    """What a restore asks its caller, with the meanings of Xen's ``struct restore_callbacks`` (xenguest.h).

    ``static_data_done`` is called once, with the static data that the stream lacked, before memory comes;
    0: go on, anything else ends the restore.
    ``checkpoint`` is called at each complete checkpoint, before its records are applied: 1 to go on, 2 to
    fail over to the checkpoint before (an error at the first one), else an error. Needed by Remus and COLO.
    ``restore_results`` tells COLO's caller the PFNs of the xenstore and console rings; ``postcopy`` lets
    the guest run, ``wait_checkpoint`` waits until the primary wants the next checkpoint, ``suspend`` stops
    the guest for it: each answers 1 to go on, 2 to fail over, else an error. All needed by COLO.
    """

    static_data_done: Callable[[Missing], int] | None = None
    checkpoint: Callable[[], int] | None = None
    postcopy: Callable[[], int] | None = None
    wait_checkpoint: Callable[[], int] | None = None
    suspend: Callable[[], int] | None = None
    restore_results: Callable[[int | None, int | None], None] | None = None


def restore(
    target: RestoreTarget,
    fd: int | Stream,
    *,
    stream_type: StreamType = StreamType.PLAIN,
    callbacks: RestoreCallbacks | None = None,
    send_back_fd: int | None = None,
    timeout_s: float | None = None,
    verify_fails: bool = False,
    reset_rings: bool = False,
    spill_limit: int | None = None,
    spill_directory: str | None = None,
    libxl_record: Callable[[Frame], None] | None = None,
    progress: Progress | None = None,
    result: RestoreResult | None = None,
) -> RestoreResult:
    """Make ``target`` from the stream on the descriptor ``fd``, and return what was done.

    The descriptor stays the caller's, and behind a stream's last record nothing is read from it. An open
    `Stream` may be given instead, of which nothing but headers was read; it is not closed.

    ``send_back_fd`` is COLO's back channel. ``timeout_s`` bounds each wait for the sender.
    ``verify_fails`` makes pages that differ in verify mode an error at END. ``reset_rings`` empties the
    rings and request pages that the guest shares with its host, as Xen's restore does for a guest that is
    to run; without it memory is what the stream says. The records of a checkpoint wait in a file without
    a name in ``spill_directory``, at most ``spill_limit`` octets (default: the target's memory and 256
    MiB).
    ``libxl_record`` is given each record of a libxl stream around the image, to read as it likes.
    ``result`` is filled in instead of a new one; after an error it says how far the restore came.

    Raises `StreamError` with the place for whatever is wrong in the stream or refused by the target,
    `DeadlineError`, `SpillError`, `OSError` of a descriptor, and `ValueError` for arguments that do not
    fit together. After an error the target is not a guest that may run.
    Source: xg_sr_restore.c, xc_domain_restore.
    """
    callbacks = callbacks or RestoreCallbacks()
    _check_arguments(stream_type, callbacks, send_back_fd)
    if spill_limit is None:
        spill_limit = (target.max_pfn + 1) * PAGE_SIZE + SPILL_SLACK
    stream = fd if isinstance(fd, Stream) else reader.open(fd, timeout_s=timeout_s)
    engine = _Restore(
        target,
        stream,
        stream_type=stream_type,
        callbacks=callbacks,
        send_back_fd=send_back_fd,
        timeout_s=timeout_s,
        verify_fails=verify_fails,
        reset_rings=reset_rings,
        make_spill=lambda: CheckpointSpill(spill_limit, spill_directory),
        libxl_record=libxl_record,
        passes=Passes(progress or Progress()),
        result=result or RestoreResult(),
    )
    try:
        return engine.run()
    finally:
        if stream is not fd:
            stream.close()


def read_guest_type(stream: Stream) -> GuestType:
    """Read on to the headers of the libxc image, and return whose it is. `restore` goes on from there.

    Raises `StreamError` for a stream without one, or of a type that does not exist.
    """
    for item in stream.items():
        domain = item.header(libxc.DomainHeader) if isinstance(item, Layer) else None
        if domain is None:
            continue
        if domain.type not in set(GuestType):
            message = f"expected the guest type 1 (PV) or 2 (HVM), found {domain.type}"
            raise FormatError(message, offset=stream.position - 16, layer="libxc", field="type")
        return GuestType(domain.type)
    raise FormatError("the stream ends without a libxc image", offset=stream.position)


def _check_arguments(stream_type: StreamType, callbacks: RestoreCallbacks, send_back_fd: int | None) -> None:
    needed = ["checkpoint"] if stream_type.checkpointed else []
    if stream_type is StreamType.COLO:
        needed += ["restore_results", "postcopy", "wait_checkpoint", "suspend"]
    for name in needed:
        if getattr(callbacks, name) is None:
            raise ValueError(f"a restore of type {stream_type.value} needs a {name} callback")
    if stream_type is StreamType.COLO and send_back_fd is None:
        raise ValueError("a restore of type colo needs send_back_fd, its back channel")


class _FailOver(Exception):  # noqa: N818 - no error: the way from a broken channel to the end
    """The sender is gone, or a callback says so; the last complete checkpoint counts."""


class _Restore:
    """One restore under way."""

    def __init__(
        self,
        target: RestoreTarget,
        stream: Stream,
        *,
        stream_type: StreamType,
        callbacks: RestoreCallbacks,
        send_back_fd: int | None,
        timeout_s: float | None,
        verify_fails: bool,
        reset_rings: bool,
        make_spill: Callable[[], CheckpointSpill],
        libxl_record: Callable[[Frame], None] | None,
        passes: Passes,
        result: RestoreResult,
    ) -> None:
        self.target = target
        self.stream = stream
        self.stream_type = stream_type
        self.callbacks = callbacks
        self.send_back_fd = send_back_fd
        self.timeout_s = timeout_s
        self.verify_fails = verify_fails
        self.reset_rings = reset_rings
        self.make_spill = make_spill
        self.passes = passes
        self.libxl = LibxlRecords(libxl_record, needed=isinstance(target, TakesEmulator))
        self.result = result
        self._applier: RecordApplier | None = None
        self._spill: CheckpointSpill | None = None  # there from the first checkpoint on
        self._ended = False

    def run(self) -> RestoreResult:
        started = time.monotonic()
        try:
            try:
                self._receive()
            except _FailOver as reason:
                self.result.result = Outcome.FAILED_OVER
                self.result.failover_reason = str(reason)
                self._complete_last()
            self.passes.close()
            self._hand_over()
        finally:
            if self._spill is not None:
                self._spill.close()
            self._report()
            self.result.seconds = time.monotonic() - started
        return self.result

    def _receive(self) -> None:
        checkpoint: Frame | None = None  # met, but libxl's share of it is not complete
        for frame in self._frames():
            kind = frame.record_class
            if frame.layer.name == "libxl":
                with self._channel():
                    self.libxl.take(frame)
                    frame.finish()
                if kind is libxl.CheckpointEnd and checkpoint is not None:
                    self._checkpoint(checkpoint)
                    checkpoint = None
                if kind is libxl.LibxlEnd:
                    break
            elif kind is libxc.Checkpoint:
                assert self._applier is not None  # of a libxc record's image the headers came first
                check_place(frame, libxc.Checkpoint, self._applier.layout)
                with self._channel():
                    frame.finish()
                if self._bare:
                    self._checkpoint(frame)
                else:
                    checkpoint = frame
            elif kind is libxc.End:
                with self._channel():
                    frame.finish()
                self._end(frame)
                if self._bare:
                    break
            elif self._spill is not None:
                with self._channel():
                    self._spill.add(frame)
            else:
                try:
                    self._apply(frame)
                except ConnectionError as exc:  # any other OSError may be the target's
                    raise self._broken(exc) from exc
        if self._ended:
            return
        if self._spill is None:
            raise FormatError("the stream ends without a libxc image", offset=self.stream.position)
        raise _FailOver(f"the input ends behind checkpoint {self.result.checkpoints}")

    # Reading

    @property
    def _bare(self) -> bool:
        """Whether no libxl stream is around the image."""
        return self.stream.layer("libxl") is None

    def _frames(self) -> Iterator[Frame]:
        """Yield every record, its header checked; a libxc image's own headers are taken on the way."""
        if (layer := self.stream.layer("libxc")) is not None:  # who gave the stream has looked at them
            self._begin_image(layer)
        items = self.stream.items()
        while True:
            with self._channel():
                item = next(items, None)
                if isinstance(item, Frame):
                    check_record_limit(item)
            if item is None:
                return
            if isinstance(item, Frame):
                if item.layer.name != "xapi":  # a toolstack's segments, nothing for a restore
                    yield item
            elif isinstance(item, Layer) and item.name == "libxc":
                self._begin_image(item)

    @contextmanager
    def _channel(self) -> Iterator[None]:
        """Turn a failure to read into failover, once there is a checkpoint to fail over to."""
        try:
            yield
        except (StreamError, DeadlineError, OSError) as exc:
            if self._spill is not None and not self._ended:
                raise _FailOver(str(exc)) from exc
            if isinstance(exc, OSError):
                raise self._broken(exc) from exc
            raise

    def _broken(self, error: OSError) -> StreamError:
        return StreamError(f"the channel broke: {error.strerror or error}", offset=self.stream.position)

    def _begin_image(self, layer: Layer) -> None:
        if self._applier is not None:
            raise FormatError("a second libxc image: a stream has one", offset=layer.offset, layer=layer.name)
        image, _ = check_headers(layer, self.target.guest_type)
        layout = Layout(self.target.guest_type, image.version, self.stream_type.checkpointed)
        self._applier = RecordApplier(
            self.target, layout, self.callbacks.static_data_done, reset_rings=self.reset_rings
        )

    # Applying

    def _apply(self, frame: Frame) -> None:
        assert self._applier is not None
        self._applier.apply(frame)
        if frame.is_page_data:
            memory = self._applier.memory
            kind: PassKind = "checkpoint" if self._spill else "verify" if memory.verifying else "memory"
            self.passes.received(kind, memory.batch, frame.length)

    def _checkpoint(self, frame: Frame) -> None:
        """Take a complete checkpoint: ask, then apply what waited, then let COLO's guest run on it."""
        assert self.callbacks.checkpoint is not None
        self._ask("checkpoint", self.callbacks.checkpoint, frame)
        if self._spill is None:
            self._spill = self.make_spill()
        else:
            for waiting in self._spill.frames():
                self._apply(waiting)
            self._spill.clear()
        self.libxl.commit()
        self.passes.close()
        self.result.checkpoints += 1
        if self.stream_type is StreamType.COLO:
            self._run_secondary(frame)

    def _run_secondary(self, frame: Frame) -> None:
        """Let the secondary run until the primary needs a checkpoint, then tell it what it has written."""
        callbacks = self.callbacks
        assert callbacks.restore_results is not None  # _check_arguments saw to all of them
        assert callbacks.postcopy is not None
        assert callbacks.wait_checkpoint is not None
        assert callbacks.suspend is not None
        assert self.send_back_fd is not None
        rings = self._complete(frame)
        callbacks.restore_results(rings.store_pfn, rings.console_pfn)
        self._ask("postcopy", callbacks.postcopy, frame)
        self._ask("wait_checkpoint", callbacks.wait_checkpoint, frame)
        self._ask("suspend", callbacks.suspend, frame)
        dirty = PfnBitmap(self.target.max_pfn + 1)
        try:
            self.target.clean_dirty_log(dirty)
        except GuestError as exc:
            raise self._placed(StreamError(str(exc)), frame) from exc
        try:
            send_dirty_pfn_list(self.send_back_fd, dirty, timeout_s=self.timeout_s)
        except (BrokenPipeError, ConnectionError, DeadlineError) as exc:
            raise _FailOver(f"the back channel broke: {exc}") from exc

    def _ask(self, name: str, callback: Callable[[], int], frame: Frame) -> None:
        """Make a callback; raise for what it answers, unless that is to go on."""
        answer = callback()
        if answer == CheckpointAction.CONTINUE:
            return
        if answer == CheckpointAction.FAILOVER and self._spill is not None:
            raise _FailOver(f"the {name} callback asked for it")
        if answer == CheckpointAction.FAILOVER:
            raise refusal(frame, f"the {name} callback asks to fail over, but no state is complete yet")
        raise refusal(frame, f"the {name} callback failed: it returned {answer}")

    # The end

    def _end(self, frame: Frame) -> None:
        """Take END. What waits since the last checkpoint is no state of the guest, and is dropped."""
        if self._spill is not None and self._spill.records:
            self.result.warnings.append(
                f"END at offset {frame.offset} comes in the middle of a checkpoint: "
                f"{self._spill.records} records were dropped"
            )
        self._check_mismatches(frame)
        self._complete_last(frame)
        self._ended = True

    def _complete_last(self, frame: Frame | None = None) -> None:
        # COLO's guest was completed at each checkpoint, and has run since.
        if not (self.stream_type is StreamType.COLO and self._spill is not None):
            self._complete(frame)

    def _complete(self, frame: Frame | None) -> RestoredRings:
        """Complete the guest at the record ``frame``, or where the input ended."""
        assert self._applier is not None
        try:
            rings = self._applier.complete()
        except GuestError as exc:
            raise self._placed(StreamError(str(exc)), frame) from exc
        except StreamError as exc:
            raise self._placed(exc, frame) from None
        self.result.store_pfn, self.result.console_pfn = rings.store_pfn, rings.console_pfn
        return rings

    def _hand_over(self) -> None:
        """Give the target what the stream has for its emulator, of the state that counts."""
        if self._spill is None or self._ended:
            self.libxl.commit()
        if isinstance(self.target, TakesEmulator):
            for record in self.libxl.complete:
                self.target.take_emulator(record)

    def _placed(self, error: StreamError, frame: Frame | None) -> StreamError:
        """Give an error that has no place that of ``frame``, or of the end of the input."""
        if error.offset is not None:
            return error
        if frame is None:
            return error.located(base=self.stream.position, layer="libxc")
        return error.located(base=frame.offset, layer="libxc", record=frame.ref)

    def _check_mismatches(self, frame: Frame) -> None:
        assert self._applier is not None
        count = len(self._applier.memory.differing)
        if self.verify_fails and count:
            first = int(next(self._applier.memory.differing.batches(1))[0])
            raise refusal(
                frame,
                f"{count} pages differ from what was sent again to verify them; the first is PFN {first:#x}",
            )

    def _report(self) -> None:
        """Fill in the result; of a restore that failed, as far as it came."""
        applier, result = self._applier, self.result
        if applier is None:
            return
        result.missing = applier.missing
        result.pages = applier.memory.pages
        result.warnings = applier.warnings + result.warnings
        result.verify_mismatch_count = len(applier.memory.differing)
        result.verify_mismatches = next(
            applier.memory.differing.batches(MISMATCHES_LISTED), result.verify_mismatches
        )
        result.libxl_records = self.libxl.complete
