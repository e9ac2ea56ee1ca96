"""The restore engine by properties: callbacks' answers, limits, what breaks and what a target refuses."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Iterable, Iterator
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from migstream.bitmap import PfnBitmap
from migstream.engines.common import StreamType
from migstream.engines.restore import (
    Outcome,
    RestoreCallbacks,
    RestoreResult,
    SpillError,
    read_guest_type,
    restore,
)
from migstream.errors import GuestError, MigstreamError, StreamError
from migstream.guests.compare import content_equal
from migstream.guests.model import ModelGuest
from migstream.guests.protocols import RestoredRings
from migstream.io import reader
from migstream.io.inputs import MemoryInput
from migstream.io.reader import Frame, Stream
from migstream.records import Record
from migstream.records.libxc import GuestType
from migstream.testing import N_PAGES, streams
from spec.vectors.checkpoints import STATE
from spec.vectors.words import (
    CHECKPOINT_COMPLETE,
    CHECKPOINTED,
    CONSOLE_PFN,
    CONTEXT_FOLLOWS,
    ENDED,
    FIRST_CHECKPOINT,
    PAGES,
    PV,
    QEMU,
    SHARED,
    STATIC,
    STORE_PFN,
    TAIL,
    TSC,
    WHOLE,
    PvGuest,
    entries,
    hvm,
    params,
    pv,
)
from tests.build import EMULATOR_CONTEXT, VERIFY, header, libxl, page, record

QUICK = settings(max_examples=60, deadline=None)
GO_ON = RestoreCallbacks(
    checkpoint=lambda: 1,
    postcopy=lambda: 1,
    wait_checkpoint=lambda: 1,
    suspend=lambda: 1,
    restore_results=lambda store, console: None,
)


def target(guest: GuestType = GuestType.HVM) -> ModelGuest:
    return ModelGuest.empty(N_PAGES, guest)


def failure_of(action: Callable[[], object]) -> MigstreamError | None:
    """Return what went wrong, if something did."""
    try:
        action()
    except MigstreamError as exc:
        return exc
    return None


# Callbacks


@QUICK
@given(
    st.sampled_from([StreamType.REMUS, StreamType.COLO]),
    st.lists(st.sampled_from([1, 1, 1, 1, 1, 1, 1, 2, 0, -1, 3]), min_size=12, max_size=12),
    st.booleans(),
)
@example(stream_type=StreamType.COLO, answers=[2] * 12, wrapped=False)
def test_the_first_callback_that_does_not_say_go_on_decides(
    stream_type: StreamType, answers: list[int], wrapped: bool
) -> None:
    """Checkpoint 1, 2 and 3, each with one callback (Remus) or four (COLO); then the sender is gone."""
    states = (FIRST_CHECKPOINT, STATE + CHECKPOINTED, STATE + CHECKPOINTED)
    octets = b"".join(states)
    if wrapped:
        octets = libxl(CONTEXT_FOLLOWS, *(state + QEMU + CHECKPOINT_COMPLETE for state in states))
    script = iter(answers)
    asked: list[tuple[str, int]] = []

    def answering(name: str) -> int:
        asked.append((name, next(script)))
        return asked[-1][1]

    callbacks = RestoreCallbacks(
        checkpoint=lambda: answering("checkpoint"),
        postcopy=lambda: answering("postcopy"),
        wait_checkpoint=lambda: answering("wait_checkpoint"),
        suspend=lambda: answering("suspend"),
        restore_results=lambda store, console: None,
    )
    result = RestoreResult()
    back_channel = os.open(os.devnull, os.O_WRONLY)
    try:
        restore(
            target(),
            reader.open_memory(octets),
            stream_type=stream_type,
            callbacks=callbacks,
            send_back_fd=back_channel,
            result=result,
        )
        failed = False
    except StreamError:
        failed = True
    finally:
        os.close(back_channel)
    name, last = asked[-1]
    assert all(answer == 1 for _, answer in asked[:-1])
    first_checkpoint = len(asked) == 1
    if last == 1:
        assert len(asked) == (12 if stream_type is StreamType.COLO else 3)
    assert failed == (last not in {1, 2} or (last == 2 and first_checkpoint))
    if not failed:
        assert result.result is Outcome.FAILED_OVER
        asks = sum(asked_name == "checkpoint" for asked_name, _ in asked)
        assert result.checkpoints == asks - (last == 2 and name == "checkpoint")
        assert [type(kept).__name__ for kept in result.libxl_records] == ["EmulatorContext"] * wrapped


@QUICK
@given(streams(), st.integers(-3, 3))
def test_static_data_done_is_asked_once_and_anything_but_0_ends_the_restore(
    octets: bytes, answer: int
) -> None:
    asked = []

    def static_data_done(missing: object) -> int:
        asked.append(missing)
        return answer

    stream = reader.open_memory(octets)
    try:
        restore(target(), stream, callbacks=RestoreCallbacks(static_data_done=static_data_done))
        done = True
    except StreamError:
        done = False
    assert len(asked) <= 1
    assert not (done and answer)


# What breaks, and what a target refuses


class Breaking(MemoryInput):
    """Octets that come until ``whole`` of them were read; then the channel is broken."""

    whole = 0

    def _check(self) -> None:
        if self.position >= self.whole:
            raise ConnectionResetError("reset by peer")

    def read(self, length: int) -> bytes:
        self._check()
        return super().read(length)

    def readv_into(self, buffers: Iterable[memoryview]) -> int:
        self._check()
        return super().readv_into(buffers)

    def splice_to(self, target: int, length: int, timeout_s: float | None = None) -> int:
        self._check()
        return super().splice_to(target, length, timeout_s)


@QUICK
@given(st.data(), st.booleans())
def test_a_channel_that_breaks_is_an_error_until_there_is_a_checkpoint_and_then_its_end(
    data: st.DataObject, wrapped: bool
) -> None:
    states = (FIRST_CHECKPOINT, STATE + CHECKPOINTED)
    octets = b"".join(states)
    if wrapped:
        octets = libxl(CONTEXT_FOLLOWS, *(state + CHECKPOINT_COMPLETE for state in states))
    source = Breaking(octets)
    source.whole = data.draw(st.integers(0, len(octets)))
    result = RestoreResult()
    arguments = {"stream_type": StreamType.REMUS, "callbacks": GO_ON, "result": result}
    failure = failure_of(lambda: restore(target(), Stream(source), **arguments))  # type: ignore[arg-type]  # by name
    if failure is None:
        assert result.result is Outcome.FAILED_OVER
        assert result.checkpoints
    else:
        assert "the channel broke: reset by peer" in str(failure)
        assert not result.checkpoints


class Reluctant(ModelGuest):
    """A target that refuses what ``refuses`` names, and takes its emulator's records."""

    refuses = ""

    def _ask(self, what: str) -> None:
        if what == self.refuses:
            raise GuestError(f"the hypervisor does not {what}")

    def apply(self, record: Record) -> None:
        self._ask("apply")
        super().apply(record)

    def complete(self) -> RestoredRings:
        self._ask("complete")
        return super().complete()

    def clean_dirty_log(self, into: PfnBitmap) -> None:
        self._ask("tell what was written")
        super().clean_dirty_log(into)

    def take_emulator(self, record: Record) -> None:
        self._ask("take over an emulator")
        self.taken = [*getattr(self, "taken", []), record]


