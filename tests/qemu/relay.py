"""A relay between the two ends of a migration, which holds the stream where a test wants a fault."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["Relay", "relay"]

CHUNK = 256 << 10  # octets passed on at a time


class Relay:
    """Passes octets on from ``address`` to another Unix socket.

    ``hold`` is asked before each piece of the stream. Once it says yes nothing passes: `held` is set, until
    `release` or `cut`.
    """

    def __init__(self, path: Path, destination: Path, hold: Callable[[], bool]) -> None:
        self.address = f"unix:{path}"
        self.held = threading.Event()
        self._hold = hold
        self._released = threading.Event()
        self._cut = False
        self._destination = destination
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let everything pass from here on."""
        self._released.set()

    def cut(self) -> None:
        """Close both connections, with what is held."""
        self._cut = True
        self._released.set()
        self._thread.join()

    def close(self) -> None:
        """End the relay."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            sender, _ = self._listener.accept()
            with sender, socket.socket(socket.AF_UNIX) as receiver:
                receiver.connect(str(self._destination))
                answers = threading.Thread(target=_copy, args=(receiver, sender), daemon=True)
                answers.start()
                for piece in _pieces(sender):
                    if not self._released.is_set() and self._hold():
                        self.held.set()
                        self._released.wait()
                    if self._cut:
                        break
                    receiver.sendall(piece)
                else:
                    receiver.shutdown(socket.SHUT_WR)
                    answers.join()
                for end in (sender, receiver):
                    end.shutdown(socket.SHUT_RDWR)


def _pieces(sock: socket.socket) -> Iterator[bytes]:
    while piece := sock.recv(CHUNK):
        yield piece


def _copy(origin: socket.socket, to: socket.socket) -> None:
    with contextlib.suppress(OSError):
        for piece in _pieces(origin):
            to.sendall(piece)
        to.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def relay(path: Path, destination: Path, hold: Callable[[], bool]) -> Iterator[Relay]:
    """Listen at ``path`` for one connection, which goes on to the socket ``destination``."""
    passing = Relay(path, destination, hold)
    try:
        yield passing
    finally:
        passing.close()
