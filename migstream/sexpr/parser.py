"""S-expressions as text: the parser.

An expression is a `str`, an atom, or a `list` of expressions. Nesting and size are bounded, and nothing
here calls itself, so that a hostile config costs no more than its length.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from migstream.errors import FormatError

__all__ = ["MAX_DEPTH", "MAX_SIZE", "Dialect", "SExpr", "parse"]

MAX_DEPTH = 64  # lists inside lists; xend's configs nest six deep
MAX_SIZE = 8 << 20  # characters of a whole expression; real configs have a few KiB

SExpr = str | list["SExpr"]
Dialect = Literal["xend", "libvirt", "ocaml"]


@dataclass(frozen=True)
class _Syntax:
    """How a printer writes: its pieces, what opens a string, what opens a comment.

    ``escapes`` says whether a backslash in a string stands for something, ``decimal`` whether digits behind
    it are a decimal number, not an octal one.
    """

    piece: re.Pattern[str]
    quotes: str
    comment: str = "\0"
    escapes: bool = True
    decimal: bool = False


# Possessive repeats (*+) keep each pattern linear in the length of the text.
_SYNTAX: dict[Dialect, _Syntax] = {
    # Xen 4.4, tools/python/xen/xend/sxp.py
    "xend": _Syntax(
        re.compile(
            r"""\s++|\#[^\n]*+|[()]|'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+"|[^\s()'"#][^\s(){}<>\[\];#]*+""",
            re.DOTALL,
        ),
        quotes="'\"",
        comment="#",
    ),
    # libvirt, src/util/virsexpr.c of its xend driver, which neither escapes nor unescapes
    "libvirt": _Syntax(re.compile(r"""\s++|[()]|'[^']*+'|[^\s()'][^\s()]*+"""), quotes="'", escapes=False),
    # Sexplib, which xapi prints with
    "ocaml": _Syntax(
        re.compile(r"""\s++|;[^\n]*+|[()]|"(?:[^"\\]|\\.)*+"|[^\s()";]++""", re.DOTALL),
        quotes='"',
        comment=";",
        decimal=True,
    ),
}
_ESCAPED = re.compile(r"\\(x[0-9A-Fa-f]{1,2}|[0-9]{1,3}|.)", re.DOTALL)
_CONTROLS = {"a": "\a", "b": "\b", "t": "\t", "n": "\n", "v": "\v", "f": "\f", "r": "\r"}


def parse(text: str | bytes, dialect: Dialect = "xend") -> SExpr:
    """Parse the one expression that ``text`` is; a NUL at its end is passed over.

    Text that is not UTF-8 keeps its octets as surrogates. Raises `FormatError` with the offset in octets
    for what is no expression, or is nested or long beyond the limits.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogateescape")
    text = text.rstrip("\0")
    if len(text) > MAX_SIZE:
        raise FormatError(f"an S-expression of {len(text)} characters; the limit is {MAX_SIZE}", offset=0)
    syntax = _SYNTAX[dialect]
    top: list[SExpr] = []
    open_lists = [top]
    for at, piece in _pieces(text, syntax):
        if top and len(open_lists) == 1:
            raise _refusal(text, at, "expected the end of the S-expression, found more behind it")
        if piece == "(":
            if len(open_lists) > MAX_DEPTH:
                raise _refusal(text, at, f"lists are nested more than {MAX_DEPTH} deep")
            inner: list[SExpr] = []
            open_lists[-1].append(inner)
            open_lists.append(inner)
        elif piece == ")":
            if len(open_lists) == 1:
                raise _refusal(text, at, "a list is closed that was not opened")
            open_lists.pop()
        else:
            quoted = piece[0] in syntax.quotes
            open_lists[-1].append(_unescaped(piece[1:-1], syntax) if quoted else piece)
    if not top or len(open_lists) > 1:
        what = f"{len(open_lists) - 1} lists are open" if top else "there is nothing"
        raise _refusal(text, len(text), f"expected an S-expression, but {what} at the end")
    return top[0]


def _pieces(text: str, syntax: _Syntax) -> Iterator[tuple[int, str]]:
    """Yield place and text of each parenthesis, string and atom."""
    at = 0
    while at < len(text):
        match = syntax.piece.match(text, at)
        if match is None:
            raise _refusal(text, at, "a string is not closed")
        piece = match[0]
        if not piece[0].isspace() and piece[0] != syntax.comment:
            yield at, piece
        at = match.end()


def _refusal(text: str, at: int, message: str) -> FormatError:
    return FormatError(message, offset=len(text[:at].encode("utf-8", "surrogateescape")), field="config")


def _unescaped(text: str, syntax: _Syntax) -> str:
    if not syntax.escapes or "\\" not in text:
        return text

    def plain(match: re.Match[str]) -> str:
        code = match[1]
        if code[0] == "x" and len(code) > 1:
            return _octet(int(code[1:], 16))
        if code[0].isdecimal() and code.isascii() and (syntax.decimal or not set(code) & set("89")):
            return _octet(int(code, 10 if syntax.decimal else 8) & 0xFF)
        return _CONTROLS.get(code, code)

    # Octets above ASCII come as surrogates; those that make up UTF-8 become its characters.
    octets = _ESCAPED.sub(plain, text).encode("utf-8", "surrogateescape")
    return octets.decode("utf-8", "surrogateescape")


def _octet(value: int) -> str:
    return chr(value if value < 0x80 else 0xDC00 + value)
