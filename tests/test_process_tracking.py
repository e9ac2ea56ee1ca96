"""Which pages of a process were written: both trackers against what the process says it did."""

from __future__ import annotations

import os
import random
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migstream.bitmap import PfnBitmap
from migstream.errors import GuestError
from migstream.guests.process import handover, syscalls, userfaultfd
from migstream.guests.process.pagemap import fill_between, flip
from migstream.guests.process.ranges import MemoryRange, check, numbered
from migstream.guests.process.reading import PageReader
from migstream.guests.process.shadow import ShadowTracker
from migstream.guests.process.tracer import RefusedError, Tracer
from migstream.guests.process.tracking import DirtyTracker, track
from migstream.guests.protocols import PAGE_SIZE, HasNotes
from migstream.guests.registry import open_source
from tests.guests import pfns
from tests.processes import Child, child, is_untouched, numbers, tracked, why_no_write_protection

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are tracked on Linux only")

N_PAGES = 700  # more than a chunk of the shadow's, and no multiple of 64


needs_kernel = pytest.mark.skipif(bool(why_no_write_protection()), reason=why_no_write_protection())


def by_write_protection(of: Child) -> DirtyTracker:
    return track(of.pid, of.ranges)


def by_shadow(of: Child) -> DirtyTracker:
    return ShadowTracker(of.pid, of.ranges, None, "the test says so")


TRACKERS = [pytest.param(by_write_protection, marks=needs_kernel), by_shadow]
MakeTracker = Callable[[Child], DirtyTracker]


def cleaned(tracker: DirtyTracker, size: int = N_PAGES) -> list[int]:
    found = PfnBitmap(size)
    found.fill()  # replaced, not added to
    tracker.clean(found)
    return numbers(list(found.batches()))


def peeked(tracker: DirtyTracker, size: int = N_PAGES) -> list[int]:
    found = PfnBitmap(size)
    found.fill()
    tracker.peek(found)
    return numbers(list(found.batches()))


# Both trackers


@pytest.mark.parametrize("kind", ["private", "shared", "memfd"])
@pytest.mark.parametrize("make", TRACKERS)
def test_exactly_the_pages_written_are_found_once(make: MakeTracker, kind: str) -> None:
    choose = random.Random(f"{kind} 5")
    with child(N_PAGES, kind) as process:
        process.do("write", *choose.sample(range(N_PAGES), 300))
        tracker = make(process)
        assert cleaned(tracker) == []
        for count in (1, 0, 7, 200, N_PAGES, 3):
            written = sorted(choose.sample(range(N_PAGES), count))
            process.do("write", *written)
            assert peeked(tracker) == peeked(tracker) == written
            assert cleaned(tracker) == written
            assert cleaned(tracker) == []
        tracker.close()
        tracker.close()
        assert is_untouched(process.pid)
        process.do("write", 1)


@pytest.mark.parametrize("make", TRACKERS)
def test_writes_by_the_kernel_and_behind_a_fork_are_found(make: MakeTracker) -> None:
    with child(N_PAGES) as process:
        process.do("write", *range(100))
        tracker = make(process)
        process.do("read_into", 10, 3)
        assert cleaned(tracker) == [10, 11, 12]
        process.do("fork_and_write", 20)
        assert cleaned(tracker) == [20]
        tracker.close()


@pytest.mark.parametrize("make", TRACKERS)
def test_private_memory_given_back_is_found(make: MakeTracker) -> None:
    with child(N_PAGES) as process:
        process.do("write", *range(100))
        tracker = make(process)
        process.do("dontneed", 50, 2)
        assert peeked(tracker) == [50, 51]
        assert cleaned(tracker) == [50, 51]
        tracker.close()


@needs_kernel
def test_what_others_write_to_a_shared_file_is_not_found_by_write_protection() -> None:
    """As docs/processes.md says: the marks are in the process's page tables, which write() goes round."""
    with child(N_PAGES, "memfd") as process:
        process.do("write", *range(100))
        protected, shadow = by_write_protection(process), by_shadow(process)
        process.do("pwrite", 30)
        assert (cleaned(protected), cleaned(shadow)) == ([], [30])
        protected.close()


@pytest.mark.parametrize("make", TRACKERS)
@pytest.mark.parametrize("end", ["killed", "exec"])
def test_a_process_that_ends_is_an_error(make: MakeTracker, end: str) -> None:
    with child(N_PAGES) as process:
        tracker = make(process)
        if end == "killed":
            process.kill()
        else:
            process.tell("run")
            with open(f"/proc/{process.pid}/comm") as comm:
                while comm.read() != "sleep\n":
                    comm.seek(0)
        with pytest.raises(GuestError, match=r"has ended|no readable memory"):
            cleaned(tracker)
        tracker.close()


