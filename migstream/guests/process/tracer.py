"""Our side of the tracer: a small process of its own that traces another one for as long as we live.

ptrace binds a traced process to one thread of its tracer. As that is a child process here, any thread of ours
may ask; that migstream is killed in the middle of something does not tear it apart; and nothing stays
stopped behind it (`tracing_child`).
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import threading
from types import TracebackType
from typing import Self

from migstream.errors import GuestError

__all__ = ["RefusedError", "Tracer"]


class RefusedError(GuestError):
    """The process cannot be traced; the message completes "because ..." and says what to do."""


class Tracer:
    """Traces the process ``pid`` on request."""

    def __init__(self, pid: int) -> None:
        """Start the child, so that it is there when it is needed. The process is not touched."""
        self.pid = pid
        self._lock = threading.Lock()
        self._holds = False
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._child = subprocess.Popen(
                # Without site: it starts in half the time, and finds us where we were found.
                [sys.executable, "-P", "-S", "-m", "migstream.guests.process.tracing_child", str(self.pid)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
                start_new_session=True,
            )
        self._channel = ours

    @property
    def holds(self) -> bool:
        """Whether the process is stopped by us: it is not any more if the child was killed."""
        if not self._holds:
            return False
        answers = select.poll()  # it says nothing unless it is asked, but that it has ended
        answers.register(self._channel, select.POLLIN)
        return not answers.poll(0)

    def userfaultfd(self) -> int:
        """Make the process open a userfaultfd, and return it; the process is left without.

        Raises `RefusedError`, and `GuestError` if the process has ended.
        """
        with self._lock:
            (fd,) = self._ask(b"userfaultfd")
            return fd

    def stop(self) -> None:
        """Stop every thread of the process. Raises as `userfaultfd`; then none is stopped."""
        with self._lock:
            if not self._holds:
                self._ask(b"stop")
                self._holds = True

    def resume(self) -> None:
        """Let the process run on, if it was stopped by us. Raises `GuestError` if the child is gone."""
        with self._lock:
            if self._holds:
                self._holds = False
                self._ask(b"resume")

    def _ask(self, request: bytes) -> list[int]:
        if self._channel.fileno() < 0:
            self._start()
        try:
            self._channel.send(request)
            answer, fds, _, _ = socket.recv_fds(self._channel, 4096, 1, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            answer, fds = b"", []
        except BaseException:  # interrupted: the answer would be taken for that to the next request
            self.close()
            raise
        if not answer:
            self.close()
            raise GuestError(
                f"the child that traces process {self.pid} was killed; the process is stopped no longer; "
                "save it again"
            )
        found: dict[str, str] = json.loads(answer)
        if found.get("last"):
            self.close()
        if "refused" in found:
            raise RefusedError(found["refused"])
        if "ended" in found:
            raise GuestError(found["ended"])
        return fds

    def close(self) -> None:
        """Let the process run on, and end the child. Closing twice is harmless."""
        self._holds = False
        self._channel.close()
        self._child.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
