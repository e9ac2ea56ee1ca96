"""The save engine against Xen's: the order of what it does, every check, and what a failure leaves behind."""

from __future__ import annotations

import io
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from migstream.bitmap import PfnBitmap
from migstream.engines.channel import ChannelError, TokenBucket, read_dirty_pfn_list
from migstream.engines.common import StreamType
from migstream.engines.policies import Decision, PrecopyStats
from migstream.engines.progress import JsonProgress, show
from migstream.engines.save import SaveCallbacks, SaveError, save
from migstream.errors import DeadlineError, FormatError, GuestError, TruncatedError
from migstream.io import reader
from migstream.records.libxc import GuestType
from tests.scripted_guest import ALLOCATE, BROKEN, HOLE, PAGE, Recorder, ScriptedGuest

GO, STOP, ABORT = Decision.CONTINUE_PRECOPY, Decision.STOP_AND_COPY, Decision.ABORT
STATIC = ["headers", "X86_CPUID_POLICY", "X86_MSR_POLICY", "STATIC_DATA_END"]
STATE = ["X86_TSC_INFO", "HVM_CONTEXT", "HVM_PARAMS"]


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    fd = os.open(tmp_path / "stream", os.O_RDWR | os.O_CREAT)
    yield Recorder(fd)
    os.close(fd)


@pytest.fixture
def guest(recorder: Recorder) -> ScriptedGuest:
    return ScriptedGuest(recorder)


def noted_policy(
    recorder: Recorder, decide: Callable[[PrecopyStats], Decision]
) -> Callable[[PrecopyStats], Decision]:
    def policy(stats: PrecopyStats) -> Decision:
        recorder.note(f"policy {stats.iteration} {stats.total_written} {stats.dirty_count}")
        return decide(stats)

    return policy


def always(decision: Decision) -> Callable[[PrecopyStats], Decision]:
    return lambda _: decision


# The order of things


def test_a_plain_hvm_save_suspends_before_any_page(guest: ScriptedGuest) -> None:
    result = save(guest, guest.recorder.fd)
    assert guest.recorder.story() == [*STATIC, "suspend", "PAGE_DATA", *STATE, "END"]
    assert guest.suspended
    assert (result.pages, result.ended, result.warnings) == (64, "end", [])
    assert result.octets == os.fstat(guest.recorder.fd).st_size


def test_a_pv_save_tells_its_shape_first_and_where_its_p2m_is_behind_the_static_data(
    recorder: Recorder,
) -> None:
    guest = ScriptedGuest(recorder, guest_type=GuestType.PV)
    save(guest, recorder.fd)
    assert recorder.story() == [
        "headers", "X86_PV_INFO", *STATIC[1:], "X86_PV_P2M_FRAMES",
        "suspend", "PAGE_DATA", "X86_TSC_INFO", "SHARED_INFO", "END",
    ]  # fmt: skip


def test_a_live_save_asks_the_policy_twice_a_round_and_sends_what_is_left_while_suspended(
    recorder: Recorder,
) -> None:
    guest = ScriptedGuest(recorder, dirtied=[range(60), range(3), range(2)])
    policy = noted_policy(recorder, lambda s: STOP if 0 <= s.dirty_count < 50 else GO)
    result = save(guest, recorder.fd, live=True, callbacks=SaveCallbacks(precopy_policy=policy))
    assert recorder.story() == [
        *STATIC, "log on",
        "policy 0 0 64", "PAGE_DATA", "policy 1 64 -1", "CLEAN",
        "policy 1 64 60", "PAGE_DATA", "policy 2 124 -1", "CLEAN",
        "policy 2 124 3", "PAGE_DATA",  # told to stop, these are still sent
        "suspend", "CLEAN", "PAGE_DATA", *STATE, "END", "log off",
    ]  # fmt: skip
    assert [len(pfns) for pfns in recorder.sent()] == [64, 60, 3, 2]
    assert result.iterations == 2


def test_the_default_policy_is_xens_and_stops_a_busy_guest_after_five_rounds(recorder: Recorder) -> None:
    guest = ScriptedGuest(recorder, dirtied=[range(64)] * 9)
    assert save(guest, recorder.fd, live=True).iterations == 5
    assert recorder.story().count("CLEAN") == 5  # four in precopy, and the final one
    assert len(recorder.sent()) == 6


