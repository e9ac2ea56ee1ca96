"""Where the records of a checkpoint wait until it is complete.

Half a checkpoint must never reach the guest, and nobody knows how long one is. So its records go, as they
are and moved within the kernel, into a file without a name; when the checkpoint is complete they are read
back from there as frames, with the places that they had in the stream.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator

from migstream.errors import MigstreamError
from migstream.io.inputs import FileInput
from migstream.io.reader import Frame, Layer, Stream
from migstream.records import libxc, padding_length

__all__ = ["CheckpointSpill", "SpillError"]

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class SpillError(MigstreamError):
    """A checkpoint's records do not fit where they have to wait."""


class CheckpointSpill:
    """Records that wait, at most ``limit`` octets of them, in a file in ``directory``."""

    def __init__(self, limit: int, directory: str | None = None) -> None:
        self.limit = limit
        self.records = 0
        self._octets = 0
        self._first: tuple[Layer, int, int] | None = None  # layer, offset and index of the first record
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 - closed by `close`

    def close(self) -> None:
        """Drop what waits."""
        self._file.close()

    def add(self, frame: Frame) -> None:
        """Move a record here, unread. Raises as `Frame.splice_to` does, and `SpillError` without room."""
        head = libxc.RecordHeader(type=frame.code, length=frame.length).build(frame.layer.order)
        padding = padding_length(frame.length)
        self._octets += len(head) + frame.length + padding
        if self._octets > self.limit:
            raise SpillError(
                f"the records of one checkpoint take more than {self.limit} octets; "
                "raise the limit for waiting records if this is a guest that writes so much"
            )
        if self._first is None:
            self._first = frame.layer, frame.offset, frame.index
        fd = self._file.fileno()
        try:
            self._file.write(head)
            frame.splice_to(fd)
            frame.finish()
            self._file.write(bytes(padding))
        except OSError as exc:
            if exc.errno in _NO_ROOM:
                raise SpillError(f"no room for the records of a checkpoint: {exc.strerror}") from exc
            raise
        self.records += 1

    def frames(self) -> Iterator[Frame]:
        """Yield what waits, in order; each frame is finished before the next."""
        if self._first is None:
            return
        layer, offset, index = self._first
        fd = self._file.fileno()
        os.lseek(fd, 0, os.SEEK_SET)
        stream = Stream(FileInput(fd, owned=False))
        header = libxc.RecordHeader.struct(layer.order)
        for number in range(self.records):
            place = offset + stream.position
            code, length = header.unpack(stream.input.read(header.size))
            frame = Frame(stream, layer, code=code, length=length, offset=place, index=index + number)
            yield frame
            frame.finish()

    def clear(self) -> None:
        """Forget what waits, and give its room back."""
        self.records = self._octets = 0
        self._first = None
        self._file.seek(0)
        self._file.truncate()
