"""Streams whose pages can be fetched in any order: a file as it is, anything else from a copy of it."""

from __future__ import annotations

import contextlib
import errno
import tempfile
from collections.abc import Iterator

from migstream.io.frame import EVERYTHING
from migstream.io.inputs import FileInput
from migstream.io.reader import Stream

__all__ = ["SeekableStream", "seekable"]


class SeekableStream:
    """A stream over a file: ``stream`` to be walked, ``input`` to fetch what was found by its offset.

    ``spooled``: the input was none, so this is a copy of it (unpacked where it was compressed).
    """

    def __init__(self, stream: Stream, source: FileInput, *, spooled: bool) -> None:
        self.stream = stream
        self.input = source
        self.spooled = spooled


@contextlib.contextmanager
def seekable(stream: Stream) -> Iterator[SeekableStream]:
    """Make ``stream``, of which nothing was read yet, one over a file.

    A pipe, a socket or compressed data are first copied, to their end, to a temporary file without a name
    (in the directory that TMPDIR names), which is gone when the block is left. Raises `OSError` where that
    has no room, and what reading the input raises.
    """
    if isinstance(stream.input, FileInput):
        yield SeekableStream(stream, stream.input, spooled=False)
        return
    with tempfile.TemporaryFile() as spool:
        try:
            stream.input.splice_to(spool.fileno(), EVERYTHING)
        except OSError as exc:
            if exc.errno == errno.ENOSPC:
                exc.filename = tempfile.gettempdir()
            raise
        spool.seek(0)
        copy = FileInput(spool.fileno(), owned=False)
        yield SeekableStream(Stream(copy), copy, spooled=True)