def test_a_round_that_finds_nothing_dirty_sends_nothing(recorder: Recorder) -> None:
    guest = ScriptedGuest(recorder)
    save(guest, recorder.fd, live=True)
    assert recorder.story() == [
        *STATIC, "log on", "PAGE_DATA", "CLEAN", "suspend", "CLEAN", *STATE, "END", "log off",
    ]  # fmt: skip


def test_a_policy_may_stop_behind_a_pass_before_the_log_is_looked_at(recorder: Recorder) -> None:
    guest = ScriptedGuest(recorder, dirtied=[[7]])
    policy = noted_policy(recorder, lambda s: STOP if s.iteration == 1 else GO)
    save(guest, recorder.fd, live=True, callbacks=SaveCallbacks(precopy_policy=policy))
    assert recorder.story()[4:-5] == [
        "log on", "policy 0 0 64", "PAGE_DATA", "policy 1 64 -1", "suspend", "CLEAN", "PAGE_DATA",
    ]  # fmt: skip
    assert recorder.sent()[1] == [7]


@pytest.mark.parametrize(("abort_at", "page_data"), [(0, 0), (1, 1), (2, 1)])
def test_a_policy_that_aborts_ends_the_save_at_once_and_the_guest_never_stops(
    recorder: Recorder, abort_at: int, page_data: int
) -> None:
    guest = ScriptedGuest(recorder, dirtied=[range(64)] * 9)
    answers = [GO] * abort_at + [ABORT]
    callbacks = SaveCallbacks(precopy_policy=lambda _: answers.pop(0))
    with pytest.raises(SaveError, match="policy broke the save off"):
        save(guest, recorder.fd, live=True, callbacks=callbacks)
    events = [event for _, event in recorder.events]
    assert "suspend" not in events
    assert events[-1] == "log off"
    assert os.fstat(recorder.fd).st_size == 40 + 3 * 8 + page_data * (16 + 64 * 8 + 64 * PAGE)


def test_debug_sends_everything_again_behind_verify_and_peeks_at_the_log(recorder: Recorder) -> None:
    guest = ScriptedGuest(recorder)
    save(guest, recorder.fd, live=True, debug=True)
    assert recorder.story()[7:] == [
        "suspend", "CLEAN", "VERIFY", "PAGE_DATA", "PEEK", *STATE, "END", "log off",
    ]  # fmt: skip
    assert recorder.sent()[-1] == list(range(64))


def test_debug_is_for_plain_live_saves_only_as_in_xen(guest: ScriptedGuest) -> None:
    save(guest, guest.recorder.fd, debug=True)
    assert "VERIFY" not in guest.recorder.story()


def test_remus_ends_with_success_and_without_end_when_the_checkpoint_callback_answers_0(
    recorder: Recorder,
) -> None:
    guest = ScriptedGuest(recorder, dirtied=[[], [1], [2, 3]])

    def postcopy() -> int:
        recorder.note("postcopy")
        guest.resume()
        return 1

    callbacks = SaveCallbacks(postcopy=postcopy, checkpoint=recorder.answers("checkpoint", 1, 0))
    result = save(guest, recorder.fd, stream_type=StreamType.REMUS, callbacks=callbacks)
    assert recorder.story() == [
        *STATIC, "log on", "PAGE_DATA", "CLEAN",
        "suspend", "CLEAN", "PAGE_DATA", *STATE, "CHECKPOINT", "postcopy", "resume", "checkpoint",
        "suspend", "CLEAN", "PAGE_DATA", *STATE, "CHECKPOINT", "postcopy", "resume", "checkpoint",
        "log off",
    ]  # fmt: skip
    assert recorder.sent()[1:] == [[1], [2, 3]]
    assert (result.checkpoints, result.ended) == (2, "checkpoint")
    assert not guest.suspended


def colo_list(*pfns: int) -> bytes:
    return struct.pack(f"<II{len(pfns)}Q", 0xF, 8 * len(pfns), *pfns)


def colo_callbacks(recorder: Recorder, rounds: int) -> SaveCallbacks:
    return SaveCallbacks(
        checkpoint=recorder.answers("checkpoint", *[1] * rounds),
        wait_checkpoint=recorder.answers("wait_checkpoint", *[1] * (rounds - 1), 0),
    )


