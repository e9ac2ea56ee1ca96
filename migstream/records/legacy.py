"""How a legacy (version 1) libxc stream is recognised: it has no header that says what it is.

Source: the specification's section Legacy Images, and xc_domain_save.c of Xen 4.4.
"""

from __future__ import annotations

from dataclasses import dataclass

from migstream.records.libxc import GuestType

__all__ = [
    "MAX_BATCH",
    "MAX_P2M_SIZE",
    "MIN_P2M_SIZE",
    "SHAPE_LENGTH",
    "LegacyShape",
    "is_legacy",
    "word_size_of",
]

MAX_P2M_SIZE = 1 << 28  # PFNs: an entry has 28 bits for one, and the savers refused larger guests
MIN_P2M_SIZE = 16  # PFNs; no guest is that small, and small numbers stand at the start of many formats
MAX_BATCH = 1024  # PFNs that one chunk may have
SHAPE_LENGTH = 12  # octets by which a legacy stream is told

_LOWEST_CHUNK = -20  # the last chunk id that Xen defined, XC_SAVE_ID_HVM_NR_IOREQ_SERVER_PAGES
_ALL_ONES = b"\xff" * 4


@dataclass(frozen=True)
class LegacyShape:
    """What the first octets of a legacy stream tell.

    ``word_size`` is that of the saving toolstack's ``unsigned long`` in octets, 4 or 8; ``p2m_size`` the
    guest's highest PFN plus one.
    """

    word_size: int
    guest: GuestType
    p2m_size: int

    def __str__(self) -> str:
        guest = "a PV" if self.guest is GuestType.PV else "an HVM"
        return f"a legacy (version 1) libxc stream of a {8 * self.word_size}-bit toolstack and {guest} guest"


def word_size_of(start: bytes) -> int:
    """Return the toolstack's word size, 4 or 8 octets, by the first 8 octets of a legacy stream.

    A 64-bit toolstack's p2m_size leaves octets 4 to 7 zero; in a 32-bit one's stream a chunk stands there.
    """
    return 4 if any(start[4:8]) else 8


def is_legacy(start: bytes) -> LegacyShape | None:
    """Return the shape of the legacy stream that ``start``, its first 12 octets, begins, else ``None``.

    The stream starts with p2m_size, a word. Behind it a PV guest has its extended info, marked by a word of
    all ones, and an HVM guest its first chunk: a batch of 1 to 1024 PFNs, or a small negative id.
    """
    if len(start) < 8:
        return None
    width = word_size_of(start)
    p2m_size = int.from_bytes(start[:width], "little")
    mark = start[width : width + 4]
    if not MIN_P2M_SIZE <= p2m_size <= MAX_P2M_SIZE or len(mark) < 4:
        return None
    if mark == _ALL_ONES:
        return LegacyShape(width, GuestType.PV, p2m_size)
    chunk = int.from_bytes(mark, "little", signed=True)
    if 1 <= chunk <= MAX_BATCH or _LOWEST_CHUNK <= chunk < -1:
        return LegacyShape(width, GuestType.HVM, p2m_size)
    return None
