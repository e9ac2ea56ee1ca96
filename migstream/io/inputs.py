"""Where a stream's bytes come from: files, pipes and sockets, memory, compressed data.

An input is read in sequence: small pieces by `read`, bulk by `readv_into`, `splice_to` or `skip`. Files
are seeked over; from a descriptor that cannot be seeked not one octet more is taken than was asked
for, so that whoever owns it can go on reading behind a stream's end.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Protocol

from migstream.errors import FormatError, MigstreamError
from migstream.io import fd as fdio

__all__ = ["CodecInput", "DescriptorInput", "FileInput", "Input", "MemoryInput"]

WINDOW = 8448  # octets a file is read by: header, head and 1024 entries of a PAGE_DATA record are 8,208
SCRATCH = 256 << 10  # octets of the buffer through which bulk is read only to be dropped


class Input(ABC):
    """A sequence of octets, read once; ``position`` is how many are behind us."""

    position: int = 0
    #: Total octets where that is known beforehand, else ``None``.
    size: int | None = None

    @abstractmethod
    def read(self, length: int) -> bytes:
        """Return the next ``length`` octets, fewer only at the end. Nothing is allocated beforehand."""

    def read_some(self, length: int) -> bytes:
        """Return as many of the next ``length`` octets as are there, at least one, none only at the end."""
        return self.read(length)

    @abstractmethod
    def peek(self, length: int) -> bytes:
        """Return the next ``length`` octets without consuming them, fewer only at the end."""

    @abstractmethod
    def readv_into(self, buffers: Iterable[memoryview]) -> int:
        """Fill ``buffers`` in turn; return the octets read, fewer only at the end."""

    @abstractmethod
    def splice_to(self, target: int, length: int, timeout_s: float | None = None) -> int:
        """Move octets to the descriptor ``target``; return how many, fewer only at the end.

        ``timeout_s`` bounds each wait for ``target``.
        """

    @abstractmethod
    def skip(self, length: int) -> int:
        """Pass over octets; return how many there were, fewer only at the end."""

    def close(self) -> None:  # noqa: B027  nothing to let go of, for most
        """Let go of what the input itself opened. May be called again."""

    @property
    def remaining(self) -> int | None:
        """Octets left where that is known, else ``None``."""
        return None if self.size is None else max(0, self.size - self.position)


class FileInput(Input):
    """A regular file or block device, from where its descriptor stands; read by pread."""

    def __init__(self, fd: int, *, owned: bool) -> None:
        self._fd = fd
        self._owned = owned
        self._start = os.lseek(fd, 0, os.SEEK_CUR)
        self.size = self._measure()
        self._window = b""
        self._window_at = 0
        self._closed = False

    def _measure(self) -> int:
        return max(0, (fdio.file_size(self._fd) or 0) - self._start)

    def read(self, length: int) -> bytes:
        at = self.position - self._window_at
        inside = 0 <= at <= len(self._window) - length  # as nearly always: spare a call
        piece = self._window[at : at + length] if inside else self.peek(length)
        self.position += len(piece)
        return piece

    def peek(self, length: int) -> bytes:
        at = self.position - self._window_at
        if at >= 0 and at + length <= len(self._window):
            return self._window[at : at + length]
        if length > WINDOW:
            return fdio.pread(self._fd, self._present(length), self._start + self.position)
        self._window = fdio.pread(self._fd, WINDOW, self._start + self.position)
        self._window_at = self.position
        return self._window[:length]

    def _present(self, length: int) -> int:
        """Return how many of the next ``length`` octets there are; the file may have grown since."""
        if self.position + length > (self.size or 0):
            self.size = self._measure()
        return min(length, self.remaining or 0)

    def readv_into(self, buffers: Iterable[memoryview]) -> int:
        done = fdio.pread_into(self._fd, buffers, self._start + self.position)
        self.position += done
        return done

    def splice_to(self, target: int, length: int, timeout_s: float | None = None) -> int:
        at = self._start + self.position
        done = fdio.transfer(self._fd, target, length, at, target_timeout_s=timeout_s)
        self.position += done
        return done

    def skip(self, length: int) -> int:
        done = self._present(length)
        self.position += done
        return done

    def splice_at(self, target: int, offset: int, length: int, timeout_s: float | None = None) -> int:
        """Move ``length`` octets at ``offset`` to the descriptor ``target``; the position stays.

        Returns how many, fewer only at the end.
        """
        return fdio.transfer(self._fd, target, length, self._start + offset, target_timeout_s=timeout_s)

    def pread_into(self, buffers: Iterable[memoryview], offset: int) -> int:
        """Fill ``buffers`` in turn from ``offset``; the position stays. Returns the octets read."""
        return fdio.pread_into(self._fd, buffers, self._start + offset)

    def rewind(self) -> None:
        """Go back to where the input started, to read it once more."""
        self.position = 0

    def close(self) -> None:
        """Close an owned descriptor; leave another's where reading stopped."""
        if self._closed:
            return
        self._closed = True
        if self._owned:
            os.close(self._fd)
        else:
            os.lseek(self._fd, self._start + self.position, os.SEEK_SET)


