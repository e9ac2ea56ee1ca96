"""Checkpointed restores: callbacks in Xen's order, and what is left of a guest whose sender goes away."""

from __future__ import annotations

import os
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migstream.bitmap import PfnBitmap
from migstream.engines.channel import read_dirty_pfn_list
from migstream.engines.common import CheckpointAction, StreamType
from migstream.engines.policies import Decision, PrecopyStats
from migstream.engines.restore import Outcome, RestoreCallbacks, RestoreResult, SpillError, restore
from migstream.engines.save import SaveCallbacks, save
from migstream.errors import StreamError
from migstream.guests.compare import differing_pfns, differing_records
from migstream.guests.model import ModelGuest
from migstream.guests.protocols import RestoredRings
from migstream.guests.workload import Workload
from migstream.io import reader
from migstream.records import OPTIONAL, Record, libxc
from migstream.records.libxc import GuestType

from . import build
from .streams import (
    CHECKPOINT,
    END,
    PARAMS,
    STATIC_DATA_END,
    TAIL,
    TSC,
    VERIFY,
    hvm,
    page,
    pages,
    raw,
    record,
    stream,
)

N_PAGES = 64
REMUS, COLO = StreamType.REMUS, StreamType.COLO

#: PFN -> fill, of the state that each checkpoint adds.
STATES: list[dict[int, int]] = [{0: 1, 1: 2, 9: 3}, {1: 4}, {0: 5, 2: 6}, {1: 7, 9: 8}]


def checkpointed(states: list[dict[int, int]], *tail: Record | bytes) -> tuple[list[bytes], list[int]]:
    """Return the records of a stream with one checkpoint a state, and where each is complete."""
    parts = [stream(STATIC_DATA_END)]
    complete = []
    for state in states:
        parts += [pages(pfn, [fill]) for pfn, fill in state.items()]
        parts += [record(r) for r in (*TAIL, CHECKPOINT)]
        complete.append(sum(map(len, parts)))
    return parts + [record(r) for r in tail], complete


def memory(target: ModelGuest) -> dict[int, int]:
    """Return PFN -> fill of every page that has memory; -1 where a page is not of one octet."""
    octets = target.memory.pages
    there = np.flatnonzero(target.populated(np.arange(N_PAGES, dtype=np.uint64))).tolist()
    return {pfn: int(octets[pfn, 0]) if (octets[pfn] == octets[pfn, 0]).all() else -1 for pfn in there}


def up_to(count: int) -> dict[int, int]:
    """Return the memory that ``count`` checkpoints of STATES make."""
    made: dict[int, int] = {}
    for state in STATES[:count]:
        made |= state
    return made


class Story:
    """Callbacks that note when they are called; ``answers`` gives those that do not say 1."""

    def __init__(self, target: ModelGuest, **answers: list[int]) -> None:
        self.target = target
        self.told: list[str] = []
        self.seen: list[dict[int, int]] = []  # memory at each checkpoint callback
        self.answers = answers

    def ask(self, name: str) -> int:
        self.told.append(name)
        if name == "checkpoint":
            self.seen.append(memory(self.target))
        left = self.answers.get(name)
        return left.pop(0) if left else 1

    @property
    def callbacks(self) -> RestoreCallbacks:
        def results(store: int | None, console: int | None) -> None:
            self.told.append(f"results {store} {console}")

        return RestoreCallbacks(
            checkpoint=partial(self.ask, "checkpoint"),
            postcopy=partial(self.ask, "postcopy"),
            wait_checkpoint=partial(self.ask, "wait_checkpoint"),
            suspend=partial(self.ask, "suspend"),
            restore_results=results,
        )


class Completed(ModelGuest):
    """A model that counts how often it was completed."""

    completed = 0

    def complete(self) -> RestoredRings:
        self.completed += 1
        return super().complete()


def run(octets: bytes, kind: StreamType = REMUS, **options: Any) -> tuple[Completed, Story, RestoreResult]:
    target = Completed.empty(N_PAGES, GuestType.HVM)
    answers = {name: options.pop(name) for name in list(options) if isinstance(options[name], list)}
    story = Story(target, **answers)
    with reader.open_memory(octets) as source:
        result = restore(target, source, stream_type=kind, callbacks=story.callbacks, **options)
    return target, story, result


# Remus


def test_records_wait_for_their_checkpoint_and_its_callback_comes_before_them() -> None:
    parts, _ = checkpointed(STATES)
    target, story, result = run(b"".join(parts))
    assert story.seen == [up_to(1), up_to(1), up_to(2), up_to(3)]
    assert memory(target) == up_to(4)
    assert (result.result, result.checkpoints) == (Outcome.FAILED_OVER, 4)
    assert target.completed == 1
    assert story.told == ["checkpoint"] * 4


