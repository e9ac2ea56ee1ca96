"""Between an engine's descriptor and the connection: nothing, or a pipe and a thread that makes chunks.

A bare stream goes to the socket's own descriptor, so that the engine's pages go from the guest's memory to
the kernel and back without a copy in between.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

from migstream.engines.migrate import Transport, open_channel
from migstream.errors import FormatError, MigstreamError, TruncatedError
from migstream.io import fd as fdio
from migstream.transport.errors import ConnectionLostError
from migstream.transport.framing import CHUNK, HEAD_SIZE, LARGEST, SLACK, ChunkReader, ChunkWriter
from migstream.transport.link import Link
from migstream.transport.messages import Content, Failed

__all__ = ["incoming", "outgoing"]

DRAIN_S = 1.0  # for the receiver's thread to notice that nobody takes its octets any more


class _Pump:
    """A thread that moves octets. ``failure`` is set before ``close`` tells the engine that it ended."""

    def __init__(self, move: Callable[[], None], close: Callable[[], None]) -> None:
        self.failure: BaseException | None = None
        self._move, self._close = move, close
        self._thread = threading.Thread(target=self._run, name="transport")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._move()
        except BaseException as exc:  # raised again by the thread that waits
            self.failure = exc
        finally:
            self._close()

    def join(self, seconds: float | None = None) -> bool:
        """Wait for the thread; return whether it has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def check(self) -> None:
        """Raise what it failed with."""
        if self.failure is not None:
            raise self.failure


@contextlib.contextmanager
def outgoing(link: Link, writer: ChunkWriter | None) -> Iterator[int]:
    """Yield the descriptor to write the stream to; ``writer`` makes chunks of it, if it is to have any.

    When the block ends, all of the stream is on its way. When the connection fails, the error is the other
    end's own reason, if it gave one. When the block fails, the connection is cut.
    """
    try:
        with _bare(link) if writer is None else _chunks_out(link, writer) as fd:
            yield fd
    except MigstreamError as exc:
        told = link.explained(exc)
        link.abort()
        if told is exc:
            raise
        raise told from exc
    except BaseException:
        link.abort()
        raise


@contextlib.contextmanager
def incoming(link: Link, reader: ChunkReader | None) -> Iterator[int]:
    """Yield the descriptor to read the stream from; ``reader`` takes it out of chunks, if it comes in such.

    When the block fails, the connection can still be written to.
    """
    try:
        with _bare(link) if reader is None else _chunks_in(link, reader) as fd:
            yield fd
    except TruncatedError as exc:
        raise ConnectionLostError(
            f"{link.peer} closed the connection in the midst of the stream ({exc}); its own message says why"
        ) from exc


@contextlib.contextmanager
def _bare(link: Link) -> Iterator[int]:
    link.sock.settimeout(None)  # the engines wait for themselves
    yield link.sock.fileno()


@contextlib.contextmanager
def _chunks_out(link: Link, writer: ChunkWriter) -> Iterator[int]:
    with open_channel(Transport.PIPE) as pipe:
        pump = _Pump(lambda: _send_chunks(pipe.readable, link, writer), pipe.close_readable)
        try:
            yield pipe.writable
            pipe.close_writable()
            pump.join()
        except BaseException as exc:
            first = pump.failure
            if first is None:
                link.abort()  # before the end of the pipe can be taken for the end of the stream
            pipe.close_writable()
            pump.join()
            if isinstance(first, MigstreamError):
                raise first from exc
            raise
        pump.check()


def _send_chunks(fd: int, link: Link, writer: ChunkWriter) -> None:
    while octets := fdio.read_some(fd, CHUNK):
        if link.readable:  # out of turn: it gives up
            link.receive(Failed, "the stream was sent")
        link.write(*writer.chunk(octets))
    link.write(writer.end())


@contextlib.contextmanager
def _chunks_in(link: Link, reader: ChunkReader) -> Iterator[int]:
    with open_channel(Transport.PIPE) as pipe:
        fdio.widen_pipe(pipe.writable)
        pump = _Pump(lambda: _take_chunks(link, reader, pipe.writable), pipe.close_writable)
        try:
            yield pipe.readable
            if fdio.read_some(pipe.readable, 1, link.timeout_s):
                raise FormatError(
                    "more octets follow the stream's last record",
                    layer="transport",
                    hint="what was sent is not one stream",
                )
            pump.join()
        except BaseException as exc:
            first = pump.failure
            pipe.close_readable()
            if not pump.join(DRAIN_S):
                with contextlib.suppress(OSError):
                    link.sock.shutdown(socket.SHUT_RD)
                pump.join()
            if isinstance(first, MigstreamError):
                raise first from exc
            raise
        pump.check()


def _take_chunks(link: Link, reader: ChunkReader, fd: int) -> None:
    buffer = memoryview(bytearray(LARGEST + SLACK))
    while True:
        chunk = reader.head(link.read(HEAD_SIZE))
        stored = buffer[: chunk.stored]
        link.read_into(stored)
        octets = reader.content(chunk, stored)
        if chunk.content == Content.END:
            return
        fdio.write_vectors(fd, [octets])
