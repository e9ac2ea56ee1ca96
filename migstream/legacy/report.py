"""What a conversion tells about the legacy stream that it read."""

from __future__ import annotations

from dataclasses import dataclass, field

from migstream.records.libxc import GuestType

__all__ = ["LegacyReport"]


@dataclass
class LegacyReport:
    """What a legacy stream was, and what became of it.

    ``word_size`` is the toolstack's, in octets; ``pages`` counts pages with content in the output;
    ``states`` the consistent states of the stream, of which the last was written. ``device_model`` is the
    signature of QEMU's record, ``None`` without one. ``missing`` names the static data that a restore has
    to get from elsewhere; ``losses`` says what the output does not carry, ``warnings`` what else is worth
    knowing.
    """

    guest: GuestType
    word_size: int
    p2m_size: int
    pages: int = 0
    states: int = 0
    device_model: str | None = None
    missing: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