def test_an_end_record_drops_what_waits() -> None:
    parts, _ = checkpointed(STATES[:2], pages(0, [99]), END)
    target, _, result = run(b"".join(parts))
    assert memory(target) == up_to(2)
    assert result.result is Outcome.RESTORED
    assert "1 records were dropped" in result.warnings[0]
    assert target.completed == 1


@pytest.mark.parametrize(
    "later",
    [(), (pages(1, [7]), pages(0, [8, 9])), (VERIFY, pages(0, [1, 2, 3]))],
    ids=["plain", "live", "debug"],
)
def test_a_stream_without_checkpoints_cut_anywhere_fails_and_completes_nothing(
    later: tuple[Record | bytes, ...],
) -> None:
    octets = hvm(pages(0, [1, 2]), pages(2, [3]), *later)
    for cut in cuts(octets):
        target = Completed.empty(N_PAGES, GuestType.HVM)
        with pytest.raises(StreamError) as caught, reader.open_memory(octets[:cut]) as source:
            restore(target, source)
        assert caught.value.offset is not None
        assert caught.value.offset <= cut
        assert target.completed == 0


def cuts(octets: bytes) -> list[int]:
    """Return every place around a record boundary, and a sample of those between."""
    with reader.open_memory(octets) as source:
        bounds = [frame.offset for frame in source]
    near = {at + step for at in bounds for step in (0, 1, 7, 8, 9, 16)}
    return sorted({c for c in near | set(range(0, len(octets), 1021)) if c < len(octets)})


def test_a_remus_stream_cut_anywhere_is_the_last_complete_checkpoint_exactly() -> None:
    parts, complete = checkpointed(STATES)
    octets = b"".join(parts)
    for cut in [*cuts(octets), *complete]:
        there = sum(end <= cut for end in complete)
        if not there:
            with pytest.raises(StreamError):
                run(octets[:cut])
            continue
        target, _, result = run(octets[:cut])
        assert memory(target) == up_to(there), cut
        assert (result.result, result.checkpoints) == (Outcome.FAILED_OVER, there)
        assert result.failover_reason


def test_inside_libxl_a_checkpoint_is_complete_at_checkpoint_end() -> None:
    octets = build.remus_stream(rounds=2)
    with reader.open_memory(octets) as source:
        ends = [f.offset + 8 for f in source if f.type_name == "CHECKPOINT_END"]
    for cut in cuts(octets):
        there = sum(end <= cut for end in ends)
        if not there:
            with pytest.raises(StreamError):
                run(octets[:cut])
            continue
        target, _, result = run(octets[:cut])
        assert memory(target) == {0: 0x11, 1: 0x22 if there == 1 else 0x33, 5: 0}, cut
        assert result.checkpoints == there
        assert [r.type for r in result.libxl_records] == ["EMULATOR_CONTEXT"]


@pytest.mark.parametrize(
    "wrong",
    [raw(0x7FFF), raw(0x01, struct.pack("<II", 0, 0)), raw(0x08, bytes(23)), record(STATIC_DATA_END)],
    ids=["unknown", "PAGE_DATA", "length", "repeated"],
)
def test_a_wrong_record_that_waited_is_an_error_with_its_place_in_the_stream(wrong: bytes) -> None:
    parts, complete = checkpointed(STATES[:1], pages(3, [3]), wrong, CHECKPOINT)
    with pytest.raises(StreamError) as caught:
        run(b"".join(parts))
    assert caught.value.offset is not None
    assert caught.value.offset >= complete[0] + len(pages(3, [3]))
    assert caught.value.record is not None


def test_an_optional_record_that_waited_is_skipped() -> None:
    parts, _ = checkpointed(STATES[:1], raw(OPTIONAL | 5, b"abc"), pages(3, [3]), CHECKPOINT, END)
    target, _, result = run(b"".join(parts))
    assert memory(target) == up_to(1) | {3: 3}
    assert result.result is Outcome.RESTORED


def test_a_record_beyond_the_limit_is_a_broken_channel_once_there_is_a_checkpoint() -> None:
    parts, _ = checkpointed(STATES[:1], struct.pack("<II", 1, (128 << 20) + 1))
    target, _, result = run(b"".join(parts))
    assert memory(target) == up_to(1)
    assert result.result is Outcome.FAILED_OVER


@pytest.mark.parametrize(
    ("answers", "there"),
    [([1, 2], 1), ([1, 1, 2], 2), ([0], None), ([2], None), ([1, 0], None), ([1, 3], None), ([-1], None)],
)
def test_the_checkpoint_callback_decides(answers: list[int], there: int | None) -> None:
    octets = b"".join(checkpointed(STATES)[0])
    if there is None:
        with pytest.raises(StreamError, match="checkpoint callback"):
            run(octets, checkpoint=answers)
        return
    target, _, result = run(octets, checkpoint=answers)
    assert memory(target) == up_to(there)
    assert (result.result, result.checkpoints) == (Outcome.FAILED_OVER, there)


