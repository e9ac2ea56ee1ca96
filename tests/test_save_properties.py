"""The save engine by properties: whatever its guest, callbacks and receiver do, the guest is not lost."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from migstream.bitmap import PfnBitmap
from migstream.engines.channel import ChannelError, read_dirty_pfn_list, send_dirty_pfn_list
from migstream.engines.common import StreamType
from migstream.engines.machine import save_machine
from migstream.engines.migrate import Transport, migrate
from migstream.engines.policies import Decision
from migstream.engines.restore import RestoreCallbacks, restore
from migstream.engines.save import SaveCallbacks, SaveError, save
from migstream.errors import DeadlineError, GuestError, MigstreamError, StreamError
from migstream.guests.compare import content_equal
from migstream.guests.model import ModelGuest
from migstream.io import reader
from migstream.records import Record, libxc, libxl
from migstream.records.libxc import GuestType
from migstream.records.page_types import PageType

PAGES = 300
QUICK = settings(max_examples=25, deadline=None)
guest_types = st.sampled_from(list(GuestType))
stream_types = st.sampled_from(list(StreamType))
GO_ON = RestoreCallbacks(
    checkpoint=lambda: 1,
    postcopy=lambda: 1,
    wait_checkpoint=lambda: 1,
    suspend=lambda: 1,
    restore_results=lambda store, console: None,
)


def restored(stream: int, guest: ModelGuest, stream_type: StreamType = StreamType.PLAIN) -> ModelGuest:
    os.lseek(stream, 0, os.SEEK_SET)
    target = ModelGuest.empty(PAGES, guest.guest_type, seed=7)
    with open(os.devnull, "wb") as back:
        restore(target, stream, stream_type=stream_type, callbacks=GO_ON, send_back_fd=back.fileno())
    return target


#: What a guest may fail at: each method, at its first call or at all.
FAULTS = ("enable once", "enable", "disable", "clean", "suspend", "stop", "resume", "type", "pages", "table")
ODD = (*FAULTS, "tables change")  # as those of a busy PV guest do: that is no failure


class Faulty(ModelGuest):
    """A model that fails at what ``faults`` names."""

    faults: frozenset[str] = frozenset()
    enabled = 0

    def _fail(self, what: str) -> None:
        if what in self.faults:
            raise GuestError(f"the hypervisor does not {what}")

    def enable_dirty_log(self) -> None:
        self.enabled += 1
        if self.enabled == 1:
            self._fail("enable once")
        self._fail("enable")
        super().enable_dirty_log()

    def disable_dirty_log(self) -> None:
        self._fail("disable")
        super().disable_dirty_log()

    def clean_dirty_log(self, into: PfnBitmap) -> None:
        self._fail("clean")
        super().clean_dirty_log(into)

    def suspend(self) -> None:
        self._fail("suspend")
        if "stop" not in self.faults:
            super().suspend()

    def resume(self) -> None:
        self._fail("resume")
        super().resume()

    def page_types(self, pfns: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
        types = super().page_types(pfns)
        return np.full_like(types, 6) if "type" in self.faults else types

    def pages(  # type: ignore[override]  # the engine asks with types only
        self, pfns: npt.NDArray[np.uint64], types: npt.NDArray[np.uint8]
    ) -> tuple[Sequence[memoryview], npt.NDArray[np.bool_]]:
        if ("table" if self.suspended else "tables change") in self.faults:
            return [], np.ones(len(pfns), np.bool_)
        buffers, deferred = super().pages(pfns, types)
        return (buffers[1:] if "pages" in self.faults else buffers), deferred


@QUICK
@given(guest_types, st.booleans(), st.booleans(), st.sets(st.sampled_from(ODD), max_size=2))
@example(guest_type=GuestType.HVM, live=True, debug=False, faults={"disable"})
@example(guest_type=GuestType.PV, live=True, debug=False, faults={"tables change"})
@example(guest_type=GuestType.HVM, live=True, debug=False, faults={"stop", "resume"})
def test_a_guest_that_fails_somewhere_runs_on_and_one_that_does_not_arrives(
    guest_type: GuestType, live: bool, debug: bool, faults: set[str]
) -> None:
    guest = Faulty.booted(PAGES, guest_type)
    assert isinstance(guest, Faulty)
    guest.faults = frozenset(faults)
    with tempfile.TemporaryFile() as stream:
        try:
            result = save(guest, stream.fileno(), live=live, debug=debug)
        except GuestError as exc:
            failure: GuestError | None = exc
        else:
            failure = None
        if failure is not None:
            assert faults
            lost = any("could not be resumed" in note for note in getattr(failure, "__notes__", []))
            assert guest.suspended == lost
            assert not lost or "resume" in faults
            return
        assert guest.suspended
        assert bool(result.warnings) == ("disable" in faults and live)
        assert content_equal(guest, restored(stream.fileno(), guest))


@QUICK
@given(st.booleans(), st.sampled_from(["type", "pages", "table"]))
def test_a_guest_that_stood_still_before_still_does_behind_a_failure(live: bool, fault: str) -> None:
    guest = Faulty.booted(PAGES)
    assert isinstance(guest, Faulty)
    guest.suspend()
    guest.faults = frozenset({fault})
    with tempfile.TemporaryFile() as stream, pytest.raises(GuestError):
        save(guest, stream.fileno(), live=live)
    assert guest.suspended


class Written(ModelGuest):
    """A model whose memory somebody writes to while it stands still: ``pages`` of them."""

    written = 0

    def peek_dirty_log(self, into: PfnBitmap) -> None:
        into.clear()
        into.add(np.arange(self.written, dtype=np.uint64))


@QUICK
@given(st.integers(0, 3), st.integers(0, 2))
def test_pages_that_are_written_to_while_a_guest_stands_still_are_told_of_in_verify_mode(
    written: int, holes: int
) -> None:
    guest = Written.booted(PAGES, holes=bool(holes))
    assert isinstance(guest, Written)
    guest.written = written
    with tempfile.TemporaryFile() as stream:
        result = save(guest, stream.fileno(), live=True, debug=True, batch_size=1 << holes)
        assert any(warning.startswith(f"{written} pages were written to") for warning in result.warnings) == (
            written > 0
        )
        assert content_equal(guest, restored(stream.fileno(), guest))


@QUICK
@given(
    guest_types,
    stream_types,
    st.lists(st.sampled_from([1, 1, 1, 1, 0, -1]), min_size=12, max_size=12),
    st.sampled_from([None, 1, 0]),
    st.sampled_from(list(Decision)),
    st.booleans(),
)
def test_whatever_callbacks_answer_the_guest_arrives_as_of_the_last_checkpoint_or_runs_on(
    guest_type: GuestType,
    stream_type: StreamType,
    answers: list[int],
    suspends: int | None,
    decision: Decision,
    xen_form: bool,
) -> None:
    guest = ModelGuest.booted(PAGES, guest_type)
    script = iter([*answers, 0])

    def postcopy() -> int:
        guest.resume()
        return next(script)

    def suspend() -> int:
        if suspends:
            guest.suspend()
        return suspends or 0

    decisions = iter([decision])
    callbacks = SaveCallbacks(
        precopy_policy=lambda _: next(decisions, Decision.STOP_AND_COPY),
        suspend=None if suspends is None else suspend,
        postcopy=postcopy,
        checkpoint=lambda: next(script),
        wait_checkpoint=lambda: next(script),
    )
    empty_list = libxc.RecordHeader(type=libxc.CheckpointDirtyPfnList.code, length=0).build()
    with tempfile.TemporaryFile() as stream, tempfile.TemporaryFile() as back:
        back.write((empty_list + bytes(8) * xen_form) * 20)
        back.seek(0)
        try:
            result = save(
                guest,
                stream.fileno(),
                live=True,
                stream_type=stream_type,
                callbacks=callbacks,
                recv_fd=back.fileno(),
                xen_back_channel=xen_form,
                bandwidth_limit=1e12,
                timeout_s=20,
            )
        except SaveError:
            assert -1 in answers or 0 in answers or suspends == 0 or decision is Decision.ABORT
            assert not guest.suspended
            return
        assert decision is not Decision.ABORT
        assert result.to_json()["stream_type"] == stream_type.value
        assert guest.suspended == (stream_type is StreamType.PLAIN)
        assert (result.checkpoints > 0) == stream_type.checkpointed
        if not guest.suspended:
            guest.suspend()  # frames become PFNs again, as they are in the stream
        assert content_equal(guest, restored(stream.fileno(), guest, stream_type))


@QUICK
@given(
    stream_types,
    st.sets(st.sampled_from(["checkpoint", "wait_checkpoint", "recv_fd"])),
    st.integers(-1, 1025),
)
def test_arguments_that_do_not_fit_are_refused_before_anything_is_written(
    stream_type: StreamType, given: set[str], batch_size: int
) -> None:
    guest = ModelGuest.booted(PAGES)
    made = {name: lambda: 0 for name in given if name != "recv_fd"}
    needed = {StreamType.PLAIN: set(), StreamType.REMUS: {"checkpoint"}}.get(
        stream_type, {"checkpoint", "wait_checkpoint", "recv_fd"}
    )
    fits = needed <= given and 1 <= batch_size <= 1 << 20
    with tempfile.TemporaryFile() as stream:
        refused = contextlib.nullcontext() if fits else pytest.raises(ValueError, match=r"needs|PFNs, not")
        with refused, contextlib.suppress(SaveError):  # COLO's checkpoint callback may not answer 0
            save(
                guest,
                stream.fileno(),
                stream_type=stream_type,
                callbacks=SaveCallbacks(**made),  # type: ignore[arg-type]  # by name
                recv_fd=0 if "recv_fd" in given else None,
                batch_size=batch_size,
            )
        assert (os.fstat(stream.fileno()).st_size > 0) == fits


@QUICK
@given(st.sampled_from(["gone", "full", "silent"]), st.booleans())
def test_a_receiver_that_takes_no_more_is_told_of_by_what_became_of_it(how: str, live: bool) -> None:
    guest = ModelGuest.booted(4096, holes=False)
    readable, writable = os.pipe()
    if how == "gone":
        os.close(readable)
    if how == "full":
        os.close(writable)
        writable = os.open("/dev/full", os.O_WRONLY)
    expected = {"gone": "closed the stream", "full": "cannot be written", "silent": "stopped reading"}[how]
    kind = DeadlineError if how == "silent" else ChannelError
    with pytest.raises(kind, match=expected):
        save(guest, writable, live=live, timeout_s=0.01)
    assert os.get_blocking(writable)
    assert not guest.suspended
    os.close(writable)
    if how != "gone":
        os.close(readable)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(list(Transport)), guest_types, st.booleans())
def test_every_transport_delivers_or_tells_which_end_failed_first(
    transport: Transport, guest_type: GuestType, fits: bool
) -> None:
    source = ModelGuest.booted(PAGES, guest_type)
    target = ModelGuest.empty(PAGES if fits else 100, guest_type)
    ends = (lambda fd, _: save(source, fd, live=True), lambda fd, _: restore(target, fd))
    if fits:
        migrate(source, *ends, transport=transport)
        assert content_equal(source, target)
    else:
        with pytest.raises(StreamError):
            migrate(source, *ends, transport=transport)
        assert not source.suspended


# The back channel


@QUICK
@given(st.sets(st.integers(0, 1 << 20)), st.booleans())
def test_a_dirty_list_arrives_and_a_pfn_beyond_the_guest_is_refused(pfns: set[int], small: bool) -> None:
    sent, received = PfnBitmap((1 << 20) + 1), PfnBitmap(1 << 19 if small else (1 << 20) + 1)
    sent.add(np.array(sorted(pfns), np.uint64))
    with tempfile.TemporaryFile() as channel:
        assert send_dirty_pfn_list(channel.fileno(), sent) == len(pfns)
        channel.seek(0)
        if any(pfn >= received.size for pfn in pfns):
            with pytest.raises(StreamError, match="is beyond the guest"):
                read_dirty_pfn_list(channel.fileno(), received)
        else:
            assert read_dirty_pfn_list(channel.fileno(), received) == len(pfns)
            assert len(received) == len(pfns)


def test_a_dirty_list_that_no_record_can_hold_is_not_sent() -> None:
    dirty = PfnBitmap((1 << 24) + 1)
    dirty.fill()
    with tempfile.TemporaryFile() as channel:
        with pytest.raises(ValueError, match="16777217 dirty PFNs do not fit a record"):
            send_dirty_pfn_list(channel.fileno(), dirty)
        assert os.fstat(channel.fileno()).st_size == 0


@QUICK
@given(st.sampled_from([0x0F, 0x0E]), st.integers(0, 40), st.integers(0, 60), st.booleans())
def test_whatever_comes_on_the_back_channel_is_a_list_or_an_error(
    code: int, length: int, sent: int, xen_form: bool
) -> None:
    octets = libxc.RecordHeader(type=code, length=length).build() + bytes(60)
    with tempfile.TemporaryFile() as channel:
        channel.write(octets[:sent])
        channel.seek(0)
        try:
            count = read_dirty_pfn_list(channel.fileno(), PfnBitmap(8), xen_form=xen_form)
        except StreamError:
            assert code != 0x0F or length % 8 or sent < 8 + 8 * xen_form + length
        else:
            assert (code, 8 * count) == (0x0F, length)


# Machines with an emulator


class Emulated(ModelGuest):
    """A model with an emulator."""

    emulator_state = b""
    faults: frozenset[str] = frozenset()

    def resume(self) -> None:
        if "resume" in self.faults:
            raise GuestError("the hypervisor does not resume")
        super().resume()

    def notes(self) -> Sequence[str]:
        return ["its disks stay here"]

    def emulator_records(self) -> Sequence[Record]:
        if "state" in self.faults:
            raise GuestError("the emulator does not answer")
        return [libxl.EmulatorContext(emulator_id=2, index=0, emulator_ctx=self.emulator_state)]


@settings(max_examples=15, deadline=None)
@given(stream_types, st.binary(min_size=1, max_size=99), st.booleans(), st.integers(1, 3), st.booleans())
def test_an_emulators_state_goes_with_each_state_of_its_machine(
    stream_type: StreamType, state: bytes, live: bool, rounds: int, asks: bool
) -> None:
    guest = Emulated.booted(PAGES)
    assert isinstance(guest, Emulated)
    guest.emulator_state = state
    answers = iter([1] * (rounds - 1) + [0])

    def postcopy() -> int:
        guest.resume()
        return 1

    callbacks = SaveCallbacks(
        checkpoint=lambda: next(answers), wait_checkpoint=lambda: 0, postcopy=postcopy if asks else None
    )
    with tempfile.TemporaryFile() as stream:
        if stream_type is StreamType.COLO:
            with pytest.raises(GuestError, match="cannot be COLO's primary"):
                save_machine(guest, stream.fileno(), stream_type=stream_type, callbacks=callbacks, recv_fd=0)
            return
        result = save_machine(guest, stream.fileno(), live=live, stream_type=stream_type, callbacks=callbacks)
        assert result.octets == os.fstat(stream.fileno()).st_size
        assert result.notes == ["its disks stay here"]
        assert result.checkpoints == (rounds if stream_type is StreamType.REMUS else 0)
        stream.seek(0)
        contexts = [
            frame.record()
            for frame in reader.open(stream.fileno())
            if frame.record_class is libxl.EmulatorContext
        ]
        assert contexts == list(guest.emulator_records()) * max(1, result.checkpoints)
        if not guest.suspended:
            guest.suspend()
        assert content_equal(guest, restored(stream.fileno(), guest, stream_type))


@settings(max_examples=12, deadline=None)
@given(st.booleans(), st.booleans(), st.booleans())
def test_a_machine_whose_emulator_fails_behind_the_image_runs_on(
    live: bool, resumes: bool, ran: bool
) -> None:
    guest = Emulated.booted(PAGES)
    assert isinstance(guest, Emulated)
    if not ran:
        guest.suspend()
    guest.faults = frozenset({"state"} if resumes else {"state", "resume"})
    with (
        tempfile.TemporaryFile() as stream,
        pytest.raises(GuestError, match="emulator does not answer") as caught,
    ):
        save_machine(guest, stream.fileno(), live=live)
    notes = getattr(caught.value, "__notes__", [])
    assert guest.suspended == (not ran or not resumes)
    assert bool(notes) == (ran and not resumes)


@settings(max_examples=12, deadline=None)
@given(guest_types, st.booleans())
def test_a_machine_without_an_emulator_is_saved_as_its_image_alone(guest_type: GuestType, live: bool) -> None:
    guest = ModelGuest.booted(PAGES, guest_type)
    guest.suspend()
    with tempfile.TemporaryFile() as one, tempfile.TemporaryFile() as other:
        save_machine(guest, one.fileno(), live=live)
        save(guest, other.fileno(), live=live)
        one.seek(0)
        other.seek(0)
        assert one.read() == other.read()


def test_a_page_type_that_does_not_exist_names_its_pfn() -> None:
    guest = Faulty.booted(PAGES)
    assert isinstance(guest, Faulty)
    guest.faults = frozenset({"type"})
    assert 6 not in set(PageType)
    with (
        tempfile.TemporaryFile() as stream,
        pytest.raises(MigstreamError, match="PFN 0x0 has the page type 0x6"),
    ):
        save(guest, stream.fileno())
