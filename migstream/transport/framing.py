"""A stream in chunks: compressed, guarded by checksums, or only cut so that its end shows.

No I/O here: octets to chunks, and back. What a chunk claims is checked before anything is allocated for it,
and it never grows beyond `LARGEST` octets.
"""

from __future__ import annotations

from migstream.errors import FormatError
from migstream.transport.messages import Checksum, Chunk, Compression, Content

__all__ = ["CHUNK", "DEFAULT_LEVEL", "HEAD_SIZE", "LARGEST", "MAX_LEVEL", "ChunkReader", "ChunkWriter"]

CHUNK = 256 << 10  # octets of the stream in a chunk, as sent: what a pipe holds, and a core's cache
LARGEST = 1 << 20  # octets of the stream in a chunk, as taken
SLACK = 1 << 10  # octets by which zstd may exceed what it cannot compress
DEFAULT_LEVEL = 1  # the fastest of zstd's ordinary levels; a network is rarely slower than the next one
MAX_LEVEL = 19
HEAD_SIZE = Chunk.head_size

_HEAD = Chunk.struct("little")
_CRC_OFFSET = Chunk.offset_of("crc32c")


class ChunkWriter:
    """Turns pieces of a stream into chunks; ``level`` is zstd's, ``None`` to leave them as they are."""

    def __init__(self, *, level: int | None = None, checksum: bool = False) -> None:
        self._compress = None
        if level is not None:
            import zstandard

            self._compress = zstandard.ZstdCompressor(level=level, write_content_size=True).compress
        self._crc = _crc32c if checksum else _no_checksum

    def chunk(self, octets: bytes | memoryview) -> tuple[bytes, bytes | memoryview]:
        """Return head and content of a chunk with 1 to `LARGEST` octets of the stream."""
        if self._compress is not None:
            packed = self._compress(octets)
            if len(packed) < len(octets):
                return self._head(Content.ZSTD, packed, len(octets)), packed
        return self._head(Content.PLAIN, octets, len(octets)), octets

    def end(self) -> bytes:
        """Return the chunk behind the last octet of the stream."""
        return self._head(Content.END, b"", 0)

    def _head(self, content: Content, stored: bytes | memoryview, expanded: int) -> bytes:
        head = _HEAD.pack(content, len(stored), expanded, 0)[:_CRC_OFFSET]
        return head + self._crc(head, stored).to_bytes(4, "little")


class ChunkReader:
    """Turns chunks back into the stream. ``position`` is the stream's offset, which errors tell.

    For each chunk call `head` with its head, then `content` with as many octets as `Chunk.stored` says.
    """

    def __init__(self, *, compression: Compression, checksum: Checksum) -> None:
        self.position = 0
        self._decompressor = None
        if compression is Compression.ZSTD:
            import zstandard

            self._decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST)
        self._crc = _crc32c if checksum is Checksum.CRC32C else _no_checksum
        self._head = b""

    def head(self, octets: bytes) -> Chunk:
        """Return the head of a chunk, its sizes checked. Raises `FormatError`."""
        self._head = octets
        chunk = Chunk.parse(octets)
        fits: dict[int, bool] = {
            Content.END: chunk.stored == chunk.expanded == 0,
            Content.PLAIN: 0 < chunk.stored == chunk.expanded <= LARGEST,
            Content.ZSTD: 0 < chunk.stored <= LARGEST + SLACK and 0 < chunk.expanded <= LARGEST,
        }
        if not fits.get(chunk.content, False):
            raise self._damaged(
                f"expected the head of a chunk with up to {LARGEST} octets of the stream, found content "
                f"{chunk.content}, {chunk.stored} octets that hold {chunk.expanded}"
            )
        if chunk.content == Content.ZSTD and self._decompressor is None:
            raise self._damaged("found a compressed chunk, but no compression was agreed on")
        return chunk

    def content(self, chunk: Chunk, stored: bytes | memoryview) -> bytes | memoryview:
        """Return the octets of the stream in a chunk, none at the end. Raises `FormatError`."""
        crc = self._crc(self._head[:_CRC_OFFSET], stored)
        if crc != chunk.crc32c:
            raise self._damaged(f"a chunk has the CRC-32C {crc:#010x}, its head says {chunk.crc32c:#010x}")
        octets = self._expanded(chunk, stored) if chunk.content == Content.ZSTD else stored
        self.position += len(octets)
        return octets

    def _expanded(self, chunk: Chunk, stored: bytes | memoryview) -> bytes:
        import zstandard

        assert self._decompressor is not None  # `head` saw to it
        try:
            # The library believes the frame's own claim before max_output_size: look at that first.
            claimed = zstandard.frame_content_size(stored)
            if claimed != chunk.expanded:
                found = "no size" if claimed < 0 else f"{claimed} octets"
                raise self._damaged(f"expected a zstd frame of {chunk.expanded} octets, found one of {found}")
            octets: bytes = self._decompressor.decompress(
                stored, max_output_size=chunk.expanded, allow_extra_data=False
            )
        except zstandard.ZstdError as exc:
            raise self._damaged(f"a chunk cannot be expanded: {exc}") from None
        return octets

    def _damaged(self, message: str) -> FormatError:
        return FormatError(
            message, offset=self.position, layer="transport", hint="damaged on the way: migrate again"
        )


def _crc32c(head: bytes, content: bytes | memoryview) -> int:
    from fastcrc import crc32

    return crc32.iscsi(content, crc32.iscsi(head))


def _no_checksum(head: bytes, content: bytes | memoryview) -> int:
    return 0
