"""S-expressions: the configs of xend and xapi, and what of a xend config xl has a place for."""

from __future__ import annotations

from migstream.sexpr.parser import MAX_DEPTH, MAX_SIZE, Dialect, SExpr, parse
from migstream.sexpr.xend import to_xl_config

__all__ = ["MAX_DEPTH", "MAX_SIZE", "Dialect", "SExpr", "parse", "to_xl_config"]