def test_colo_merges_what_the_secondary_wrote_into_every_checkpoint_but_the_first(
    recorder: Recorder,
) -> None:
    guest = ScriptedGuest(recorder, dirtied=[[], [5], [9], [9]])
    from_secondary, to_primary = os.pipe()
    os.write(to_primary, colo_list(9, 63, 0) + colo_list())
    result = save(
        guest,
        recorder.fd,
        stream_type=StreamType.COLO,
        callbacks=colo_callbacks(recorder, 3),
        recv_fd=from_secondary,
    )
    round_ = ["CHECKPOINT", "checkpoint", "resume", "wait_checkpoint"]
    assert recorder.story() == [
        *STATIC, "log on", "PAGE_DATA", "CLEAN",
        "suspend", "CLEAN", "PAGE_DATA", *STATE, *round_,
        "suspend", "CLEAN", "PAGE_DATA", *STATE, *round_,
        "suspend", "CLEAN", "PAGE_DATA", *STATE, *round_,
        "log off",
    ]  # fmt: skip
    assert recorder.sent()[1:] == [[5], [0, 9, 63], [9]]
    assert (result.checkpoints, result.ended) == (3, "checkpoint")
    os.close(from_secondary)
    os.close(to_primary)


@pytest.mark.parametrize(
    ("postcopy", "checkpoint", "fails"), [(0, 1, False), (-1, 1, True), (1, 0, False), (1, -1, True)]
)
def test_a_callback_that_answers_0_ends_remus_and_one_below_0_fails_it(
    recorder: Recorder, postcopy: int, checkpoint: int, fails: bool
) -> None:
    guest = ScriptedGuest(recorder)
    callbacks = SaveCallbacks(postcopy=lambda: postcopy, checkpoint=lambda: checkpoint)
    if not fails:
        assert save(guest, recorder.fd, stream_type=StreamType.REMUS, callbacks=callbacks).checkpoints == 1
        return
    with pytest.raises(SaveError, match="callback failed: it answered -1"):
        save(guest, recorder.fd, stream_type=StreamType.REMUS, callbacks=callbacks)
    assert not guest.suspended


def test_colos_checkpoint_callback_fails_the_save_with_0(recorder: Recorder) -> None:
    callbacks = SaveCallbacks(checkpoint=lambda: 0, wait_checkpoint=lambda: 1)
    with pytest.raises(SaveError, match="checkpoint callback failed"):
        save(
            ScriptedGuest(recorder), recorder.fd, stream_type=StreamType.COLO, callbacks=callbacks, recv_fd=0
        )


# What is in a batch


def test_headers_and_pages_are_the_octets_that_the_specification_asks_for(recorder: Recorder) -> None:
    guest = ScriptedGuest(recorder, size=5)
    guest.types[1:4] = BROKEN, ALLOCATE, HOLE
    save(guest, recorder.fd, xen_version=(4, 19))
    os.lseek(recorder.fd, 0, os.SEEK_SET)
    stream = os.read(recorder.fd, 1 << 20)
    assert stream[:40].hex() == (
        "ffffffffffffffff" "58454e46" "00000003" "0000" "0000" "00000000"  # image header, big-endian
        "02000000" "0c00" "0000" "04000000" "13000000"  # HVM, 4 KiB pages, Xen 4.19
    )  # fmt: skip
    record = stream[40 + 3 * 8 :]
    assert record[:56].hex() == (
        "01000000" "30200000"  # PAGE_DATA, 8 + 5 * 8 + 2 * 4096 octets
        "05000000" "00000000"
        "0000000000000000" "01000000000000d0" "02000000000000e0" "03000000000000f0" "0400000000000000"
    )  # fmt: skip
    assert record[56 : 56 + 2 * PAGE] == guest.memory[[0, 4]].tobytes()


def test_a_batch_whose_pages_are_all_absent_is_still_written(recorder: Recorder) -> None:
    guest = ScriptedGuest(recorder, size=6)
    guest.types[2:4] = HOLE
    result = save(guest, recorder.fd, batch_size=2)
    assert recorder.sent() == [[0, 1], [2, 3], [4, 5]]
    assert result.pages == 4


