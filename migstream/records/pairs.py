"""Keys and values as strings in turn, each ended by NUL: xenstore data, and the properties of an origin."""

from __future__ import annotations

from collections.abc import Iterable

from migstream.errors import FormatError
from migstream.text import decode

__all__ = ["pack_pairs", "parse_pairs"]


def parse_pairs(data: bytes, *, what: str, offset: int = 0) -> list[tuple[str, str]]:
    """Return the keys and values in ``data``; text that is not UTF-8 keeps its octets as surrogates.

    Raises `FormatError` where the data do not end with NUL, or a key has no value. The message calls them
    ``what``; its place counts from ``offset``, where the data begin in their record.
    """
    if not data:
        return []
    if data[-1]:
        message = f"the last {what} string has no NUL at its end"
        raise FormatError(message, offset=offset + len(data), field="data")
    strings = data[:-1].split(b"\0")
    if len(strings) % 2:
        message = f"{len(strings)} {what} strings do not make pairs of key and value"
        raise FormatError(message, offset=offset, field="data")
    return [(decode(k), decode(v)) for k, v in zip(strings[::2], strings[1::2], strict=True)]


def pack_pairs(pairs: Iterable[tuple[str, str]], *, what: str) -> bytes:
    """Return ``pairs`` in the form that `parse_pairs` takes. Raises `ValueError` for a NUL in one."""
    strings = [text.encode("utf-8", "surrogateescape") for pair in pairs for text in pair]
    if any(b"\0" in text for text in strings):
        raise ValueError(f"a {what} key or value cannot hold a NUL")
    return b"".join(text + b"\0" for text in strings)
