"""Where a legacy stream can be cut: its header, each chunk of its first body, and what is behind."""

from __future__ import annotations

from collections.abc import Iterator

from migstream.errors import StreamError
from migstream.io.inputs import MemoryInput

__all__ = ["cut_legacy"]


def cut_legacy(octets: bytes) -> Iterator[tuple[str, int]]:
    """Yield a label and a length for each part of a legacy stream, together all of ``octets``.

    Cutting is lenient: where a chunk cannot be told, the rest is one part.
    """
    from migstream.legacy.chunks import CHUNKS, Body
    from migstream.legacy.header import read_header

    source = MemoryInput(octets)
    start, label = 0, "legacy unframed"
    try:
        chunks, _ = read_header(source, None)
        yield "legacy HEADER", source.position
        start = source.position
        compressing = False
        while marker := chunks.integer(4, "a chunk's id", signed=True):
            if marker > 0:
                words = chunks.words(min(marker, len(octets)), "a batch")
                chunks.skip(0 if compressing else 4096 * _pages(words.tolist()), "pages")
                yield "legacy PAGES", source.position - start
            elif marker not in CHUNKS or CHUNKS[marker].body is Body.TMEM:
                break
            else:
                chunk = CHUNKS[marker]
                compressing |= chunk.name == "ENABLE_COMPRESSION"
                if chunk.body is Body.VCPU_INFO:
                    length = 8 * (chunks.integer(4, "the highest vCPU id") // 64 + 1)
                elif chunk.body is Body.SIZED_DATA:
                    length = chunks.integer(4, "a length")
                elif chunk.body is Body.COMPRESSED:
                    length = chunks.word("a length")
                else:
                    length = {Body.NONE: 0, Body.PARAM: 12, Body.TSC_INFO: 20}[chunk.body]
                chunks.skip(length, "a body")
                yield f"legacy {chunk.name}", source.position - start
            start = source.position
        else:
            label = "legacy TAIL"
    except StreamError:
        pass
    if start < len(octets):
        yield label, len(octets) - start


def _pages(words: list[int]) -> int:
    """Return how many of a batch's entries have a page in the stream."""
    from migstream.records.page_types import DATA_TYPES

    return sum(word >> 28 & 0xF in DATA_TYPES for word in words)
