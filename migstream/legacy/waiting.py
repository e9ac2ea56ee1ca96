"""What has to wait on disk: the records of a checkpoint that is not complete yet.

Half a checkpoint must not reach the output, and how long one is nobody knows before its end.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from migstream.errors import MigstreamError
from migstream.io import fd as fdio
from migstream.io.writer import StreamWriter

__all__ = ["WaitingError", "WaitingRecords", "room_wanted"]

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class WaitingError(MigstreamError):
    """There is no room for what has to wait."""


@contextmanager
def room_wanted(directory: str | None) -> Iterator[None]:
    """Say what a full disk means in a block that writes to a temporary file in ``directory``."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in _NO_ROOM:
            raise
        where = directory or tempfile.gettempdir()
        raise WaitingError(f"no room in {where} for pages of a checkpoint: {exc.strerror}") from exc


class WaitingRecords:
    """A writer into a file without a name, whose octets are moved on when they may go."""

    def __init__(self, directory: str | None) -> None:
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 - closed by `close`
        self.writer = StreamWriter(self._file.fileno())

    def close(self) -> None:
        """Drop what waits."""
        self._file.close()

    def release(self, target: StreamWriter) -> None:
        """Move all that waits to ``target``, within the kernel where it can be."""
        fd, length = self._file.fileno(), self.writer.written
        target.written += fdio.transfer(fd, target.fd, length, 0, target_timeout_s=target.timeout_s)
        os.ftruncate(fd, 0)
        os.lseek(fd, 0, os.SEEK_SET)
        self.writer.written = 0