class DescriptorInput(Input):
    """A pipe, socket or character device: sequential, and possibly non-blocking.

    ``timeout_s`` bounds each wait for input; past it, `DeadlineError`.
    """

    def __init__(self, fd: int, *, owned: bool, timeout_s: float | None = None) -> None:
        self._fd = fd
        self._owned = owned
        self._timeout_s = timeout_s
        self._ahead = b""
        self._pipe = fdio.is_pipe(fd)
        self._drop: int | None = None  # /dev/null, opened when first needed
        fdio.widen_pipe(fd)

    def _take_ahead(self, length: int) -> bytes:
        piece, self._ahead = self._ahead[:length], self._ahead[length:]
        self.position += len(piece)
        return piece

    def read(self, length: int) -> bytes:
        ahead = self._take_ahead(length) if self._ahead else b""
        if len(ahead) == length:
            return ahead
        piece = fdio.read(self._fd, length - len(ahead), self._timeout_s)
        self.position += len(piece)
        return ahead + piece if ahead else piece

    def read_some(self, length: int) -> bytes:
        if self._ahead:
            return self._take_ahead(length)
        piece = fdio.read_some(self._fd, length, self._timeout_s)
        self.position += len(piece)
        return piece

    def peek(self, length: int) -> bytes:
        if len(self._ahead) < length:
            self._ahead += fdio.read(self._fd, length - len(self._ahead), self._timeout_s)
        return self._ahead[:length]

    def readv_into(self, buffers: Iterable[memoryview]) -> int:
        vectors = fdio.views(buffers)
        done = 0
        while self._ahead and vectors:
            piece = self._take_ahead(len(vectors[0]))
            vectors[0][: len(piece)] = piece
            done += len(piece)
            vectors[0] = vectors[0][len(piece) :]
            if not vectors[0]:
                del vectors[0]
        got = fdio.read_into(self._fd, vectors, self._timeout_s)
        self.position += got
        return done + got

    def splice_to(self, target: int, length: int, timeout_s: float | None = None) -> int:
        ahead = self._take_ahead(length)
        fdio.write_vectors(target, [ahead], timeout_s)
        done = fdio.transfer(self._fd, target, length - len(ahead), None, self._timeout_s, timeout_s)
        self.position += done
        return len(ahead) + done

    def skip(self, length: int) -> int:
        done = len(self._take_ahead(length))
        if done == length:
            return done
        if self._pipe:
            if self._drop is None:
                self._drop = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            dropped = fdio.transfer(self._fd, self._drop, length - done, timeout_s=self._timeout_s)
            self.position += dropped
            return done + dropped
        return done + _read_and_drop(self, length - done)

    def close(self) -> None:
        """Close what was opened here; a descriptor of the caller's stays open."""
        if self._drop is not None:
            os.close(self._drop)
            self._drop = None
        if self._owned:
            self._owned = False
            os.close(self._fd)