@QUICK
@given(
    st.sampled_from(["", "apply", "complete", "tell what was written", "take over an emulator"]),
    st.sampled_from([StreamType.REMUS, StreamType.COLO]),
    st.booleans(),
)
def test_what_a_target_refuses_ends_the_restore_with_the_place(
    refuses: str, stream_type: StreamType, gone: bool
) -> None:
    octets = libxl(CONTEXT_FOLLOWS, FIRST_CHECKPOINT, QEMU, CHECKPOINT_COMPLETE)
    guest = Reluctant.empty(N_PAGES, GuestType.HVM)
    assert isinstance(guest, Reluctant)
    guest.refuses = refuses
    result = RestoreResult()
    with contextlib.ExitStack() as stack:
        readable, back_channel = os.pipe()
        stack.callback(os.close, back_channel)
        os.close(readable) if gone else stack.callback(os.close, readable)
        failure = failure_of(
            lambda: restore(
                guest,
                reader.open_memory(octets),
                stream_type=stream_type,
                callbacks=GO_ON,
                send_back_fd=back_channel,
                result=result,
            )
        )
    colo = stream_type is StreamType.COLO
    if failure is not None:
        assert f"the hypervisor does not {refuses}" in str(failure)
        assert refuses == "take over an emulator" or (
            isinstance(failure, StreamError) and failure.offset is not None
        )
    else:
        assert not refuses or (refuses == "tell what was written" and not colo)
        assert result.result is Outcome.FAILED_OVER
        assert ("back channel broke" in (result.failover_reason or "")) == (gone and colo)
        assert guest.taken == result.libxl_records
        assert len(guest.taken) == 1


