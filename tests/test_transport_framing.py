"""Chunks: what goes in comes out, and nothing else is believed."""

from __future__ import annotations

import struct

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from migstream.errors import FormatError
from migstream.transport.framing import HEAD_SIZE, LARGEST, SLACK, ChunkReader, ChunkWriter
from migstream.transport.messages import Checksum, Compression

END, PLAIN, ZSTD = range(3)
forms = st.tuples(st.sampled_from([None, 1, 7]), st.booleans())
pieces = st.lists(
    st.one_of(
        st.binary(min_size=1, max_size=4096),
        st.builds(lambda octet, n: octet * n, st.binary(min_size=1, max_size=3), st.integers(1, 20_000)),
    ),
    max_size=4,
)


def crc32c(octets: bytes) -> int:
    """CRC-32C bit by bit, from its polynomial (Castagnoli, reflected)."""
    crc = 0xFFFFFFFF
    for octet in octets:
        crc ^= octet
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def head(content: int, stored: int, expanded: int, crc: int = 0) -> bytes:
    return struct.pack("<4I", content, stored, expanded, crc)


def reader(*, zstd: bool = False, crc: bool = False) -> ChunkReader:
    return ChunkReader(
        compression=Compression.ZSTD if zstd else Compression.NONE,
        checksum=Checksum.CRC32C if crc else Checksum.NONE,
    )


def written(octets: list[bytes], level: int | None, *, checksum: bool) -> bytes:
    writer = ChunkWriter(level=level, checksum=checksum)
    return b"".join(part for piece in octets for part in writer.chunk(piece)) + writer.end()


def read(octets: bytes, chunks: ChunkReader) -> bytes:
    """Return the stream in ``octets``, which have to be whole chunks up to an END."""
    stream, at = b"", 0
    while True:
        chunk = chunks.head(octets[at : at + HEAD_SIZE])
        at += HEAD_SIZE
        stored = octets[at : at + chunk.stored]
        at += chunk.stored
        piece = chunks.content(chunk, stored)
        if chunk.content == END:
            assert at == len(octets)
            return stream
        stream += piece


@given(pieces, forms)
def test_a_stream_comes_out_of_its_chunks_as_it_went_in(
    octets: list[bytes], form: tuple[int | None, bool]
) -> None:
    level, checksum = form
    chunks = reader(zstd=level is not None, crc=checksum)
    assert read(written(octets, level, checksum=checksum), chunks) == b"".join(octets)
    assert chunks.position == sum(map(len, octets))


def test_a_plain_chunk_has_these_octets() -> None:
    assert written([b"abcd"], None, checksum=False) == bytes.fromhex(
        "01000000 04000000 04000000 00000000"  # PLAIN, 4 octets stored, 4 of the stream, no checksum
        "61626364"
        "00000000 00000000 00000000 00000000"  # END
    )


def test_the_checksum_is_crc_32c_of_head_and_content() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the catalogue's check value
    covered = head(PLAIN, 3, 3)[:12]
    expected = head(PLAIN, 3, 3, crc32c(covered + b"abc")) + b"abc" + head(END, 0, 0, crc32c(bytes(12)))
    assert written([b"abc"], None, checksum=True) == expected


def test_what_zstd_cannot_shrink_is_sent_as_it_is() -> None:
    octets = written([b"abc", bytes(1000)], 1, checksum=False)
    assert octets.startswith(head(PLAIN, 3, 3) + b"abc")
    assert octets[HEAD_SIZE + 3 : HEAD_SIZE + 7] == struct.pack("<I", ZSTD)
    assert len(octets) < 120


@given(pieces.filter(bool), forms, st.data())
def test_any_damaged_octet_is_found_by_the_checksum(
    octets: list[bytes], form: tuple[int | None, bool], data: st.DataObject
) -> None:
    """A damaged length is found before the CRC is: it asks for octets that are not there."""
    level, _ = form
    damaged = bytearray(written(octets, level, checksum=True))
    at = data.draw(st.integers(0, len(damaged) - 1))
    damaged[at] ^= data.draw(st.integers(1, 255))
    chunks = reader(zstd=level is not None, crc=True)
    with pytest.raises(FormatError) as raised:
        read(bytes(damaged), chunks)
    assert raised.value.offset == chunks.position <= sum(map(len, octets))
    assert raised.value.layer == "transport"


def test_without_a_checksum_the_field_is_zero() -> None:
    chunks = reader()
    with pytest.raises(FormatError, match="CRC-32C"):
        chunks.content(chunks.head(head(PLAIN, 1, 1, 7)), b"x")


@pytest.mark.parametrize(
    "octets",
    [
        head(3, 1, 1),  # no such content
        head(0xFFFFFFFF, 0, 0),
        head(END, 1, 1),
        head(PLAIN, 0, 0),
        head(PLAIN, 5, 6),
        head(PLAIN, LARGEST + 1, LARGEST + 1),
        head(PLAIN, 0xFFFFFFFF, 0xFFFFFFFF),
        head(ZSTD, 10, LARGEST + 1),
        head(ZSTD, LARGEST + SLACK + 1, LARGEST),
        head(ZSTD, 10, 0),
        head(ZSTD, 0, 10),
    ],
)
def test_a_head_that_claims_too_much_or_nonsense_is_refused_before_its_content_is_read(
    octets: bytes,
) -> None:
    with pytest.raises(FormatError, match="expected the head of a chunk"):
        reader(zstd=True).head(octets)


def test_compression_that_was_not_agreed_on_is_refused() -> None:
    with pytest.raises(FormatError, match="no compression was agreed on"):
        reader().head(head(ZSTD, 10, 10))


def _frame(octets: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(octets)


def _without_size(octets: bytes) -> bytes:
    stream = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    return stream.compress(octets) + stream.flush()


BOMB = _frame(bytes(64 << 20))


@pytest.mark.parametrize(
    ("stored", "expanded", "complaint"),
    [
        (BOMB, 1000, "found one of 67108864 octets"),
        (BOMB, LARGEST, "found one of 67108864 octets"),
        (_frame(bytes(100)), 1000, "found one of 100 octets"),
        (_without_size(bytes(1 << 20)), 1000, "found one of no size"),
        (b"no zstd at all", 1000, "cannot be expanded"),
        (_frame(bytes(1000))[:-1], 1000, "cannot be expanded"),
        (_frame(bytes(1000)) + b"more", 1000, "cannot be expanded"),
        (_frame(bytes(1000)) * 2, 1000, "cannot be expanded"),
    ],
)
def test_a_frame_that_is_not_what_its_head_says_is_refused(
    stored: bytes, expanded: int, complaint: str
) -> None:
    chunks = reader(zstd=True)
    with pytest.raises(FormatError, match=complaint):
        chunks.content(chunks.head(head(ZSTD, len(stored), expanded)), stored)


def test_a_frame_that_lies_about_its_size_expands_to_no_more_than_it_claims() -> None:
    """The content size in a frame's own header is changed from 64 MiB to 1000."""
    descriptor = BOMB[4]
    assert (descriptor >> 6, descriptor >> 5 & 1) == (2, 0)  # 4 octets of size behind a window octet
    liar = BOMB[:6] + struct.pack("<I", 1000) + BOMB[10:]
    assert zstandard.frame_content_size(liar) == 1000
    chunks = reader(zstd=True)
    with pytest.raises(FormatError, match="cannot be expanded"):
        chunks.content(chunks.head(head(ZSTD, len(liar), 1000)), liar)
