"""One end of a connection: octets and messages, limits on waiting, and errors that name the other end."""

from __future__ import annotations

import array
import contextlib
import fcntl
import select
import socket
import ssl
import termios
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self, TypeVar

from migstream.errors import DeadlineError, FormatError, MigstreamError
from migstream.text import decode
from migstream.transport.errors import ConnectionLostError, ProtocolError, RemoteError, TlsError
from migstream.transport.messages import (
    LONGEST_BODY,
    MAGIC,
    MESSAGES,
    Failed,
    Message,
    MessageHead,
    Refuse,
)
from migstream.transport.tls import TLS_HINT, explain

__all__ = ["Link"]

M = TypeVar("M", bound=Message)

SILENCE_S = 30  # without --timeout: a host that confirms nothing for so long is dead
KEEPALIVE = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 4}  # 30 s in all
LAST_WORD_S = 2.0  # for a reason to reach the other end, before the connection is closed
TLS_RECORD = b"\x15\x03", b"\x16\x03"  # how an alert and a hand-shake begin


class Link:
    """A connected socket, plain or TLS. Close it, or use it as a context manager.

    ``peer`` is what errors call the other end; ``timeout_s`` bounds each wait for it. Without one, a host
    that is dead is told from one that is busy: by TCP's own means, after half a minute.
    ``sent`` counts octets of messages and chunks.
    """

    def __init__(self, sock: socket.socket, *, peer: str, timeout_s: float | None) -> None:
        self.sock = sock
        self.peer = peer
        self.timeout_s = timeout_s
        self.sent = 0
        self._deadline: float | None = None
        self._allowed_s = timeout_s  # what an error says that was waited
        if sock.family != socket.AF_UNIX:
            _watch_host(sock, timeout_s or SILENCE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sock.close()

    @property
    def is_tls(self) -> bool:
        """Whether the connection is encrypted."""
        return isinstance(self.sock, ssl.SSLSocket)

    # Limits

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Bound everything in the block together, whatever ``timeout_s`` is."""
        self._deadline, self._allowed_s = time.monotonic() + seconds, seconds
        try:
            yield
        finally:
            self._deadline, self._allowed_s = None, self.timeout_s

    def _limit(self) -> float | None:
        """Return the seconds that the next call may wait."""
        if self._deadline is None:
            return self.timeout_s
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left if self.timeout_s is None else min(left, self.timeout_s)

    @contextlib.contextmanager
    def _calling(self, doing: str) -> Iterator[None]:
        """Turn what a socket raises into errors that name the other end."""
        try:
            yield
        except TimeoutError as exc:
            if exc.errno is None:
                raise DeadlineError(
                    f"{self.peer} did nothing for {self._allowed_s:g} s while {doing}"
                ) from None
            raise ConnectionLostError(f"{self.peer} is dead to the network: {exc.strerror}") from exc
        except ssl.SSLEOFError:
            raise self._gone(doing) from None
        except ssl.SSLError as exc:
            raise explain(exc, self.peer) from exc
        except OSError as exc:
            raise ConnectionLostError(
                f"the connection to {self.peer} broke while {doing}: {exc.strerror}"
            ) from exc

    def _gone(self, doing: str) -> ConnectionLostError:
        return ConnectionLostError(
            f"{self.peer} closed the connection while {doing}; its own message says why"
        )

    # Octets

    def write(self, *buffers: bytes | memoryview, doing: str = "the stream was sent") -> None:
        """Send ``buffers`` in turn, at once. Raises `ConnectionLostError`, `DeadlineError` and `TlsError`."""
        for buffer in buffers:
            with self._calling(doing):
                self.sock.settimeout(self._limit())
                self.sock.sendall(buffer)
            self.sent += len(buffer)

    def read_into(self, view: memoryview, *, doing: str = "the stream was received") -> None:
        """Fill ``view``. Raises as `write` does."""
        done = 0
        while done < len(view):
            with self._calling(doing):
                self.sock.settimeout(self._limit())
                got = self.sock.recv_into(view[done:])
            if not got:
                raise self._gone(doing)
            done += got

    def read(self, length: int, *, doing: str = "the stream was received") -> bytes:
        """Return the next ``length`` octets, a few. Raises as `write` does."""
        octets = bytearray(length)
        self.read_into(memoryview(octets), doing=doing)
        return bytes(octets)

    @property
    def readable(self) -> bool:
        """Whether the other end has said something, or is gone."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        pending = isinstance(self.sock, ssl.SSLSocket) and self.sock.pending()
        return bool(pending or poll.poll(0))

    # Messages

    def send(self, message: Message) -> None:
        """Send a message. If this raises, the other end has not got it."""
        self.write(message.with_head(), doing=f"{message.kind.name} was sent")

    def receive(self, expected: type[M], doing: str) -> M:
        """Return the next message. Raises `RemoteError` for a refusal, `ProtocolError` for any other kind."""
        magic = self.read(len(MAGIC), doing=doing)  # by itself: what another protocol says may be shorter
        if magic != MAGIC:
            raise self._strange(magic, doing)
        head = MessageHead.parse(magic + self.read(MessageHead.head_size - len(MAGIC), doing=doing))
        declared = MESSAGES.get(head.kind)
        if declared not in (expected, Refuse, Failed) or head.length > LONGEST_BODY:
            found = declared.kind.name if declared else f"a message of the kind {head.kind}"
            raise ProtocolError(
                f"{self.peer} sent {found}, {head.length} octets long, while {doing}: expected "
                f"{expected.kind.name} of at most {LONGEST_BODY}; are both ends the same version?"
            )
        body = self.read(head.length, doing=doing)
        try:
            message = declared.parse(body)
        except FormatError as exc:
            raise ProtocolError(f"{self.peer} sent {declared.kind.name} that is cut short: {exc}") from None
        if isinstance(message, Refuse | Failed):
            verb = "refuses" if isinstance(message, Refuse) else "failed"
            raise RemoteError(f"{self.peer} {verb}: {decode(message.reason)}")
        assert isinstance(message, expected)
        return message

    def explained(self, error: MigstreamError) -> MigstreamError:
        """Return why the other end made writing fail, if it said so; else ``error``."""
        with contextlib.suppress(ConnectionLostError, DeadlineError):
            try:
                with self.within(LAST_WORD_S):
                    if self.readable:
                        self.receive(Failed, "the stream was sent")
            except (RemoteError, TlsError, ProtocolError) as said:
                return said
        return error

    def _strange(self, magic: bytes, doing: str) -> ProtocolError:
        if magic.startswith(TLS_RECORD) and not self.is_tls:
            return ProtocolError(f"{self.peer} speaks TLS, and this end does not: {TLS_HINT}")
        return ProtocolError(
            f"{self.peer} is no migstream of this kind: expected a message that begins with {MAGIC.hex(' ')} "
            f"while {doing}, found {magic.hex(' ')}"
        )

    # The end

    def say_last(self, message: Message) -> None:
        """Send ``message`` before the connection is closed, if that is still possible.

        Where octets of the other end are unread, closing resets the connection, which stops a sender in the
        midst of its stream; what the other end's kernel has confirmed by then can still be read there.
        """
        with contextlib.suppress(MigstreamError, OSError), self.within(LAST_WORD_S):
            self.send(message)
            broken = select.poll()
            broken.register(self.sock, 0)
            while self.sock.family != socket.AF_UNIX and self._unconfirmed() and self._limit():
                if broken.poll(5):  # milliseconds
                    break

    def _unconfirmed(self) -> int:
        """Return how many octets wait to be confirmed by the other end's kernel (``SIOCOUTQ``)."""
        count = array.array("i", [0])
        fcntl.ioctl(self.sock.fileno(), termios.TIOCOUTQ, count)
        return count[0]

    def abort(self) -> None:
        """Cut the connection, so that a thread that waits for it wakes up."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)


def _watch_host(sock: socket.socket, silence_s: float) -> None:
    """Have TCP send at once, and tell when the other host is dead."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(1000 * silence_s)))