class MemoryInput(Input):
    """Octets in memory; referred to, not copied."""

    def __init__(self, octets: bytes | bytearray | memoryview) -> None:
        self._view = memoryview(octets).cast("B") if len(octets) else memoryview(b"")
        self.size = len(self._view)

    def read(self, length: int) -> bytes:
        start = self.position
        piece = bytes(self._view[start : start + length])
        self.position = start + len(piece)
        return piece

    def peek(self, length: int) -> bytes:
        return bytes(self._view[self.position : self.position + length])

    def readv_into(self, buffers: Iterable[memoryview]) -> int:
        done = 0
        for view in fdio.views(buffers):
            piece = self._view[self.position : self.position + len(view)]
            view[: len(piece)] = piece
            self.position += len(piece)
            done += len(piece)
        return done

    def splice_to(self, target: int, length: int, timeout_s: float | None = None) -> int:
        piece = self._view[self.position : self.position + length]
        self.position += len(piece)
        return fdio.write_vectors(target, [piece], timeout_s)

    def skip(self, length: int) -> int:
        done = min(length, len(self._view) - self.position)
        self.position += done
        return done


class CodecReader(Protocol):
    """A codec's file object, as far as it is needed."""

    def readinto(self, buffer: memoryview, /) -> int | None: ...
    def close(self) -> None: ...


class CodecInput(Input):
    """Another input, decompressed on the way; ``reader`` is the codec's file object over it."""

    def __init__(self, inner: Input, reader: CodecReader, codec: str) -> None:
        self._inner = inner
        self._reader = reader
        self._codec = codec
        self._ahead = b""
        self._unpacked = 0  # octets that the codec has given so far

    def _fill(self, view: memoryview) -> int:
        done = 0
        while done < len(view):
            try:
                got = self._reader.readinto(view[done:])
            except Exception as exc:
                # Each codec has errors of its own, without a common base: zstandard.ZstdError,
                # zlib.error, lzma.LZMAError.
                if isinstance(exc, MigstreamError | OSError):
                    raise  # the input's own
                raise FormatError(
                    f"the {self._codec} data are damaged: {exc}",
                    offset=self._unpacked + done,
                    hint="the offset is in the unpacked data",
                ) from exc
            if not got:
                break
            done += got
        self._unpacked += done
        return done

    def _unpack(self, length: int) -> bytes:
        pieces = []
        while length > 0:
            buffer = bytearray(min(length, SCRATCH))
            got = self._fill(memoryview(buffer))
            pieces.append(bytes(buffer[:got]))
            length -= got
            if got < len(buffer):
                break
        return b"".join(pieces)

    def peek(self, length: int) -> bytes:
        if len(self._ahead) < length:
            self._ahead += self._unpack(length - len(self._ahead))
        return self._ahead[:length]

    def read(self, length: int) -> bytes:
        ahead, self._ahead = self._ahead[:length], self._ahead[length:]
        piece = ahead + self._unpack(length - len(ahead)) if len(ahead) < length else ahead
        self.position += len(piece)
        return piece

    def readv_into(self, buffers: Iterable[memoryview]) -> int:
        done = 0
        for view in fdio.views(buffers):
            ahead = self._ahead[: len(view)]
            self._ahead = self._ahead[len(ahead) :]
            view[: len(ahead)] = ahead
            got = len(ahead) + self._fill(view[len(ahead) :])
            self.position += got
            done += got
            if got < len(view):
                break
        return done

    def splice_to(self, target: int, length: int, timeout_s: float | None = None) -> int:
        done = 0
        while done < length:
            piece = self.read(min(length - done, SCRATCH))
            if not piece:
                break
            fdio.write_vectors(target, [piece], timeout_s)
            done += len(piece)
        return done

    def skip(self, length: int) -> int:
        return _read_and_drop(self, length)

    def close(self) -> None:
        """Close the codec and what it reads from."""
        self._reader.close()
        self._inner.close()


def _read_and_drop(source: Input, length: int) -> int:
    scratch = memoryview(bytearray(min(length, SCRATCH)))
    done = 0
    while done < length:
        want = min(len(scratch), length - done)
        got = source.readv_into([scratch[:want]])
        done += got
        if got < want:
            break
    return done
