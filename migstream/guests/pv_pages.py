"""Page tables of 64-bit PV guests: between the frames (MFNs) that they hold and the PFNs of a stream.

A PV guest sees machine frames in its page tables. A saved page table holds PFNs instead (*normalised*);
restore puts the new machine's frames in (*localised*). Source: tools/libs/guest/xg_sr_save_x86_pv.c,
normalise_pagetable; xg_sr_restore_x86_pv.c, x86_pv_localise_page.
"""

from __future__ import annotations

import math
import random

import numpy as np
import numpy.typing as npt

from migstream.errors import GuestError
from migstream.records.page_types import PageType

__all__ = [
    "ENTRIES",
    "INVALID",
    "PRESENT",
    "TABLE_LEVEL",
    "FrameMap",
    "entry_frames",
    "referenced_pfns",
    "with_frames",
]

ENTRIES = 512  # entries of a page table
PRESENT = np.uint64(1)  # bit 0 of an entry
FRAME_SHIFT = np.uint64(12)  # bits 12-51 of an entry are its frame
FRAME_MASK = np.uint64(((1 << 40) - 1) << 12)
INVALID = np.uint64(0xFFFF_FFFF_FFFF_FFFF)  # no frame, no PFN

#: guest_width -> (level, slots): the entries that map Xen itself, which are never part of a stream.
XEN_SLOTS = {
    8: (4, slice(256, 272)),  # 0xffff8000_00000000 to 0xffff87ff_ffffffff
    4: (3, slice(4, 512)),  # a 32-bit guest has four L3 entries of its own
}

#: Page type -> level of the page table, 0 for all other pages: uint8[16].
TABLE_LEVEL: npt.NDArray[np.uint8] = np.zeros(16, np.uint8)
for _type in PageType:
    TABLE_LEVEL[_type] = _type.page_table_level


def entry_frames(entries: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return the frames that ``entries`` name; of those not present they mean nothing."""
    frames: npt.NDArray[np.uint64] = (entries & FRAME_MASK) >> FRAME_SHIFT
    return frames


def with_frames(entries: npt.NDArray[np.uint64], frames: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return ``entries`` with the frames of those that are present replaced by ``frames``."""
    replaced = (entries & ~FRAME_MASK) | (frames << FRAME_SHIFT)
    return np.where(entries & PRESENT != 0, replaced, entries)


def referenced_pfns(entries: npt.NDArray[np.uint64], level: int, max_pfn: int) -> npt.NDArray[np.uint64]:
    """Return the PFNs that a normalised page table refers to, uint64[n], ascending, each once.

    ``entries`` is uint64[512]. Raises `GuestError` where one is past ``max_pfn``.
    """
    pfns = entry_frames(entries)
    present = entries & PRESENT != 0
    wanted = np.unique(pfns[present])
    if len(wanted) and int(wanted[-1]) > max_pfn:
        index = int(np.argmax(present & (pfns == wanted[-1])))
        raise GuestError(
            f"entry {index} of an L{level} page table, {int(entries[index]):#x}, refers to PFN "
            f"{int(wanted[-1]):#x}; the guest's last is {max_pfn:#x}"
        )
    return wanted


class FrameMap:
    """Which machine frame (MFN) a guest has at which PFN: a seeded permutation, another for each seed.

    A multiplication modulo the number of frames gives it, so that it needs no table: frame numbers
    look scattered as they do on a real host, at no memory a page. A few frames are kept spare for pages
    that are exchanged; those are in a table.
    """

    SPARE = 64

    def __init__(self, n_pages: int, seed: int) -> None:
        self.n_pages = n_pages
        self.n_frames = n_pages + self.SPARE
        if self.n_frames > 1 << 32:
            raise ValueError("the arithmetic of a frame map holds for at most 2**32 frames (16 TiB)")
        chance = random.Random(f"frames {seed}")  # noqa: S311 - a model, not a secret
        self.base = chance.randrange(1 << 20, 1 << 24)
        self._step = chance.randrange(self.n_frames // 3, self.n_frames) | 1
        while math.gcd(self._step, self.n_frames) != 1:
            self._step += 1
        self._back = pow(self._step, -1, self.n_frames)
        self._moved: dict[int, int] = {}  # PFN -> slot of the spare frame that it was given

    @property
    def foreign(self) -> int:
        """An MFN that is not the guest's."""
        return self.base - 1

    def mfns(self, pfns: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Return the MFNs of ``pfns``, all below ``n_pages``, uint64 of the same shape."""
        slots = pfns.copy()
        for pfn, slot in self._moved.items():
            slots[pfns == pfn] = slot
        return slots * np.uint64(self._step) % np.uint64(self.n_frames) + np.uint64(self.base)

    def pfns(self, mfns: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Return the PFNs of ``mfns``, uint64 of the same shape; `INVALID` where it is not the guest's."""
        offsets = mfns - np.uint64(self.base)  # wraps to something large for MFNs below
        within = offsets < np.uint64(self.n_frames)
        slots = np.where(within, offsets, 0) * np.uint64(self._back) % np.uint64(self.n_frames)
        pfns = np.where(within & (slots < np.uint64(self.n_pages)), slots, INVALID)
        for pfn, slot in self._moved.items():
            pfns[pfns == pfn] = INVALID  # its first frame went back to the host
            pfns[within & (slots == slot)] = pfn
        return pfns

    def mfn(self, pfn: int) -> int:
        """Return the MFN of one PFN."""
        return int(self.mfns(np.array([pfn], np.uint64))[0])

    def exchange(self, pfn: int) -> None:
        """Give ``pfn`` a frame that the guest did not have. Raises `ValueError` when none is spare."""
        slot = self.n_pages + len(self._moved)
        if pfn in self._moved or slot >= self.n_frames:
            raise ValueError(f"no spare frame is left to exchange PFN {pfn:#x}")
        self._moved[pfn] = slot

    def normalise(
        self, tables: npt.NDArray[np.uint64], levels: npt.NDArray[np.uint8], guest_width: int = 8
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
        """Return copies of page tables with PFNs for MFNs, and which tables have an entry that is not ours.

        ``tables`` is uint64[n, 512], ``levels`` uint8[n]; the results are uint64[n, 512] and bool[n].
        """
        entries = tables.copy()
        level, slots = XEN_SLOTS[guest_width]
        entries[levels == level, slots] = 0
        pfns = self.pfns(entry_frames(entries))
        foreign = ((entries & PRESENT != 0) & (pfns == INVALID)).any(axis=1)
        return with_frames(entries, pfns), foreign
