"""Reading a legacy stream exactly: integers, words of the toolstack's size, and bulk that may be spliced.

Every error says where it is: offset, layer ``legacy``, and the chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from migstream.errors import FormatError, RecordRef, TruncatedError
from migstream.io.inputs import Input

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from migstream.io.writer import StreamWriter

__all__ = ["LAYER", "ChunkSource", "Content"]

LAYER = "legacy"


class ChunkSource:
    """An input that legacy structures are read from. ``record`` is the chunk or part being read."""

    def __init__(self, source: Input, word_size: int) -> None:
        self.input = source
        self.word_size = word_size
        self.record: RecordRef | None = None
        self._chunks = 0

    def enter(self, name: str) -> None:
        """Note that a chunk, or the tail, called ``name`` starts; the errors that follow name it."""
        self.record = RecordRef(self._chunks, name)
        self._chunks += 1

    def rename(self, name: str) -> None:
        """Say what the part that was entered last turned out to be."""
        self.record = RecordRef(self._chunks - 1, name)

    @property
    def position(self) -> int:
        """Octets of the input that have been consumed."""
        return self.input.position

    def fault(
        self, message: str, offset: int, *, field: str | None = None, hint: str | None = None
    ) -> FormatError:
        """Return an error about the octet at ``offset``."""
        return FormatError(message, offset=offset, layer=LAYER, record=self.record, field=field, hint=hint)

    def short(self, what: str, wanted: int, found: int) -> TruncatedError:
        """Return the error for an input that ends inside ``what``."""
        return TruncatedError(
            f"the input ends inside {what}: expected {wanted} octets, found {found}",
            offset=self.position,
            layer=LAYER,
            record=self.record,
        )

    def take(self, length: int, what: str) -> bytes:
        """Return exactly ``length`` octets, which the caller has bounded."""
        piece = self.input.read(length)
        if len(piece) < length:
            raise self.short(what, length, len(piece))
        return piece

    def integer(self, size: int, what: str, *, signed: bool = False) -> int:
        """Return a little-endian integer of ``size`` octets."""
        return int.from_bytes(self.take(size, what), "little", signed=signed)

    def word(self, what: str) -> int:
        """Return an ``unsigned long`` of the toolstack."""
        return self.integer(self.word_size, what)

    def words(self, count: int, what: str) -> npt.NDArray[np.uint64]:
        """Return ``count`` words, uint64[count]; the caller has bounded the count."""
        import numpy as np

        octets = self.take(count * self.word_size, what)
        return np.frombuffer(octets, f"<u{self.word_size}").astype(np.uint64)

    def skip(self, length: int, what: str) -> None:
        """Pass over ``length`` octets."""
        done = self.input.skip(length)
        if done < length:
            raise self.short(what, length, done)


class Content:
    """Octets of a chunk that wait to be consumed: spliced, read, or skipped by the reader's next step."""

    def __init__(self, source: ChunkSource, length: int, what: str) -> None:
        self._source = source
        self._what = what
        self.left = length

    @property
    def offset(self) -> int:
        """Where in the input the next octet stands."""
        return self._source.position

    def read(self, at_most: int) -> bytes:
        """Return the next octets, ``at_most`` of them; none when all are consumed."""
        length = min(at_most, self.left)
        piece = self._source.take(length, self._what)
        self.left -= length
        return piece

    def splice_to(self, writer: StreamWriter) -> None:
        """Move what is left behind what ``writer`` has written, within the kernel where that can be."""
        done = self._source.input.splice_to(writer.fd, self.left, writer.timeout_s)
        writer.written += done
        wanted, self.left = self.left, 0
        if done < wanted:
            raise self._source.short(self._what, wanted, done)

    def skip(self) -> None:
        """Pass over what is left."""
        length, self.left = self.left, 0
        self._source.skip(length, self._what)
