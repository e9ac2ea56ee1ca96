"""Descriptors: exact reads and writes, deadlines, and octets moved between every pair of kinds."""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from migstream.errors import DeadlineError
from migstream.io import fd as fdio
from tests.build import fed

NEVER = 30.0  # seconds: a limit that only a hang can reach
SOON = 0.05  # seconds: a limit that is meant to pass


def some(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


@contextmanager
def pipe(*, blocking: bool = True) -> Iterator[tuple[int, int]]:
    """Give (reading end, writing end); either may be closed inside."""
    ends = os.pipe()
    for end in ends:
        os.set_blocking(end, blocking)
    try:
        yield ends
    finally:
        for end in ends:
            with suppress(OSError):
                os.close(end)


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def in_thread(action: Callable[[], object]) -> Iterator[None]:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join(NEVER)
        assert not thread.is_alive()


def read_all(descriptor: int, into: bytearray) -> None:
    while piece := os.read(descriptor, 1 << 16):
        into += piece


# Reading


@pytest.mark.parametrize("piece", [1, 7, 4096])
def test_read_takes_as_many_octets_as_asked_however_they_arrive(piece: int) -> None:
    octets = some(3000)
    with fed(octets, piece=piece) as descriptor:
        assert fdio.read(descriptor, 1000) == octets[:1000]
        assert fdio.read(descriptor, 0) == b""
        assert fdio.read(descriptor, 5000) == octets[1000:]
        assert fdio.read(descriptor, 1) == b""


def test_read_leaves_what_was_not_asked_for() -> None:
    with pipe() as (reader, writer):
        os.write(writer, b"asked for|left")
        assert fdio.read(reader, 9) == b"asked for"
        assert os.read(reader, 100) == b"|left"


def test_some_is_what_is_there_and_nothing_only_at_the_end() -> None:
    with pipe() as (reader, writer):
        os.write(writer, b"octets")
        assert fdio.read_some(reader, 4) == b"octe"
        assert fdio.read_some(reader, 100) == b"ts"
        os.close(writer)
        assert fdio.read_some(reader, 100) == b""


def test_a_large_length_by_itself_allocates_nothing() -> None:
    import tracemalloc

    with fed(b"short") as descriptor:
        tracemalloc.start()
        try:
            assert fdio.read(descriptor, 1 << 40) == b"short"
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize("sizes", [[10], [1, 0, 2, 3], [5000, 1, 70000], [0]])
def test_read_into_fills_buffers_in_turn(sizes: list[int]) -> None:
    octets = some(sum(sizes) + 3)
    buffers = [bytearray(size) for size in sizes]
    with fed(octets, piece=999) as descriptor:
        assert fdio.read_into(descriptor, map(memoryview, buffers)) == sum(sizes)
        assert b"".join(buffers) == octets[:-3]
        rest = bytearray(9)
        assert fdio.read_into(descriptor, [memoryview(rest)]) == 3
        assert rest == octets[-3:] + bytes(6)


def test_vectors_longer_than_iov_max_are_read_and_written_whole(tmp_path: Path) -> None:
    count = 2 * fdio.IOV_MAX + 7
    octets = some(3 * count)
    vectors = [octets[i : i + 3] for i in range(0, len(octets), 3)]
    buffers = [bytearray(3) for _ in vectors]
    with opened(tmp_path / "file", os.O_RDWR | os.O_CREAT) as file:
        assert fdio.write_vectors(file, vectors) == len(octets)
        assert fdio.pread_into(file, map(memoryview, buffers), 0) == len(octets)
    assert b"".join(buffers) == octets
    again = [bytearray(3) for _ in vectors]
    with fed(octets, piece=1000) as descriptor:
        assert fdio.read_into(descriptor, map(memoryview, again)) == len(octets)
    assert again == buffers


def test_buffers_of_any_shape_count_by_their_octets() -> None:
    import numpy as np

    pages = np.zeros((2, 4), np.uint64)
    octets = some(64)
    with fed(octets) as descriptor:
        assert fdio.read_into(descriptor, [pages.data]) == 64
    assert pages.tobytes() == octets
    with pipe() as (reader, writer):
        assert fdio.write_vectors(writer, [pages.data, b"", b"!"]) == 65
        assert os.read(reader, 100) == octets + b"!"


def test_pread_stops_at_the_end_of_a_file_and_leaves_its_position(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    with opened(tmp_path / "file", os.O_RDONLY) as file:
        assert fdio.pread(file, 4, 3) == b"3456"
        assert fdio.pread(file, 40, 8) == b"89"
        assert fdio.pread(file, 4, 10) == b""
        buffer = bytearray(4)
        assert fdio.pread_into(file, [memoryview(buffer)], 8) == 2
        assert os.lseek(file, 0, os.SEEK_CUR) == 0


def test_short_preads_are_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    whole_pread, whole_preadv = os.pread, os.preadv
    monkeypatch.setattr(os, "pread", lambda fd, n, at: whole_pread(fd, min(n, 3), at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: whole_preadv(fd, [views[0][:3]], at))
    with opened(tmp_path / "file", os.O_RDONLY) as file:
        assert fdio.pread(file, 8, 1) == b"12345678"
        assert fdio.pread(file, 99, 0) == b"0123456789"
        buffer = bytearray(8)
        assert fdio.pread_into(file, [memoryview(buffer)], 1) == 8
        assert buffer == b"12345678"


def test_a_signal_during_a_read_is_no_end_of_input() -> None:
    octets = some(64)
    hits: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: hits.append(number))
    try:
        with pipe() as (reader, writer):

            def write_slowly() -> None:
                for octet in octets:
                    time.sleep(0.002)
                    os.write(writer, bytes([octet]))

            with in_thread(write_slowly):
                signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
                buffer = bytearray(32)
                assert fdio.read(reader, 32, NEVER) == octets[:32]
                assert fdio.read_into(reader, [memoryview(buffer)]) == 32
                assert buffer == octets[32:]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert hits


# Non-blocking descriptors and deadlines


def test_a_non_blocking_descriptor_is_waited_for() -> None:
    octets = some(300_000)
    with pipe(blocking=False) as (reader, writer):

        def write() -> None:
            time.sleep(SOON)
            fdio.write_vectors(writer, [octets])
            os.close(writer)

        with in_thread(write):
            assert fdio.read(reader, 5) == octets[:5]
            buffer = bytearray(400_000)
            assert fdio.read_into(reader, [memoryview(buffer)]) == len(octets) - 5
            assert buffer[: len(octets) - 5] == octets[5:]


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_silent_sender_is_a_deadline_error_at_every_way_to_read(
    kind: str, blocking: bool, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        if kind == "pipe":
            reader = stack.enter_context(pipe(blocking=blocking))[0]
        else:
            ours, theirs = socket.socketpair()
            stack.enter_context(ours)
            stack.enter_context(theirs)
            ours.setblocking(blocking)
            reader = ours.fileno()
        target = stack.enter_context(opened(tmp_path / "out", os.O_WRONLY | os.O_CREAT))
        with pytest.raises(DeadlineError, match=r"not readable for 0\.05 s"):
            fdio.read(reader, 1, SOON)
        with pytest.raises(DeadlineError):
            fdio.read_into(reader, [memoryview(bytearray(1))], SOON)
        with pytest.raises(DeadlineError):
            fdio.transfer(reader, target, 1, timeout_s=SOON)


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("kind", ["pipe", "socket"])
@pytest.mark.parametrize("source_kind", ["memory", "file", "pipe", "socket"])
def test_a_receiver_that_stops_reading_is_a_deadline_error_at_every_way_to_write(
    source_kind: str, kind: str, blocking: bool, tmp_path: Path
) -> None:
    octets = bytes(4 << 20)
    with ExitStack() as stack:
        if kind == "pipe":
            target = stack.enter_context(pipe(blocking=blocking))[1]
        else:
            ours, theirs = socket.socketpair()
            stack.enter_context(ours)
            stack.enter_context(theirs)
            ours.setblocking(blocking)
            target = ours.fileno()
        if source_kind == "memory":
            source, offset = -1, None
        elif source_kind == "file":
            (tmp_path / "in").write_bytes(octets)
            source, offset = stack.enter_context(opened(tmp_path / "in", os.O_RDONLY)), 0
        elif source_kind == "pipe":
            source, offset = stack.enter_context(fed(octets)), None
        else:
            one, other = socket.socketpair()
            stack.enter_context(one)
            stack.enter_context(in_thread(lambda: send_until_closed(other, octets)))
            stack.callback(one.shutdown, socket.SHUT_RDWR)
            source, offset = one.fileno(), None
        with pytest.raises(DeadlineError, match="not writable"):
            fdio.write_vectors(target, [octets], SOON) if source_kind == "memory" else fdio.transfer(
                source, target, len(octets), offset, NEVER, SOON
            )


def send_until_closed(sender: socket.socket, octets: bytes) -> None:
    with sender, suppress(OSError):
        sender.sendall(octets)


@pytest.mark.parametrize("missing", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_write_deadline_holds_on_kernels_without_nowait_writes(
    missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> int:
        raise OSError(missing, os.strerror(missing))

    monkeypatch.setattr(os, "pwritev", refuse)
    octets = some(200_000)
    with pipe() as (_, writer), pytest.raises(DeadlineError):
        fdio.write_vectors(writer, [octets], SOON)
    with pipe() as (reader, writer):
        got = bytearray()
        with in_thread(lambda: read_all(reader, got)):
            assert fdio.write_vectors(writer, [octets], NEVER) == len(octets)
            os.close(writer)
        assert got == octets


def test_a_write_within_its_deadline_is_whole_and_leaves_the_descriptor_blocking() -> None:
    octets = some(1 << 20)
    with pipe() as (reader, writer):
        got = bytearray()
        with in_thread(lambda: read_all(reader, got)):
            assert fdio.write_vectors(writer, [octets[:5], octets[5:]], NEVER) == len(octets)
            assert os.get_blocking(writer)
            os.close(writer)
        assert got == octets


def test_a_file_has_no_deadline(tmp_path: Path) -> None:
    with opened(tmp_path / "file", os.O_WRONLY | os.O_CREAT) as file:
        assert fdio.write_vectors(file, [b"octets"], SOON) == 6


def test_a_reader_that_has_gone_is_a_broken_pipe(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(bytes(100))
    for timeout_s in (None, NEVER):
        with pipe() as (reader, writer), opened(tmp_path / "in", os.O_RDONLY) as file:
            os.close(reader)
            with pytest.raises(BrokenPipeError):
                fdio.write_vectors(writer, [b"x"], timeout_s)
            with pytest.raises(BrokenPipeError):
                fdio.transfer(file, writer, 100, 0, target_timeout_s=timeout_s)


# Moving octets


def sources(octets: bytes, path: Path, stack: ExitStack) -> dict[str, tuple[int, int | None]]:
    """Return (descriptor, offset) of each kind of source; all give ``octets``."""
    path.write_bytes(b"before" + octets + b"behind")
    one, other = socket.socketpair()
    stack.enter_context(one)
    stack.enter_context(in_thread(lambda: send_until_closed(other, octets + b"behind")))
    stack.callback(one.shutdown, socket.SHUT_RDWR)
    positioned = stack.enter_context(opened(path, os.O_RDONLY))
    os.lseek(positioned, 6, os.SEEK_SET)
    return {
        "file": (stack.enter_context(opened(path, os.O_RDONLY)), 6),
        "file in sequence": (positioned, None),
        "pipe": (stack.enter_context(fed(octets + b"behind", piece=10_000)), None),
        "socket": (one.fileno(), None),
    }


KINDS = ["file", "file in sequence", "pipe", "socket"]


@pytest.mark.parametrize("limit", [None, NEVER])
@pytest.mark.parametrize("source_kind", KINDS)
@pytest.mark.parametrize("target_kind", ["file", "appended file", "pipe", "socket", "/dev/null"])
def test_octets_move_between_every_pair_of_descriptors(
    source_kind: str, target_kind: str, limit: float | None, tmp_path: Path
) -> None:
    octets = some(700_001)
    got = bytearray()
    with ExitStack() as stack:
        source, offset = sources(octets, tmp_path / "in", stack)[source_kind]
        out = tmp_path / "out"
        if target_kind in ("pipe", "socket"):
            if target_kind == "pipe":
                reader, target = os.pipe()
            else:
                one, other = socket.socketpair()
                reader, target = one.detach(), other.detach()
            with in_thread(lambda: read_all(reader, got)):
                moved = fdio.transfer(source, target, len(octets), offset, limit, limit)
                os.close(target)
            os.close(reader)
        else:
            append = os.O_APPEND if target_kind == "appended file" else 0
            path = Path(os.devnull) if target_kind == "/dev/null" else out
            flags = os.O_WRONLY | append | (0 if target_kind == "/dev/null" else os.O_CREAT)
            with opened(path, flags) as target:
                fdio.write_vectors(target, [b"start"])
                moved = fdio.transfer(source, target, len(octets), offset, limit, limit)
            got += out.read_bytes()[5:] if out.exists() else octets
        assert moved == len(octets)
        assert got == octets
        # What is behind is still there; a file read at an offset keeps its own position.
        assert os.read(source, 100)[:6] == (b"behind" if offset is None else b"before")


@pytest.mark.parametrize("source_kind", KINDS)
def test_a_source_that_ends_early_moves_what_there_is(source_kind: str, tmp_path: Path) -> None:
    octets = some(5000)
    with ExitStack() as stack:
        source, offset = sources(octets, tmp_path / "in", stack)[source_kind]
        with opened(tmp_path / "out", os.O_WRONLY | os.O_CREAT) as target:
            assert fdio.transfer(source, target, 1 << 40, offset) == 5006
        assert (tmp_path / "out").read_bytes() == octets + b"behind"


@pytest.mark.parametrize("source_blocking", [True, False])
def test_octets_move_between_non_blocking_pipes(source_blocking: bool) -> None:
    octets = some(500_000)
    got = bytearray()
    with pipe(blocking=False) as (middle_reader, middle_writer), fed(octets, piece=3333) as source:
        os.set_blocking(source, source_blocking)

        def drain() -> None:
            while piece := fdio.read(middle_reader, 1000):
                got.extend(piece)

        with in_thread(drain):
            assert fdio.transfer(source, middle_writer, len(octets)) == len(octets)
            os.close(middle_writer)
    assert got == octets


def test_every_in_kernel_way_that_a_kernel_refuses_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> int:
        raise OSError(errno.EXDEV, "not between these")

    for name in ("copy_file_range", "sendfile", "splice"):
        monkeypatch.setattr(os, name, refuse)
    octets = some(600_000)
    for kind in KINDS:
        with ExitStack() as stack:
            source, offset = sources(octets, tmp_path / "in", stack)[kind]
            target = stack.enter_context(opened(tmp_path / kind, os.O_WRONLY | os.O_CREAT))
            assert fdio.transfer(source, target, len(octets), offset) == len(octets)
            assert (tmp_path / kind).read_bytes() == octets


def test_an_error_that_is_not_about_the_way_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "no space")

    (tmp_path / "in").write_bytes(bytes(100))
    monkeypatch.setattr(os, "copy_file_range", full)
    with (
        opened(tmp_path / "in", os.O_RDONLY) as source,
        opened(tmp_path / "out", os.O_WRONLY | os.O_CREAT) as target,
        pytest.raises(OSError, match="no space"),
    ):
        fdio.transfer(source, target, 100, 0)


def test_nothing_is_moved_when_nothing_is_asked_for(tmp_path: Path) -> None:
    with pipe() as (reader, writer), opened(tmp_path / "out", os.O_WRONLY | os.O_CREAT) as target:
        os.write(writer, b"left")
        assert fdio.transfer(reader, target, 0) == 0
        assert os.read(reader, 9) == b"left"


# What a descriptor is


def test_only_files_have_a_size(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(12))
    with opened(tmp_path / "file", os.O_RDONLY) as file, pipe() as (reader, _):
        assert fdio.file_size(file) == 12
        assert fdio.file_size(reader) is None
        assert (fdio.is_pipe(reader), fdio.is_pipe(file)) == (True, False)


def test_a_block_device_is_measured_by_seeking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import stat

    (tmp_path / "disk").write_bytes(bytes(12))
    monkeypatch.setattr(stat, "S_ISREG", lambda mode: False)
    monkeypatch.setattr(stat, "S_ISBLK", lambda mode: True)
    with opened(tmp_path / "disk", os.O_RDONLY) as disk:
        os.lseek(disk, 5, os.SEEK_SET)
        assert fdio.file_size(disk) == 12
        assert os.lseek(disk, 0, os.SEEK_CUR) == 5


def test_a_pipe_is_widened_and_anything_else_left_alone(tmp_path: Path) -> None:
    import fcntl

    with pipe() as (reader, writer), opened(tmp_path / "file", os.O_RDONLY | os.O_CREAT) as file:
        fdio.widen_pipe(reader)
        assert fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ) == fdio.PIPE_SIZE
        fdio.widen_pipe(file)