@pytest.mark.parametrize("make", TRACKERS)
def test_several_ranges_at_any_pfns(make: MakeTracker) -> None:
    with child(N_PAGES) as process:
        at = process.address
        process.do("write", *range(N_PAGES))
        ranges = [
            MemoryRange(at + 100 * PAGE_SIZE, 65 * PAGE_SIZE, 1000),
            MemoryRange(at, 3 * PAGE_SIZE, 61),
            MemoryRange(at + 300 * PAGE_SIZE, PAGE_SIZE, 1065),
        ]
        tracker: DirtyTracker
        if make is by_shadow:
            tracker = ShadowTracker(process.pid, ranges, None, "")
        else:
            tracker = track(process.pid, ranges)
        process.do("write", 0, 2, 3, 99, 100, 164, 165, 300, 301)
        assert cleaned(tracker, 1066) == [61, 63, 1000, 1064, 1065]
        tracker.close()
        assert is_untouched(process.pid)


# By write protection


@needs_kernel
def test_memory_mapped_anew_is_an_error() -> None:
    with child(N_PAGES) as process:
        tracker = by_write_protection(process)
        process.do("remap", 30, 2)
        with pytest.raises(GuestError, match=r"mapped memory within .* anew"):
            cleaned(tracker)
        tracker.close()
        assert is_untouched(process.pid)


@needs_kernel
def test_a_second_tracker_is_refused_and_harms_nothing() -> None:
    with child(N_PAGES) as process:
        first = by_write_protection(process)
        with pytest.raises(GuestError, match=r"already tracked by another userfaultfd.*end that first"):
            track(process.pid, process.ranges)
        process.do("write", 5)
        assert cleaned(first) == [5]
        first.close()
        second = by_write_protection(process)
        second.close()
        assert is_untouched(process.pid)


@needs_kernel
def test_no_write_is_lost_between_looks() -> None:
    """Every page that differs from what it was at the look that reported it last is reported again."""
    with child(N_PAGES) as process:
        tracker = by_write_protection(process)
        seen = process.memory().copy()
        process.do("busy", 40)
        found = PfnBitmap(N_PAGES)
        for _ in range(200):
            tracker.clean(found)
            dirty = np.concatenate(list(found.batches()) or [pfns()]).astype(np.intp)
            seen[dirty] = process.memory()[dirty]
        with Tracer(process.pid) as tracer:
            tracer.stop()
            tracker.clean(found)
            now = process.memory()
            changed = np.flatnonzero((now != seen).any(axis=1))
            assert set(changed.tolist()) <= set(numbers(list(found.batches())))
        tracker.close()


@needs_kernel
def test_tracking_says_why_and_leaves_nothing_in_the_process_while_it_runs() -> None:
    with child(N_PAGES) as process:
        tracker = track(process.pid, process.ranges)
        assert (tracker.name, tracker.why) == ("userfaultfd", "the process was made to open a userfaultfd")
        assert tracker.copy is None
        assert tracked(process.pid)
        tracker.close()
        assert is_untouched(process.pid)


@needs_kernel
def test_a_process_hands_its_userfaultfd_over() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pid = os.fork()
        if pid == 0:  # a cooperating process, with the memory that it has from us
            handover.offer(theirs)
            offset = _ADDRESS - np.frombuffer(_SHARED, np.uint8).ctypes.data
            while theirs.recv(1):
                _SHARED[offset + 5 * PAGE_SIZE] += 1
                theirs.send(b"d")
            os._exit(0)
        ranges = numbered([(_ADDRESS, _ADDRESS + 16 * PAGE_SIZE)])
        tracker = track(pid, ranges, uffd=handover.accept(ours))
        assert tracker.why == "the process handed its userfaultfd over"
        ours.send(b"w")
        assert ours.recv(1) == b"d"
        assert cleaned(tracker, 16) == [5]
        tracker.close()
        assert is_untouched(pid)
        os.kill(pid, 9)
        os.waitpid(pid, 0)


_SHARED = bytearray(17 * PAGE_SIZE)  # of which some 16 pages are whole
_ADDRESS = -(-np.frombuffer(_SHARED, np.uint8).ctypes.data // PAGE_SIZE) * PAGE_SIZE


def test_a_handover_of_something_else_is_refused() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"x")
        with pytest.raises(GuestError, match=r"sent b'x' without a descriptor"):
            handover.accept(ours)
        socket.send_fds(theirs, [b"U"], [theirs.fileno()])
        with pytest.raises(GuestError, match="sent another descriptor"):
            handover.accept(ours)
        theirs.close()
        with pytest.raises(GuestError, match="sent nothing"):
            handover.accept(ours)