@pytest.mark.parametrize("batch_size", [1, 3, 63, 64, 1024])
def test_the_batch_size_changes_the_records_and_not_the_pages(recorder: Recorder, batch_size: int) -> None:
    save(ScriptedGuest(recorder), recorder.fd, batch_size=batch_size)
    sent = recorder.sent()
    assert [pfn for pfns in sent for pfn in pfns] == list(range(64))
    assert all(len(pfns) == batch_size for pfns in sent[:-1])


def test_a_page_table_in_change_waits_for_the_end_of_precopy(recorder: Recorder) -> None:
    guest = ScriptedGuest(recorder, guest_type=GuestType.PV, waits={3, 5})
    guest.types[[3, 5]] = 1
    result = save(guest, recorder.fd, live=True)
    first, last = recorder.page_data()
    assert first.types[:8].tolist() == [0, 0, 0, HOLE, 0, HOLE, 0, 0]
    assert (last.pfns.tolist(), last.types.tolist()) == ([3, 5], [1, 1])
    assert result.pages == 64


def test_a_page_table_that_cannot_be_read_while_suspended_fails_the_save(recorder: Recorder) -> None:
    guest = ScriptedGuest(recorder, guest_type=GuestType.PV, waits={3})
    guest.types[3] = 1

    def suspend() -> int:
        guest.suspended = True  # and the page table waits on
        return 1

    with pytest.raises(GuestError, match="page table at PFN 0x3 cannot be read although"):
        save(guest, recorder.fd, callbacks=SaveCallbacks(suspend=suspend))
    assert not guest.suspended


def test_a_pv_hole_is_looked_at_again_at_the_end_and_an_hvm_hole_only_when_dirty(
    tmp_path: Path,
) -> None:
    for guest_type, looked_at_again in ((GuestType.PV, [[9, 10]]), (GuestType.HVM, [])):
        fd = os.open(tmp_path / guest_type.name, os.O_RDWR | os.O_CREAT)
        guest = ScriptedGuest(Recorder(fd), guest_type=guest_type)
        guest.types[[9, 10]] = HOLE
        save(guest, fd, live=True)
        assert guest.recorder.sent()[1:] == looked_at_again
        os.close(fd)


def test_a_page_type_that_does_not_exist_is_refused(guest: ScriptedGuest) -> None:
    for number in (5, 8, 16, 255):
        guest.types[40] = number
        with pytest.raises(GuestError, match=f"PFN 0x28 has the page type {number:#x}, which is unknown"):
            save(guest, guest.recorder.fd)


def test_a_guest_that_gives_too_little_memory_never_gets_a_record_out_of_step(
    guest: ScriptedGuest,
) -> None:
    guest.memory = guest.memory[:, : PAGE - 1].copy()
    with pytest.raises(GuestError, match="gave 262080 octets for 64 pages of PFNs 0x0 to 0x3f, not 262144"):
        save(guest, guest.recorder.fd)
    assert os.fstat(guest.recorder.fd).st_size == 40 + 3 * 8


# What goes wrong


def test_a_suspend_callback_that_answers_0_fails_the_save(guest: ScriptedGuest) -> None:
    with pytest.raises(SaveError, match="suspend callback failed"):
        save(guest, guest.recorder.fd, callbacks=SaveCallbacks(suspend=lambda: 0))


def test_a_guest_that_is_not_suspended_after_it_was_asked_fails_the_save(recorder: Recorder) -> None:
    guest = ScriptedGuest(recorder, stays_awake=True)
    with pytest.raises(GuestError, match="has not been suspended"):
        save(guest, recorder.fd, live=True)
    assert recorder.events[-1][1] == "log off"


def test_a_log_that_is_on_already_is_switched_off_and_on_again(recorder: Recorder) -> None:
    guest = ScriptedGuest(recorder, refuses={"log on"})
    switch_off = guest.disable_dirty_log

    def disable() -> None:
        guest.refuses.clear()
        switch_off()

    guest.disable_dirty_log = disable  # type: ignore[method-assign]  # scripted
    save(guest, recorder.fd, live=True)
    assert recorder.story()[4:7] == ["log on", "log off", "log on"]


