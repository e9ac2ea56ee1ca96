"""Text that came out of a stream, made safe to show.

A guest, or whoever wrote the file, chooses xenstore values, names and configs. Shown raw, they could
drive the terminal (escape sequences), hide text (bidirectional controls) or break lines.
"""

from __future__ import annotations

import re
import unicodedata

__all__ = ["decode", "printable", "size"]

# Categories that never reach a terminal as they are: controls, formats (bidirectional marks, zero
# width), surrogates, private use, unassigned; line and paragraph separators.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_PLAIN = re.compile(r"[ -\[\]-~]*", re.ASCII)  # printable ASCII without the backslash


def decode(octets: bytes) -> str:
    """Decode UTF-8; octets that are not UTF-8 survive as lone surrogates (`surrogateescape`)."""
    return octets.decode("utf-8", "surrogateescape")


def _escape(char: str) -> str:
    if char == "\\":
        return "\\\\"
    if unicodedata.category(char) not in _HIDDEN:
        return char
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # an undecodable octet, kept by surrogateescape
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def printable(text: str | bytes) -> str:
    r"""Return ``text`` with every character that is not plainly visible escaped, as ``\x1b``."""
    if isinstance(text, bytes):
        text = decode(text)
    if _PLAIN.fullmatch(text):
        return text
    return "".join(map(_escape, text))


def size(octets: int) -> str:
    """Return a byte count as a person says it: ``4.0 MiB``; below 1 KiB exactly: ``24 B``."""
    if octets < 1024:
        return f"{octets} B"
    value = float(octets)
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        value /= 1024
        if value < 1024:
            return f"{value:.1f} {unit}"
    return f"{value:.1f} EiB"
