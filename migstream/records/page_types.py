"""Page types, and which of them carry data (xen/include/public/domctl.h, XEN_DOMCTL_PFINFO_*)."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["DATA_TYPES", "MAX_PFN", "PFN_MASK", "RESERVED_MASK", "TYPE_SHIFT", "PageType"]

TYPE_SHIFT = 60  # an entry's bits 63-60 are its type,
RESERVED_MASK = 0xFF << 52  # bits 59-52 are reserved,
PFN_MASK = (1 << 52) - 1  # bits 51-0 are its PFN
MAX_PFN = PFN_MASK


class PageType(IntEnum):
    """What a PFN is, as a number in bits 63-60 of a PAGE_DATA entry. 5 to 8 are reserved."""

    NOTAB = 0x0
    L1TAB = 0x1
    L2TAB = 0x2
    L3TAB = 0x3
    L4TAB = 0x4
    L1TAB_PIN = 0x9
    L2TAB_PIN = 0xA
    L3TAB_PIN = 0xB
    L4TAB_PIN = 0xC
    BROKEN = 0xD
    XALLOC = 0xE
    XTAB = 0xF

    @property
    def has_data(self) -> bool:
        """Whether a page of this type has its content in the record."""
        return self not in (PageType.BROKEN, PageType.XALLOC, PageType.XTAB)

    @property
    def populated(self) -> bool:
        """Whether a restore gives the PFN memory: every type with data, and allocate-only."""
        return self.has_data or self is PageType.XALLOC

    @property
    def page_table_level(self) -> int:
        """1 to 4 for a page table, pinned or not, else 0."""
        level = self & 0x7
        return level if self.has_data and 1 <= level <= 4 else 0


#: The types whose pages are in the record.
DATA_TYPES = frozenset(t for t in PageType if t.has_data)


def type_name(type: int) -> str:
    """Return the name of a page type; reserved ones are ``RESERVED_5`` to ``RESERVED_8``."""
    try:
        return PageType(type).name
    except ValueError:
        return f"RESERVED_{type:X}"