def test_a_guest_that_cannot_log_writes_is_not_saved_live(recorder: Recorder) -> None:
    guest = ScriptedGuest(recorder, refuses={"log on", "log off"})
    with pytest.raises(GuestError, match="cannot do: log on"):
        save(guest, recorder.fd, live=True)


def test_a_log_that_cannot_be_switched_off_is_only_told(recorder: Recorder) -> None:
    guest = ScriptedGuest(recorder, refuses={"log off"})
    result = save(guest, recorder.fd, live=True)
    assert result.warnings == ["the dirty log could not be switched off: cannot do: log off"]
    assert recorder.story()[-2:] == ["END", "log off"]


def test_what_fails_while_cleaning_up_is_noted_on_the_error_that_caused_it(recorder: Recorder) -> None:
    guest = ScriptedGuest(recorder, refuses={"log off", "PEEK", "resume"})
    with pytest.raises(GuestError, match="PEEK") as failure:
        save(guest, recorder.fd, live=True, debug=True)
    assert failure.value.__notes__ == [
        "the dirty log could not be switched off: cannot do: log off",
        "the guest could not be resumed: cannot do: resume",
    ]


@pytest.mark.parametrize("failing", ["log on", "CLEAN", "suspend"])
def test_whatever_the_guest_refuses_ends_the_save_with_the_guest_running(
    recorder: Recorder, failing: str
) -> None:
    guest = ScriptedGuest(recorder, refuses={failing})
    with pytest.raises(GuestError, match=failing):
        save(guest, recorder.fd, live=True)
    assert not guest.suspended
    assert os.fstat(recorder.fd).st_size < 40 + 3 * 8 + 65 * (PAGE + 8)


def test_an_interrupt_resumes_the_guest_as_well(recorder: Recorder) -> None:
    guest = ScriptedGuest(recorder)

    def interrupt() -> int:
        guest.suspend()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(guest, recorder.fd, callbacks=SaveCallbacks(suspend=interrupt))
    assert not guest.suspended


def test_a_guest_that_stood_still_before_is_left_so(recorder: Recorder) -> None:
    guest = ScriptedGuest(recorder, suspended=True)
    guest.types[0] = 5
    with pytest.raises(GuestError):
        save(guest, recorder.fd)
    assert guest.suspended


@pytest.mark.parametrize("gone_at", ["log on", "suspend"])
def test_a_receiver_that_is_gone_is_told_as_such_and_the_guest_runs_on(
    recorder: Recorder, gone_at: str
) -> None:
    readable, writable = os.pipe()  # holds all that comes before
    guest = ScriptedGuest(recorder, size=4, dirtied=[[1], [2]])
    note = recorder.note

    def closing(event: str) -> None:
        if event == gone_at:
            os.close(readable)
        note(event)

    recorder.note = closing  # type: ignore[method-assign]  # scripted
    with pytest.raises(ChannelError, match=r"the receiver closed the stream after \d+ octets"):
        save(guest, writable, live=True)
    assert not guest.suspended
    assert recorder.events[-1][1] in ("log off", "resume")
    os.close(writable)


@pytest.mark.parametrize("make", [os.pipe, lambda: [end.detach() for end in socket.socketpair()]])
def test_a_receiver_that_stops_reading_runs_into_the_deadline(
    recorder: Recorder, make: Callable[[], tuple[int, int]]
) -> None:
    readable, writable = make()
    guest = ScriptedGuest(recorder, size=1024)
    with pytest.raises(DeadlineError, match=r"the receiver stopped reading after 64 octets: .*0\.05 s"):
        save(guest, writable, timeout_s=0.05)
    assert not guest.suspended
    assert os.get_blocking(writable)  # as it was before
    os.close(readable)
    os.close(writable)


def test_a_full_disk_is_told_with_the_systems_reason(guest: ScriptedGuest) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(ChannelError, match="cannot be written after 0 octets: No space left on device"):
        save(guest, full)
    os.close(full)


