"""Descriptors, exactly: the only file that calls `os.read` and its like.

Every function takes care of short counts, of non-blocking descriptors (it waits) and of vectors that
are longer than the kernel takes. The interpreter itself repeats a call that a signal interrupted
(PEP 475). ``timeout_s`` bounds the wait for one descriptor to become ready, not the whole transfer.

Which call is used for what was measured; see ``spec/architecture.md``, "Moving pages".
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from migstream.errors import DeadlineError

__all__ = [
    "IOV_MAX",
    "file_size",
    "is_pipe",
    "pread",
    "pread_into",
    "read",
    "read_into",
    "read_some",
    "transfer",
    "views",
    "widen_pipe",
    "write_vectors",
]

IOV_MAX = os.sysconf("SC_IOV_MAX") if hasattr(os, "sysconf") else 1024
COPY_CHUNK = 1 << 30  # octets that one copying call is asked for; the kernel caps at 2 GiB
SCRATCH = 256 << 10  # octets of a bounce buffer: as large as stays in a core's cache
PIPE_SIZE = 256 << 10  # the pipe size that moved most, of 64 KiB to 1 MiB
PIPE_PORTION = PIPE_SIZE // 2  # octets of one write to a pipe, so that its reader gets in between
F_SETPIPE_SZ = 1031  # linux/fcntl.h; in Python's fcntl module since 3.10

# What a kernel answers when it cannot do a copy between this pair of descriptors.
_CANNOT = {
    errno.EINVAL,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EXDEV,
    errno.EBADF,
    errno.ETXTBSY,
    errno.EPERM,
}


def file_size(fd: int) -> int | None:
    """Return the size of a regular file or block device, ``None`` for what cannot be seeked."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return os.fstat(fd).st_size
    if stat.S_ISBLK(mode):
        here = os.lseek(fd, 0, os.SEEK_CUR)
        end = os.lseek(fd, 0, os.SEEK_END)
        os.lseek(fd, here, os.SEEK_SET)
        return end
    return None


def is_pipe(fd: int) -> bool:
    """Whether ``fd`` is a pipe, which splice needs on one side."""
    return stat.S_ISFIFO(os.fstat(fd).st_mode)


def widen_pipe(fd: int) -> None:
    """Give a pipe the size that moves pages fastest; do nothing where that is not allowed."""
    import fcntl

    with contextlib.suppress(OSError):
        if is_pipe(fd) and fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) < PIPE_SIZE:
            fcntl.fcntl(fd, F_SETPIPE_SZ, PIPE_SIZE)


def _wait(fd: int, event: int, timeout_s: float | None) -> None:
    poll = select.poll()
    poll.register(fd, event)
    if not poll.poll(None if timeout_s is None else timeout_s * 1000):
        doing = "readable" if event == select.POLLIN else "writable"
        raise DeadlineError(f"descriptor {fd} was not {doing} for {timeout_s:g} s")


def _read_ready(fd: int, timeout_s: float | None) -> None:
    """Wait for input only where a time limit asks for it; otherwise the read itself blocks."""
    if timeout_s is not None:
        _wait(fd, select.POLLIN, timeout_s)


def read(fd: int, length: int, timeout_s: float | None = None) -> bytes:
    """Read ``length`` octets, fewer only at the end of input; never more than were there to read.

    The buffer grows with what arrives, so a large ``length`` by itself costs nothing.
    """
    pieces = []
    while length > 0:
        piece = read_some(fd, length, timeout_s)
        if not piece:
            break
        pieces.append(piece)
        length -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def read_some(fd: int, length: int, timeout_s: float | None = None) -> bytes:
    """Read what is there, at least one octet and ``length`` at most; none only at the end of input."""
    while True:
        _read_ready(fd, timeout_s)
        try:
            return os.read(fd, min(length, 1 << 20))
        except BlockingIOError:
            _wait(fd, select.POLLIN, timeout_s)


def views(buffers: Iterable[memoryview]) -> list[memoryview]:
    """Return ``buffers`` as flat views of octets, without the empty ones."""
    return [
        view.cast("B") if view.format != "B" or view.ndim != 1 else view for view in buffers if view.nbytes
    ]


def _advance(vectors: list[memoryview], first: int, done: int) -> int:
    """Return the index of the first vector that is not finished after ``done`` octets more."""
    while done:
        view = vectors[first]
        if done < len(view):
            vectors[first] = view[done:]
            return first
        done -= len(view)
        first += 1
    return first


def read_into(fd: int, buffers: Iterable[memoryview], timeout_s: float | None = None) -> int:
    """Fill writable ``buffers`` in turn; return the octets read, fewer only at the end of input."""
    vectors = views(buffers)
    first = total = 0
    while first < len(vectors):
        _read_ready(fd, timeout_s)
        try:
            done = os.readv(fd, vectors[first : first + IOV_MAX])
        except BlockingIOError:
            _wait(fd, select.POLLIN, timeout_s)
            continue
        if not done:
            break
        total += done
        first = _advance(vectors, first, done)
    return total


def pread(fd: int, length: int, offset: int) -> bytes:
    """Read up to ``length`` octets at ``offset`` of a file; fewer only at its end."""
    piece = os.pread(fd, length, offset)
    while piece and len(piece) < length:
        more = os.pread(fd, length - len(piece), offset + len(piece))
        if not more:
            break
        piece += more
    return piece