def test_a_silent_or_reset_channel_is_a_broken_one() -> None:
    parts, _ = checkpointed(STATES[:2], pages(0, [99]))
    octets = b"".join(parts)
    for hang_up in (False, True):
        ours, theirs = socket.socketpair()
        target = Completed.empty(N_PAGES, GuestType.HVM)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        theirs.sendall(octets[:-9])
        if hang_up:
            theirs.shutdown(socket.SHUT_RDWR)
        result = restore(
            target,
            ours.fileno(),
            stream_type=REMUS,
            callbacks=RestoreCallbacks(checkpoint=lambda: 1),
            timeout_s=0.1,
        )
        assert (memory(target), result.result) == (up_to(2), Outcome.FAILED_OVER)
        ours.close()
        theirs.close()


def test_what_waits_is_bounded() -> None:
    parts, _ = checkpointed(STATES)
    with pytest.raises(SpillError, match="more than 8000 octets"):
        run(b"".join(parts), spill_limit=8000)


def test_records_wait_in_a_file_without_a_name(tmp_path: Any) -> None:
    parts, _ = checkpointed(STATES)
    run(b"".join(parts), spill_directory=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


states = st.lists(
    st.dictionaries(st.integers(0, N_PAGES - 1), st.integers(1, 255), max_size=5), min_size=1, max_size=5
)


@settings(max_examples=80, deadline=None)
@given(states, st.floats(0, 1))
def test_any_remus_stream_cut_anywhere_is_what_an_oracle_says(
    drawn: list[dict[int, int]], where: float
) -> None:
    parts, complete = checkpointed(drawn)
    octets = b"".join(parts)
    cut = int(where * len(octets))
    expected: dict[int, int] = {}
    there = sum(end <= cut for end in complete)
    for state in drawn[:there]:
        expected |= state
    if there:
        target, _, result = run(octets[:cut])
        assert memory(target) == expected
        assert result.checkpoints == there
    else:
        with pytest.raises(StreamError):
            run(octets[:cut])


# COLO


@contextmanager
def back_channel() -> Iterator[tuple[int, int]]:
    read_end, write_end = os.pipe()
    try:
        yield read_end, write_end
    finally:
        for fd in (read_end, write_end):
            os.close(fd)


ROUND = ["results 5 8", "postcopy", "wait_checkpoint", "suspend"]


def test_colos_callbacks_come_in_xens_order_at_every_checkpoint() -> None:
    parts, _ = checkpointed(STATES)
    with back_channel() as (_, send_back):
        target, story, result = run(b"".join(parts), COLO, send_back_fd=send_back)
    assert story.told == ["checkpoint", *ROUND] * 4
    assert (memory(target), result.result) == (up_to(4), Outcome.FAILED_OVER)
    assert target.completed == 4, "once a checkpoint, and not again at the end"


def test_the_secondarys_writes_go_back_in_the_form_of_the_specification() -> None:
    parts, _ = checkpointed(STATES[:2])
    with back_channel() as (read_end, send_back):
        target = Completed.empty(N_PAGES, GuestType.HVM)
        story = Story(target)

        def postcopy() -> int:
            target.resume()
            written = np.array([3, 40], np.uint64)
            target.populate(written[~target.populated(written)])
            target.write(written, np.zeros(2, np.uint64), np.ones(2, np.uint64))
            target.suspend()
            return 1

        callbacks = replace(story.callbacks, postcopy=postcopy)
        with reader.open_memory(b"".join(parts)) as source:
            restore(target, source, stream_type=COLO, callbacks=callbacks, send_back_fd=send_back)
        expected = struct.pack("<IIQQ", 0x0F, 16, 3, 40)
        assert os.read(read_end, len(expected)) == expected
        into = PfnBitmap(N_PAGES)
        assert read_dirty_pfn_list(read_end, into) == 2


def test_a_colo_stream_cut_anywhere_is_the_last_complete_checkpoint() -> None:
    parts, complete = checkpointed(STATES[:3])
    octets = b"".join(parts)
    for cut in [*cuts(octets), *complete]:
        there = sum(end <= cut for end in complete)
        with back_channel() as (_, send_back):
            if not there:
                with pytest.raises(StreamError):
                    run(octets[:cut], COLO, send_back_fd=send_back)
                continue
            target, _, result = run(octets[:cut], COLO, send_back_fd=send_back)
        assert memory(target) == up_to(there)
        assert (result.result, target.completed) == (Outcome.FAILED_OVER, there)


@pytest.mark.parametrize("name", ["postcopy", "wait_checkpoint", "suspend"])
@pytest.mark.parametrize("answer", [0, 2, 3])
def test_colos_callbacks_may_fail_over_or_fail(name: str, answer: int) -> None:
    octets = b"".join(checkpointed(STATES)[0])
    with back_channel() as (_, send_back):
        run_it = partial(run, octets, COLO, send_back_fd=send_back, **{name: [1, answer]})
        if answer == CheckpointAction.FAILOVER:
            target, _, result = run_it()
            assert (memory(target), result.checkpoints) == (up_to(2), 2)
        else:
            with pytest.raises(StreamError, match=f"{name} callback failed: it returned {answer}"):
                run_it()


def test_a_primary_that_is_gone_when_the_list_is_sent_is_a_broken_channel() -> None:
    read_end, send_back = os.pipe()
    os.close(read_end)
    try:
        target, _, result = run(b"".join(checkpointed(STATES)[0]), COLO, send_back_fd=send_back)
    finally:
        os.close(send_back)
    assert (memory(target), result.result) == (up_to(1), Outcome.FAILED_OVER)


def test_an_end_before_the_first_checkpoint_completes_the_guest_all_the_same() -> None:
    with back_channel() as (_, send_back):
        target, story, result = run(hvm(pages(0, [1])), COLO, send_back_fd=send_back)
    assert (target.completed, story.told, result.result) == (1, [], Outcome.RESTORED)


def test_state_that_waited_is_the_state_of_the_checkpoint() -> None:
    later = libxc.X86TscInfo(mode=1, khz=1, nsec=2, incarnation=9)
    parts, _ = checkpointed(STATES[:1], later, PARAMS, CHECKPOINT, TSC)
    target, _, _ = run(b"".join(parts))
    (tsc,) = [r for r in target.state() if isinstance(r, libxc.X86TscInfo)]
    assert tsc.incarnation == 9
    assert memory(target) == up_to(1)
    assert bytes(target.memory.pages[9]) == page(3)


# Against the save engine


def saved(
    source: ModelGuest, step: Callable[[], None], rounds: int, kind: StreamType, batch_size: int
) -> tuple[bytes, list[tuple[int, ModelGuest]]]:
    """Save a busy machine; return the stream, and where in it which copy of the machine is complete."""
    kept: list[tuple[int, ModelGuest]] = []
    with tempfile.TemporaryFile() as file:
        fd = file.fileno()

        def policy(stats: PrecopyStats) -> Decision:
            step()
            return Decision.CONTINUE_PRECOPY if stats.iteration < 2 else Decision.STOP_AND_COPY

        def postcopy() -> int:
            kept.append((os.fstat(fd).st_size, copy_of(source)))
            source.resume()
            step()
            return 1

        callbacks = SaveCallbacks(
            precopy_policy=policy, postcopy=postcopy, checkpoint=lambda: int(len(kept) < rounds)
        )
        save(source, fd, live=True, stream_type=kind, callbacks=callbacks, batch_size=batch_size)
        file.seek(0)
        octets = file.read()
    return octets, kept or [(len(octets), source)]


def copy_of(source: ModelGuest) -> ModelGuest:
    """Return the suspended machine as it is now, by way of a plain stream."""
    copy = ModelGuest.empty(source.n_pages, source.guest_type, seed=99)
    with tempfile.TemporaryFile() as file:
        save(source, file.fileno())
        file.seek(0)
        restore(copy, file.fileno())
    return copy


@settings(max_examples=25, deadline=None)
@given(
    guest_type=st.sampled_from(GuestType),
    kind=st.sampled_from([StreamType.PLAIN, REMUS]),
    seed=st.integers(0, 1 << 30),
    batch_size=st.sampled_from([1, 7, 1024]),
    where=st.floats(0, 1),
)
def test_what_the_save_engine_wrote_up_to_any_place_is_the_machine_at_its_last_complete_state(
    guest_type: GuestType, kind: StreamType, seed: int, batch_size: int, where: float
) -> None:
    source = ModelGuest.booted(200, guest_type, seed=seed)
    work = Workload(source, seed=seed, working_set=100, turmoil=0.5)
    octets, kept = saved(source, lambda: work.step(20), 3, kind, batch_size)
    for cut in (len(octets), int(where * len(octets))):
        there = [machine for end, machine in kept if end <= cut]
        target = ModelGuest.empty(200, guest_type, seed=seed + 1)
        run_it = partial(restore, target, stream_type=kind, callbacks=RestoreCallbacks(checkpoint=lambda: 1))
        with reader.open_memory(octets[:cut]) as stream_:
            if there:
                run_it(stream_)
                assert not differing_pfns(there[-1], target).tolist()
                assert differing_records(there[-1], target) == []
            else:
                with pytest.raises(StreamError):
                    run_it(stream_)