@QUICK
@given(
    st.lists(st.integers(0, 40), max_size=5),
    st.integers(0, 150),
    st.integers(8, 60),
    st.booleans(),
    st.sets(st.integers(0, 4)),
)
def test_an_emulators_records_are_kept_within_limits_and_a_target_that_needs_them_gets_all_or_none(
    sizes: list[int], total: int, single: int, needed: bool, eaten: set[int]
) -> None:
    """Those that the caller reads (``eaten``, when it looks) are the caller's."""
    bodies = [bytes([2, 0, 0, 0, 0, 0, 0, 0]) + bytes([size]) * size for size in sizes]
    octets = libxl(CONTEXT_FOLLOWS, WHOLE, *(record(EMULATOR_CONTEXT, body) for body in bodies), ENDED)
    shown: list[int] = []

    def show(frame: Frame) -> None:
        if frame.length:
            if len(shown) in eaten:
                frame.skip()
            shown.append(frame.length)

    guest = Reluctant.empty(N_PAGES) if needed else target()
    left = [len(body) for at, body in enumerate(bodies) if at not in eaten]
    with (
        mock.patch("migstream.engines.restore_report.TAKEN_TOTAL", total),
        mock.patch("migstream.engines.restore_report.KEPT_TOTAL", total),
        mock.patch("migstream.engines.restore_report.KEPT_RECORD", single),
    ):
        result = RestoreResult()
        stream = reader.open_memory(octets)
        shows = show if eaten else None
        failure = failure_of(lambda: restore(guest, stream, libxl_record=shows, result=result))
    if failure is not None:
        assert needed
        assert sum(left) > total
        assert "is not taken over" in str(failure)
        return
    kept = [len(each.build()) for each in result.libxl_records]
    assert sum(kept) <= total
    assert shown == ([len(body) for body in bodies] if eaten else [])
    if needed:
        assert kept == left
        assert getattr(guest, "taken", []) == result.libxl_records
    else:
        assert all(length <= single for length in kept)


@QUICK
@given(st.sampled_from(["hvm", "pv"]), st.integers(3, 9), st.data())
def test_whose_stream_it_is_can_be_asked_before_it_is_restored(
    name: str, other: int, data: st.DataObject
) -> None:
    octets = data.draw(streams(guest=name, kind="plain"))  # type: ignore[arg-type]  # one of its names
    guest_type = GuestType[name.upper()]
    asked = reader.open_memory(octets)
    assert read_guest_type(asked) is guest_type
    first, second = target(guest_type), target(guest_type)
    restore(first, asked)
    restore(second, reader.open_memory(octets))
    assert content_equal(first, second)
    with pytest.raises(StreamError, match=f"found {other}"):
        read_guest_type(reader.open_memory(header(guest=other) + ENDED))
    with pytest.raises(StreamError, match="without a libxc image"):
        read_guest_type(reader.open_memory(libxl(ENDED)))


def test_a_vcpu_of_another_width_than_the_guest_turns_out_to_have_is_refused() -> None:
    words = PvGuest(4)
    early = PV.basic()  # a 64-bit vCPU: nothing has said otherwise yet
    octets = pv(early, words.static(), words.p2m_frames(), words.memory(), TSC, SHARED, ENDED)
    with pytest.raises(StreamError, match="X86_PV_INFO came after it"):
        restore(ModelGuest.empty(4096, GuestType.PV), reader.open_memory(octets))


# Options


@QUICK
@given(st.booleans(), st.sampled_from([4, 8]), st.integers(0, 2))
def test_a_pv_guests_console_is_told_of_its_new_host_only_where_rings_are_reset(
    reset: bool, width: int, console: int
) -> None:
    guest = ModelGuest.empty(4096, GuestType.PV)
    octets = PvGuest(width, console=console).image()
    result = restore(guest, reader.open_memory(octets), reset_rings=reset)
    assert result.console_pfn == console
    ring = bytearray(guest.memory.octets[console * 4096 : (console + 1) * 4096])
    assert ring[3088] == reset
    ring[3088] = 0
    assert not any(ring)