@pytest.mark.parametrize("blocking", [True, False])
def test_short_writes_and_a_non_blocking_descriptor_change_no_octet(
    recorder: Recorder, blocking: bool
) -> None:
    save(ScriptedGuest(recorder), recorder.fd, batch_size=7)
    os.lseek(recorder.fd, 0, os.SEEK_SET)
    expected = os.read(recorder.fd, 1 << 20)
    receiver, sender = socket.socketpair()
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    sender.setblocking(blocking)
    received = io.BytesIO()

    def receive() -> None:
        while piece := receiver.recv(997):
            received.write(piece)

    thread = threading.Thread(target=receive)
    thread.start()
    save(ScriptedGuest(recorder), sender.fileno(), batch_size=7)
    sender.close()
    thread.join()
    receiver.close()
    assert received.getvalue() == expected


@pytest.mark.parametrize(
    ("stream_type", "callbacks", "complaint"),
    [
        (StreamType.REMUS, SaveCallbacks(), "remus needs a checkpoint callback"),
        (StreamType.COLO, SaveCallbacks(wait_checkpoint=lambda: 1), "colo needs a checkpoint callback"),
        (StreamType.COLO, SaveCallbacks(checkpoint=lambda: 1), "colo needs a wait_checkpoint callback"),
        (
            StreamType.COLO,
            SaveCallbacks(checkpoint=lambda: 1, wait_checkpoint=lambda: 1),
            "colo needs recv_fd, its back channel",
        ),
    ],
)
def test_a_checkpointed_save_without_its_callbacks_writes_nothing(
    guest: ScriptedGuest, stream_type: StreamType, callbacks: SaveCallbacks, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        save(guest, guest.recorder.fd, stream_type=stream_type, callbacks=callbacks)
    assert os.fstat(guest.recorder.fd).st_size == 0


@pytest.mark.parametrize("batch_size", [0, -1, 32_705])
def test_a_batch_size_that_no_record_can_hold_is_refused(guest: ScriptedGuest, batch_size: int) -> None:
    with pytest.raises(ValueError, match="a batch has 1 to 32704 PFNs"):
        save(guest, guest.recorder.fd, batch_size=batch_size)


# The back channel


def receive_list(octets: bytes, *, size: int = 64, xen_form: bool = False) -> tuple[list[int], bytes]:
    """Return the PFNs read, and what was left in the channel."""
    readable, writable = os.pipe()
    os.write(writable, octets)
    os.close(writable)
    try:
        dirty = PfnBitmap(size)
        read_dirty_pfn_list(readable, dirty, xen_form=xen_form)
        pfns = [int(pfn) for batch in dirty.batches() for pfn in batch]
        return pfns, os.read(readable, 100)
    finally:
        os.close(readable)


def test_xens_own_form_of_the_dirty_list_has_eight_octets_more_than_it_says() -> None:
    header, pfns = struct.pack("<II", 0xF, 16), struct.pack("<QQ", 3, 7)
    assert receive_list(header + pfns + b"next") == ([3, 7], b"next")
    assert receive_list(header + bytes(8) + pfns + b"next", xen_form=True) == ([3, 7], b"next")


@pytest.mark.parametrize(
    ("octets", "error", "complaint"),
    [
        (struct.pack("<II", 0xE, 0), FormatError, "expected CHECKPOINT_DIRTY_PFN_LIST .* found CHECKPOINT"),
        (struct.pack("<II", 0xF, 12) + bytes(12), FormatError, "12 octets long; expected a multiple of 8"),
        (struct.pack("<II", 0xF, 0xFFFF_FFF8), FormatError, "4294967288 octets long"),
        (colo_list(1, 64), FormatError, "PFN 0x40 is beyond the guest, which ends below 0x40"),
        (colo_list(1 << 63), FormatError, "PFN 0x8000000000000000 is beyond"),
        (colo_list(1, 2)[:-1], TruncatedError, "expected 16 octets more, found 15"),
        (b"\x0f\0\0", TruncatedError, "expected 8 octets more, found 3"),
    ],
)
def test_a_damaged_back_channel_is_an_error_that_says_how(
    octets: bytes, error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        receive_list(octets)


def test_a_damaged_back_channel_fails_the_save_and_the_guest_runs_on(recorder: Recorder) -> None:
    guest = ScriptedGuest(recorder)
    readable, writable = os.pipe()
    os.write(writable, struct.pack("<II", 0, 0))
    with pytest.raises(FormatError, match="found END"):
        save(
            guest,
            recorder.fd,
            stream_type=StreamType.COLO,
            callbacks=colo_callbacks(recorder, 2),
            recv_fd=readable,
        )
    assert [event for _, event in recorder.events][-4:] == ["suspend", "CLEAN", "log off", "resume"]
    os.close(readable)
    os.close(writable)


# Rates and reports


def test_the_bandwidth_limit_sleeps_for_exactly_what_was_sent_too_early() -> None:
    now, slept = 100.0, []

    def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(round(seconds, 6))
        now += seconds

    bucket = TokenBucket(1000, clock=lambda: now, sleep=sleep)
    bucket.take(500)
    bucket.take(500)
    now += 0.02
    bucket.take(10)  # 20 were earned: no need to sleep
    now += 60
    bucket.take(1000)  # a pause earns 50 ms worth at most
    assert slept == [0.5, 0.5, 0.95]


def test_a_bandwidth_limit_of_nothing_is_refused(guest: ScriptedGuest) -> None:
    for limit in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="more than 0 octets a second"):
            save(guest, guest.recorder.fd, bandwidth_limit=limit)


def test_every_pass_is_reported_as_one_line_of_json(recorder: Recorder) -> None:
    guest = ScriptedGuest(recorder, dirtied=[range(60), range(3), [1]])
    out = io.StringIO()
    result = save(guest, recorder.fd, live=True, progress=JsonProgress(out))
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [(line["event"], line["kind"], line["number"], line["pages"]) for line in lines] == [
        ("pass", "precopy", 0, 64),
        ("pass", "precopy", 1, 60),
        ("pass", "precopy", 2, 3),
        ("pass", "stop-and-copy", 3, 1),
    ]
    assert lines[1]["octets"] == 16 + 60 * (8 + PAGE)
    assert json.loads(json.dumps(result.to_json()))["stream_type"] == "plain"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_every_pass_leaves_a_line_but_checkpoints_do_not(recorder: Recorder) -> None:
    out = Terminal()
    guest = ScriptedGuest(recorder, dirtied=[range(60), range(3), [1], [2]])
    callbacks = SaveCallbacks(checkpoint=recorder.answers("checkpoint", 1, 0))
    with show(out) as progress:
        save(guest, recorder.fd, stream_type=StreamType.REMUS, callbacks=callbacks, progress=progress)
    text = out.getvalue()
    for line in ("precopy 0: 64 pages in", "precopy 1: 60 pages in", "stop-and-copy 3: 1 pages in"):
        assert line in text
    assert "0 pages left" in text
    assert "checkpoint 4:" not in text


def test_where_nobody_looks_nothing_is_shown(recorder: Recorder) -> None:
    out = io.StringIO()
    with show(out) as progress:
        save(ScriptedGuest(recorder), recorder.fd, progress=progress)
    assert out.getvalue() == ""


def test_policies_get_measured_rates(recorder: Recorder) -> None:
    asked: list[PrecopyStats] = []

    def policy(stats: PrecopyStats) -> Decision:
        asked.append(stats)
        return STOP if stats.iteration == 2 else GO

    guest = ScriptedGuest(recorder, dirtied=[range(60)])
    save(guest, recorder.fd, live=True, callbacks=SaveCallbacks(precopy_policy=policy))
    first, behind_first, second = asked[:3]
    assert first.bandwidth is None
    assert first.downtime_s is None
    assert behind_first.bandwidth is not None
    assert behind_first.bandwidth > 0
    assert second.dirty_rate is not None
    assert second.dirty_rate > 0
    assert second.downtime_s == pytest.approx(60 * PAGE / behind_first.bandwidth)


def test_what_is_saved_reads_back_as_the_guests_memory(recorder: Recorder) -> None:
    guest = ScriptedGuest(recorder, size=100)
    save(guest, recorder.fd, batch_size=16)
    os.lseek(recorder.fd, 0, os.SEEK_SET)
    received = np.zeros_like(guest.memory)
    with reader.open(recorder.fd) as stream:
        for frame in stream:
            if frame.is_page_data:
                pfns = frame.record().pfns  # type: ignore[attr-defined]  # it is PAGE_DATA
                pages = memoryview(bytearray(len(pfns) * PAGE))
                frame.readv_into([pages])
                received[pfns] = np.frombuffer(pages, np.uint8).reshape(-1, PAGE)
    assert (received == guest.memory).all()
