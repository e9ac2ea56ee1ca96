"""A case: one stream, in words, and what is expected of whoever reads it. All of it is written by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Case", "case"]

Answer = Literal["accept", "refuse"]


@dataclass(frozen=True)
class Case:
    """One vector as its author says it; ``README.md`` has the meaning of each field."""

    name: str
    description: str
    octets: bytes
    sound: bool
    rules: tuple[str, ...]
    restore: Answer | None
    missing: tuple[str, ...] | None
    guest: str
    stream_type: str
    reference: str | None


def case(
    name: str,
    description: str,
    octets: bytes,
    verify: Literal["sound", "unsound"],
    rules: str = "",
    restore: Answer | None = None,
    *,
    missing: str = "usual",
    guest: Literal["hvm", "pv"] = "hvm",
    stream_type: Literal["plain", "remus", "colo"] = "plain",
    reference: str | None = None,
) -> Case:
    """Return a case. ``rules`` and ``missing`` are words in one string; ``never``: never told.

    Where ``missing`` is not given, nothing is missing, but that a restore which refuses the stream does so
    before it tells. ``reference``: an erratum, or what else of a specification the case is about.
    """
    if missing == "usual":
        missing = "never" if restore == "refuse" else ""
    return Case(
        name=name,
        description=description,
        octets=octets,
        sound=verify == "sound",
        rules=tuple(sorted(rules.split())),
        restore=restore,
        missing=None if missing == "never" else tuple(missing.split()),
        guest=guest,
        stream_type=stream_type,
        reference=reference,
    )