def pread_into(fd: int, buffers: Iterable[memoryview], offset: int) -> int:
    """Fill writable ``buffers`` in turn from ``offset``; return the octets read, fewer only at the end."""
    vectors = views(buffers)
    first = total = 0
    while first < len(vectors):
        done = os.preadv(fd, vectors[first : first + IOV_MAX], offset + total)
        if not done:
            break
        total += done
        first = _advance(vectors, first, done)
    return total


def write_vectors(
    fd: int, buffers: Sequence[bytes | bytearray | memoryview], timeout_s: float | None = None
) -> int:
    """Write all of ``buffers`` in turn, without joining them; return the octets written.

    Raises `BrokenPipeError` when the reader has gone and `DeadlineError` when it stops reading.
    """
    vectors = views(memoryview(buffer) for buffer in buffers)
    limited = timeout_s is not None and file_size(fd) is None
    write = partial(_write_now, timeout_s=timeout_s) if limited else os.writev
    to_pipe = sum(map(len, vectors)) > PIPE_PORTION and is_pipe(fd)
    first = total = 0
    while first < len(vectors):
        vector = _portion(vectors, first) if to_pipe else vectors[first : first + IOV_MAX]
        try:
            done = write(fd, vector)
        except BlockingIOError:
            _wait(fd, select.POLLOUT, timeout_s)
            continue
        total += done
        first = _advance(vectors, first, done)
    return total


def _portion(vectors: list[memoryview], first: int) -> list[memoryview]:
    """Return what one write to a pipe takes of ``vectors`` from ``first`` on.

    A write holds the pipe's lock until the pipe is full, and the reader's read until it is empty: without
    portions the two would take turns instead of working at the same time.
    """
    portion: list[memoryview] = []
    room = PIPE_PORTION
    for view in vectors[first : first + PIPE_PORTION // 4096]:
        portion.append(view[:room])
        room -= len(view)
        if room <= 0:
            break
    return portion


def _write_now(fd: int, vectors: list[memoryview], timeout_s: float | None) -> int:
    """Write what fits without blocking, also where the descriptor blocks.

    The descriptor itself is not made non-blocking: other processes may share it.
    """
    try:
        return os.pwritev(fd, vectors, -1, os.RWF_NOWAIT)  # -1: in sequence
    except OSError as exc:
        if exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
    # Pipes and sockets before Linux 6.4: room for PIPE_BUF is what poll promises.
    _wait(fd, select.POLLOUT, timeout_s)
    return os.write(fd, vectors[0][: select.PIPE_BUF])


def transfer(
    source: int,
    target: int,
    length: int,
    offset: int | None = None,
    timeout_s: float | None = None,
    target_timeout_s: float | None = None,
) -> int:
    """Move ``length`` octets from one descriptor to another; return how many, fewer only at the end.

    ``offset`` is where to read in a file (its own position then stays), ``None`` for a descriptor that
    is read in sequence. Within the kernel where it can: copy_file_range between files, splice where one
    side is a pipe, sendfile from a file; else through a buffer of 256 KiB. ``timeout_s`` bounds each wait
    for the source, ``target_timeout_s`` each for the target.
    """
    moved = 0
    for mover in _movers(source, target, offset, limited=target_timeout_s is not None):
        while moved < length:
            if timeout_s is not None:
                _wait_for_source(source, timeout_s)
            try:
                done = mover(min(length - moved, COPY_CHUNK), moved)
            except BlockingIOError:
                _wait_for_source(source, timeout_s)
                _wait(target, select.POLLOUT, target_timeout_s)
                continue
            except OSError as exc:
                if exc.errno not in _CANNOT:
                    raise
                break  # not between these two: the next way
            if not done:
                break
            moved += done
        if moved == length:
            return moved
    rest = None if offset is None else offset + moved
    return moved + _bounce(source, target, length - moved, rest, timeout_s, target_timeout_s)


#: An in-kernel way to move octets: a call of (length, already moved) that returns how many went.
_Mover = Callable[[int, int], int]


def _movers(source: int, target: int, offset: int | None, *, limited: bool) -> Iterator[_Mover]:
    """Yield the ways to try, best first; ``limited``: only such as never block on the target."""

    def at(moved: int) -> int | None:
        return None if offset is None else offset + moved

    target_mode = os.fstat(target).st_mode
    if offset is not None and stat.S_ISREG(target_mode):
        yield lambda length, moved: os.copy_file_range(source, target, length, at(moved))
    if stat.S_ISFIFO(target_mode):
        flags = os.SPLICE_F_NONBLOCK if limited else 0
        yield lambda length, moved: os.splice(source, target, length, at(moved), None, flags)
    elif limited and not stat.S_ISREG(target_mode):
        return
    elif offset is not None:
        yield lambda length, moved: os.sendfile(target, source, at(moved), length)
    elif is_pipe(source):
        yield lambda length, moved: os.splice(source, target, length)


def _wait_for_source(source: int, timeout_s: float | None) -> None:
    if file_size(source) is None:
        _wait(source, select.POLLIN, timeout_s)


def _bounce(
    source: int,
    target: int,
    length: int,
    offset: int | None,
    timeout_s: float | None,
    target_timeout_s: float | None,
) -> int:
    buffer = memoryview(bytearray(min(length, SCRATCH)))
    moved = 0
    while moved < length:
        piece = buffer[: min(len(buffer), length - moved)]
        if offset is None:
            got = read_into(source, [piece], timeout_s)
        else:
            got = pread_into(source, [piece], offset + moved)
        write_vectors(target, [piece[:got]], target_timeout_s)
        moved += got
        if got < len(piece):
            break
    return moved