@QUICK
@given(
    st.lists(st.tuples(st.sampled_from([STORE_PFN, CONSOLE_PFN]), st.integers(0, 4)), min_size=1, max_size=3),
    st.booleans(),
    st.integers(1, 3),
)
def test_rings_are_emptied_only_when_that_is_asked_for(
    rings: list[tuple[int, int]], reset: bool, filled: int
) -> None:
    pages = entries(*range(filled), pages=b"".join(page(7 + pfn) for pfn in range(filled)))
    guest = target()
    octets = hvm(STATIC, pages, params(*rings, (STORE_PFN, 1 << 40)), TAIL, ENDED)
    restore(guest, reader.open_memory(octets), reset_rings=reset)
    emptied = {pfn: kind for kind, pfn in sorted(rings, reverse=True) if pfn < filled} if reset else {}
    emptied |= {1: STORE_PFN} if reset and filled > 1 and 1 not in emptied else {}  # TAIL's own
    for pfn in range(filled):
        memory = bytearray(guest.memory.octets[pfn * 4096 : (pfn + 1) * 4096])
        if pfn in emptied:
            memory[3088] = 0  # the console's connection flag
            assert not any(memory)
        else:
            assert set(memory) == {7 + pfn}


@QUICK
@given(st.lists(st.booleans(), min_size=2, max_size=2), st.booleans())
def test_pages_that_differ_behind_verify_are_told_and_fail_the_restore_where_asked(
    differs: list[bool], fails: bool
) -> None:
    again = entries(0, 1, pages=b"".join(page(9 if other else 1 + pfn) for pfn, other in enumerate(differs)))
    octets = hvm(STATIC, PAGES, record(VERIFY), again, TAIL, ENDED)
    result = RestoreResult()
    try:
        restore(target(), reader.open_memory(octets), verify_fails=fails, result=result)
        refused = False
    except StreamError:
        refused = True
    assert refused == (fails and any(differs))
    assert result.verify_mismatches.tolist() == [pfn for pfn, other in enumerate(differs) if other]


@QUICK
@given(st.integers(0, 3 * 4136))
def test_a_checkpoint_may_wait_within_its_limit_and_no_further(limit: int) -> None:
    waiting = entries(1, pages=page(9)) * 3
    octets = FIRST_CHECKPOINT + waiting + CHECKPOINTED + ENDED
    arguments = {"stream_type": StreamType.REMUS, "callbacks": GO_ON, "spill_limit": limit}
    if limit >= len(waiting):
        restore(target(), reader.open_memory(octets), **arguments)  # type: ignore[arg-type]  # by name
        return
    with pytest.raises(SpillError, match=f"more than {limit} octets"):
        restore(target(), reader.open_memory(octets), **arguments)  # type: ignore[arg-type]  # by name


@contextlib.contextmanager
def files_of_at_most(octets: int) -> Iterator[None]:
    """Let no file grow beyond ``octets``, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (octets, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@QUICK
@given(st.integers(0, 3 * 4120 - 1))
def test_a_checkpoint_that_finds_no_room_to_wait_in_is_told_of_as_such(room: int) -> None:
    octets = FIRST_CHECKPOINT + entries(1, pages=page(9)) * 3 + CHECKPOINTED + ENDED
    with files_of_at_most(room), pytest.raises(SpillError, match="no room for the records of a checkpoint"):
        restore(target(), reader.open_memory(octets), stream_type=StreamType.REMUS, callbacks=GO_ON)


@given(st.sampled_from(list(StreamType)), st.sets(st.sampled_from(["checkpoint", "postcopy", "suspend"])))
def test_a_restore_without_what_its_type_needs_is_not_begun(stream_type: StreamType, given: set[str]) -> None:
    callbacks = RestoreCallbacks(**{name: lambda: 1 for name in given})  # type: ignore[arg-type]  # by name
    stream = reader.open_memory(FIRST_CHECKPOINT)
    if stream_type is StreamType.COLO or (stream_type is StreamType.REMUS and "checkpoint" not in given):
        with pytest.raises(ValueError, match=f"a restore of type {stream_type.value} needs a"):
            restore(target(), stream, stream_type=stream_type, callbacks=callbacks)
        assert stream.position == 0
    with pytest.raises(ValueError, match="needs send_back_fd"):
        restore(target(), stream, stream_type=StreamType.COLO, callbacks=GO_ON)
