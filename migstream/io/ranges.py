"""Ranges of one file, in any order, written to another: the moving part of an extraction."""

from __future__ import annotations

import os

from migstream.errors import TruncatedError
from migstream.io import fd as fdio
from migstream.io.inputs import FileInput

__all__ = ["RangeWriter"]

GATHERED = 1 << 20  # octets of small pieces that are written at once
LARGE = 64 << 10  # octets from which on a piece is moved within the kernel


class RangeWriter:
    """Writes to the descriptor ``target``, from where it stands: octets, and ranges of the file ``source``.

    Small pieces are gathered, large ones copied within the kernel; `flush` after the last.
    """

    def __init__(self, source: FileInput, target: int) -> None:
        self._source = source
        self._target = target
        self._gathered = memoryview(bytearray(GATHERED))
        self._used = 0

    def write(self, octets: bytes) -> None:
        """Write ``octets``."""
        if self._used + len(octets) > GATHERED:
            self.flush()
        if len(octets) > GATHERED:
            fdio.write_vectors(self._target, [octets])
            return
        self._gathered[self._used : self._used + len(octets)] = octets
        self._used += len(octets)

    def copy(self, offset: int, length: int) -> None:
        """Write ``length`` octets of the source from ``offset``. Raises `TruncatedError` if it has fewer."""
        self._source.position = offset
        if length >= LARGE:
            self.flush()
            done = self._source.splice_to(self._target, length)
        else:
            if self._used + length > GATHERED:
                self.flush()
            done = self._source.readv_into([self._gathered[self._used : self._used + length]])
            self._used += done
        if done < length:
            raise TruncatedError(
                f"the input ends after {done} of the {length} octets that were there when it was read first",
                offset=offset + done,
            )

    def seek(self, position: int) -> None:
        """Go on at ``position`` of the target, a file; what is passed over is a hole of it."""
        self.flush()
        os.lseek(self._target, position, os.SEEK_SET)

    def flush(self) -> None:
        """Write what was gathered."""
        if self._used:
            fdio.write_vectors(self._target, [self._gathered[: self._used]])
            self._used = 0
