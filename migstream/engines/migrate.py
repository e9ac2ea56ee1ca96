"""Both ends of a migration in one process: save from one guest, restore into another.

The sender runs in a thread of its own; both spend their time in the kernel, which moves the pages.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from migstream.engines.channel import ChannelError
from migstream.engines.restore import RestoreResult
from migstream.engines.save import SaveResult, owning
from migstream.guests.protocols import SaveSource

__all__ = ["Channel", "MigrateResult", "Receiver", "Sender", "Transport", "migrate", "open_channel"]


class Transport(Enum):
    """What connects the two ends."""

    PIPE = "pipe"
    SOCKET = "socket"
    TCP = "tcp"


@dataclass
class Channel:
    """A one-way channel: a descriptor to write to, and one to read from. Closing twice is harmless."""

    writable: int
    readable: int

    def close_writable(self) -> None:
        """Tell the reader that nothing more comes."""
        self.writable = _closed(self.writable)

    def close_readable(self) -> None:
        """Tell the writer that nobody reads any more."""
        self.readable = _closed(self.readable)


def _closed(fd: int) -> int:
    if fd >= 0:
        os.close(fd)
    return -1


@contextlib.contextmanager
def open_channel(transport: Transport) -> Iterator[Channel]:
    """Open a channel; TCP goes through the loopback interface."""
    if transport is Transport.PIPE:
        readable, writable = os.pipe()
        channel = Channel(writable, readable)
    else:
        sender, receiver = socket.socketpair() if transport is Transport.SOCKET else _tcp_pair()
        channel = Channel(sender.detach(), receiver.detach())
    try:
        yield channel
    finally:
        channel.close_writable()
        channel.close_readable()


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=1) as listener:
        sender = socket.create_connection(listener.getsockname())
        try:
            receiver, peer = listener.accept()
        except BaseException:
            sender.close()
            raise
    if peer != sender.getsockname():  # somebody else was quicker
        sender.close()
        receiver.close()
        raise ChannelError(f"a stranger, {peer}, connected to the migration's port")
    return sender, receiver


#: What runs an end: called with its descriptor, and with its end of COLO's back channel.
Sender = Callable[[int, int], SaveResult]
Receiver = Callable[[int, int], RestoreResult]


@dataclass(frozen=True)
class MigrateResult:
    """What the two ends did."""

    save: SaveResult
    restore: RestoreResult


def migrate(
    source: SaveSource,
    send: Sender,
    receive: Receiver,
    *,
    transport: Transport = Transport.PIPE,
) -> MigrateResult:
    """Run ``send`` and ``receive`` against each other until both are done, and return what they did.

    ::

        migrate(
            source,
            lambda fd, back: save(source, fd, live=True),
            lambda fd, back: restore(target, fd),
        )

    When either end fails, the other is told by its descriptor closing, the guest runs on at the source,
    and the error of whichever failed first is raised: the other's only says that the channel broke.
    """
    sent: list[SaveResult] = []
    failures: list[BaseException] = []
    # A save may be complete, and its guest suspended, before the receiver fails.
    with owning(source), open_channel(transport) as forth, open_channel(Transport.SOCKET) as back:

        def run_sender() -> None:
            with _noting(failures):
                sent.append(send(forth.writable, back.readable))
            forth.close_writable()
            back.close_readable()

        sender = threading.Thread(target=run_sender, name="save")
        sender.start()
        received: list[RestoreResult] = []
        with _noting(failures):
            received.append(receive(forth.readable, back.writable))
        forth.close_readable()
        back.close_writable()
        sender.join()
        if failures:
            raise failures[0]
    return MigrateResult(sent[0], received[0])


@contextlib.contextmanager
def _noting(failures: list[BaseException]) -> Iterator[None]:
    try:
        yield
    except BaseException as exc:  # raised again by the thread that waits for both ends
        failures.append(exc)
