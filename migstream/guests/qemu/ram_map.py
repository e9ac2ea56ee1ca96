"""Where guest memory lies: guest-physical addresses, and QEMU's other blocks of memory.

A PC's RAM is one piece, of which the part that does not fit below the PCI hole goes to 4 GiB (or, on AMD
machines with very much of it, above 1 TiB). How it is split depends on the machine type and its options, so
it is read from QEMU's flat view of the address space and not computed. The view does not show memory that
something lies above (ROM at 0xc0000, SMRAM at 0xa0000): that is memory all the same, and is migrated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from migstream.errors import GuestError
from migstream.guests.protocols import PAGE_SHIFT, PAGE_SIZE

__all__ = ["Block", "Piece", "RamMap", "parse_blocks", "parse_flat_view", "parse_ram_map"]

_AREA = re.compile(
    r"^ +([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, ([^)]+)\): (.+?)(?: @([0-9a-f]{16}))?(?: KVM)?$",
    re.MULTILINE,
)
_SYSTEM_VIEW = re.compile(r'^ AS "memory", root: system$', re.MULTILINE)
_BLOCK = re.compile(r"^ *(\S.*?) +\d+ [KMG]iB +0x[0-9a-f]+ +0x([0-9a-f]+) +0x[0-9a-f]+", re.MULTILINE)


@dataclass(frozen=True)
class Area:
    """A part of the address space: first address, octets, its memory region, and the offset in that."""

    address: int
    length: int
    region: str
    offset: int


@dataclass(frozen=True)
class Block:
    """One of QEMU's blocks of memory: its name in a migration, and the octets in use."""

    name: str
    length: int


@dataclass(frozen=True)
class Piece:
    """RAM that is contiguous for the guest: its first PFN, where in the file it starts, how many pages."""

    first_pfn: int
    file_page: int
    n_pages: int


@dataclass(frozen=True)
class RamMap:
    """RAM of ``size`` octets: the first ``below`` of them at address 0, the rest, if any, at ``above_base``.

    Raises `GuestError` for values that no machine has: parts of pages, overlapping or empty parts.
    """

    size: int
    below: int
    above_base: int

    def __post_init__(self) -> None:
        whole = all(value % PAGE_SIZE == 0 for value in (self.size, self.below, self.above_base))
        split = self.below < self.size
        if not (whole and 0 < self.below <= self.size and split == (self.above_base >= max(self.below, 1))):
            raise GuestError(
                f"no machine has {self.size:#x} octets of RAM, {self.below:#x} of them at 0 and the rest at "
                f"{self.above_base:#x}"
            )

    @property
    def pieces(self) -> list[Piece]:
        """The one or two parts, in the order of PFNs and of the file."""
        low = self.below >> PAGE_SHIFT
        pieces = [Piece(0, 0, low)]
        if self.size > self.below:
            pieces.append(Piece(self.above_base >> PAGE_SHIFT, low, (self.size >> PAGE_SHIFT) - low))
        return pieces

    @property
    def max_pfn(self) -> int:
        """The PFN of the last page."""
        last = self.pieces[-1]
        return last.first_pfn + last.n_pages - 1

    def holds(self, pfns: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Return which of ``pfns``, uint64[n], are RAM, bool[n]."""
        held = np.zeros(len(pfns), np.bool_)
        for piece in self.pieces:
            held |= pfns - np.uint64(piece.first_pfn) < piece.n_pages  # below the first it wraps round
        return held

    def file_pages(self, pfns: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Return where in the file the pages ``pfns``, uint64[n], are. Raises `GuestError` for no RAM."""
        held = self.holds(pfns)
        if not held.all():
            raise GuestError(
                f"PFN {int(pfns[~held][0]):#x} is no RAM of the QEMU machine, which has {self}; its memory "
                "has to be that of the machine that was saved"
            )
        gap = self.pieces[-1].first_pfn - self.pieces[-1].file_page
        return pfns - np.where(pfns >= self.pieces[-1].first_pfn, np.uint64(gap), np.uint64(0))

    def file_page_of_run(self, first_pfn: int, count: int) -> int | None:
        """Return where ``count`` pages from ``first_pfn`` start in the file; ``None`` unless in one piece."""
        for piece in self.pieces:
            if piece.first_pfn <= first_pfn and first_pfn + count <= piece.first_pfn + piece.n_pages:
                return piece.file_page + first_pfn - piece.first_pfn
        return None

    def __str__(self) -> str:
        size = f"{self.size >> 20} MiB"
        if self.size == self.below:
            return size
        return f"{size}, {self.below >> 20} MiB of them from 0 and the rest from {self.above_base:#x}"


def parse_flat_view(mtree: str) -> list[Area]:
    """Return the areas of the system's memory out of the text of ``info mtree -f``; raises `GuestError`."""
    for view in re.split(r"^FlatView #\d+$", mtree, flags=re.MULTILINE):
        if _SYSTEM_VIEW.search(view):
            return list(_areas(view))
    raise GuestError("QEMU's 'info mtree -f' shows no address space 'memory': this QEMU is not supported")


def _areas(view: str) -> Iterator[Area]:
    for first, last, _, region, offset in _AREA.findall(view):
        yield Area(int(first, 16), int(last, 16) - int(first, 16) + 1, region, int(offset or "0", 16))


def parse_ram_map(areas: Iterable[Area], region: str, size: int) -> RamMap:
    """Return how ``size`` octets of RAM, the memory region ``region``, lie in the flat view ``areas``.

    Raises `GuestError` for RAM in more than two places.
    """
    shifts: dict[int, int] = {}  # address minus offset in the RAM -> the lowest such offset
    for area in areas:
        if area.region == region:
            shift = area.address - area.offset
            shifts[shift] = min(shifts.get(shift, size), area.offset)
    above = sorted(set(shifts) - {0})
    if 0 not in shifts or len(above) > 1:
        places = ", ".join(f"{shift + offset:#x}" for shift, offset in sorted(shifts.items())) or "nowhere"
        raise GuestError(
            f"the RAM {region!r} lies at {places}; expected one part at 0 and one above 4 GiB: machines "
            "of another shape are not supported"
        )
    if not above:
        return RamMap(size, size, 0)
    return RamMap(size, shifts[above[0]], above[0] + shifts[above[0]])


def parse_blocks(text: str) -> list[Block]:
    """Return QEMU's blocks of memory out of the text of ``info ramblock``."""
    return [Block(name, int(used, 16)) for name, used in _BLOCK.findall(text)]