@needs_kernel
def test_a_process_listens_to_hand_over(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with pytest.raises(GuestError, match=r"socket', where the process should hand its userfaultfd over"):
        handover.fetch(str(path))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        pid = os.fork()
        if pid == 0:
            channel, _ = listener.accept()
            handover.offer(channel)
            while True:
                time.sleep(1)
        try:
            bounds = f"{_ADDRESS:x}-{_ADDRESS + 16 * PAGE_SIZE:x}"
            with open_source(f"process:{pid},range={bounds},handover={path}") as source:
                source.enable_dirty_log()
                assert isinstance(source, HasNotes)
                assert "handed its userfaultfd over" in "".join(source.notes())
            assert is_untouched(pid)
        finally:
            os.kill(pid, 9)
            os.waitpid(pid, 0)


# By comparing


@pytest.fixture
def old_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Linux 6.6, which knows nothing of the last feature."""
    monkeypatch.setitem(userfaultfd.FEATURES, "WP_ASYNC", 1 << 62)


@pytest.mark.usefixtures("old_kernel")
def test_an_old_kernel_gets_the_shadow_and_is_named() -> None:
    with child(16) as process:
        tracker = track(process.pid, process.ranges)
        assert tracker.name == "shadow"
        assert f"kernel {os.uname().release} has no asynchronous write protection" in tracker.why
        process.do("write", 3)
        assert cleaned(tracker, 16) == [3]
        assert is_untouched(process.pid)


@needs_kernel
def test_a_process_that_may_not_be_traced_gets_the_shadow(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Tracer) -> int:
        raise RefusedError("process 5 may not be traced")

    monkeypatch.setattr(Tracer, "userfaultfd", refuse)
    with child(16) as process:
        tracker = track(process.pid, process.ranges)
        why = "memory is compared with a copy, because process 5 may not be traced"
        assert (tracker.name, tracker.why) == ("shadow", why)


def test_a_page_changed_and_changed_back_is_sent_from_the_copy() -> None:
    """Not from memory: there it could be sent as it was in between, and never again."""
    with child(16) as process:
        process.do("write", 3)
        tracker = by_shadow(process)
        assert tracker.copy is not None
        before = bytes(tracker.copy.page(3))
        for _ in range(255):
            process.do("write", 3)
            assert bytes(tracker.copy.page(3)) == before
        process.do("write", 3)
        assert cleaned(tracker, 16) == []
        process.do("write", 3)
        assert cleaned(tracker, 16) == [3]
        assert tracker.copy.pages.tobytes() == process.memory().tobytes()


def test_views_spare_the_shadow_from_reading_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PageReader, "read", None)
    memory = bytearray(600 * PAGE_SIZE)
    ranges = [MemoryRange(0x1000, 600 * PAGE_SIZE, 7)]
    tracker = ShadowTracker(1, ranges, [memoryview(memory)], "")
    memory[599 * PAGE_SIZE] = 1
    assert cleaned(tracker, 607) == [606]


# Pieces


@given(st.sets(st.integers(0, 299)), st.integers(1, 300))
@settings(max_examples=300, deadline=None)
def test_runs_become_bits(written: set[int], size: int) -> None:
    written = {n for n in written if n < size}
    words = PfnBitmap(size).words
    starts = [n for n in sorted(written) if n - 1 not in written]
    ends = [n + 1 for n in sorted(written) if n + 1 not in written]
    edges = np.array([starts, ends], np.uint64).T.reshape(-1)
    split = len(edges) // 4 * 2  # as the kernel answers: in parts, of whole runs
    flip(words, edges[:split])
    flip(words, edges[split:])
    fill_between(words)
    bits = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
    assert bits.tolist() == sorted(written)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([], "at least one range"),
        ([MemoryRange(0x1001, PAGE_SIZE, 0)], "not whole pages"),
        ([MemoryRange(0x1000, 0, 0)], "not whole pages"),
        ([MemoryRange(0x1000, 0x3000, 5), MemoryRange(0x9000, 0x1000, 7)], "PFN 0x7 in common"),
    ],
)
def test_ranges_that_do_not_fit_are_refused(ranges: list[MemoryRange], message: str) -> None:
    with pytest.raises(GuestError, match=message):
        check(ranges)


def test_pages_are_gathered_in_the_order_asked_for() -> None:
    with child(3000) as process:
        process.do("write", *range(3000))
        process.do("read_into", 0, 3000)
        reader = PageReader(process.pid, process.ranges)
        wanted = np.random.default_rng(3).permutation(3000)[:2500]  # more pieces than one call takes
        found = np.frombuffer(reader.read(wanted.astype(np.uint64)), np.uint8).reshape(-1, PAGE_SIZE)
        assert (found == process.memory()[wanted]).all()


def test_a_read_cut_short_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = syscalls.process_vm_readv

    def shortened(pid: int, into: np.ndarray, remote: np.ndarray) -> int:
        into[0, 1] = min(int(into[0, 1]), 5000)
        return whole(pid, into, remote)

    monkeypatch.setattr(syscalls, "process_vm_readv", shortened)
    with child(20) as process:
        process.do("read_into", 0, 20)
        reader = PageReader(process.pid, process.ranges)
        wanted = pfns(3, 4, 9, 1, 2, 19)
        found = np.frombuffer(reader.read(wanted), np.uint8).reshape(-1, PAGE_SIZE)
        assert (found == process.memory()[wanted.astype(np.intp)]).all()


def test_reading_what_is_not_there_names_it() -> None:
    with child(20) as process:
        process.do("unmap", 7, 2)
        reader = PageReader(process.pid, process.ranges)
        with pytest.raises(GuestError, match=f"no readable memory at {process.address + 7 * PAGE_SIZE:#x}"):
            reader.read(pfns(5, 6, 7))
        with pytest.raises(GuestError, match="PFN 0x14 is in no range"):
            reader.read(pfns(20))
