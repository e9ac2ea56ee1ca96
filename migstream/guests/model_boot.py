"""How a model machine looks when it has booted: which page is what, and what is in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import numpy.typing as npt

from migstream.errors import GuestError
from migstream.guests.machine_state import HvmPlaces, PvPlaces
from migstream.guests.memory import Memory
from migstream.guests.protocols import PAGE_SIZE
from migstream.guests.pv_pages import ENTRIES, PRESENT, TABLE_LEVEL, FrameMap
from migstream.records.page_types import DATA_TYPES, PageType

__all__ = [
    "HAS_DATA",
    "MIN_PAGES",
    "PvPlan",
    "fill",
    "hvm_places",
    "plan_pv",
    "scatter_holes",
    "write_tables",
]

MIN_PAGES = 64
MAX_PV_PAGES = 1 << 26  # 256 GiB: what one L3 table maps, less what would collide with the plan below

#: Page type -> whether its page has content: bool[16].
HAS_DATA: npt.NDArray[np.bool_] = np.isin(np.arange(16), [int(t) for t in DATA_TYPES])

USABLE = 0x8000_0000_0000_0063  # entry of an ordinary page: no-execute, dirty, accessed, writable, present
READ_ONLY = 0x8000_0000_0000_0061  # of a page table: a PV guest may not write it
TABLE = 0x67  # of a lower table
DIRECT_MAP_SLOT = 272  # of the L4: where Linux maps all memory
XEN_ENTRY = 0x8000_0000_0000_0063


def hvm_places(n_pages: int) -> HvmPlaces:
    """Return where an HVM guest's rings are: at the end of its memory."""
    last = n_pages - 1
    return HvmPlaces(
        store=last - 1, console=last - 3, ioreq=last - 4, buffered_ioreq=last - 5, ident_pt=last - 6
    )


@dataclass(frozen=True)
class PvPlan:
    """Which PFNs of a PV guest have a task. Arrays are uint64[n]."""

    places: PvPlaces
    store: int
    console: int
    p2m_frames: npt.NDArray[np.uint64]
    l1_tables: npt.NDArray[np.uint64]  # the i-th maps PFNs 512 i to 512 i + 511
    l2_tables: npt.NDArray[np.uint64]
    l3_table: int
    user_l3_table: int
    pinned: dict[PageType, int]  # one pinned table of each lower level

    @property
    def tables(self) -> dict[PageType, npt.NDArray[np.uint64]]:
        """Return the page tables by type."""
        tables = {
            PageType.L1TAB: self.l1_tables,
            PageType.L2TAB: self.l2_tables,
            PageType.L3TAB: np.array([self.l3_table, self.user_l3_table], np.uint64),
            PageType.L4TAB: np.array([self.places.user_table], np.uint64),
            PageType.L4TAB_PIN: np.array([self.places.top_table], np.uint64),
        }
        return tables | {type: np.array([pfn], np.uint64) for type, pfn in self.pinned.items()}

    @property
    def fixed(self) -> npt.NDArray[np.uint64]:
        """Every PFN with a task: the workload leaves them alone."""
        places = self.places
        singles = np.array([places.start_info, self.store, self.console, places.gdt], np.uint64)
        return np.concatenate((singles, self.p2m_frames, *self.tables.values()))


def plan_pv(n_pages: int) -> PvPlan:
    """Give PFNs to the page tables, the p2m and the rings of a PV guest of ``n_pages``."""
    if n_pages > MAX_PV_PAGES:
        raise GuestError(f"a PV model has at most {MAX_PV_PAGES >> 18} GiB, not {n_pages >> 18} GiB; try HVM")
    n_l1 = -(-n_pages // ENTRIES)
    # Every L1 lies at the end of what it maps, so that tables stand between ordinary pages.
    l1_tables = np.minimum(np.arange(n_l1, dtype=np.uint64) * ENTRIES + ENTRIES - 1, n_pages - 1)
    free: Iterator[int] = (pfn for pfn in count(16) if pfn % ENTRIES != ENTRIES - 1)

    def take(number: int) -> npt.NDArray[np.uint64]:
        return np.array([next(free) for _ in range(number)], np.uint64)

    start_info, store, console, gdt, top, user, l3, user_l3, *pinned = (next(free) for _ in range(11))
    return PvPlan(
        places=PvPlaces(start_info=start_info, gdt=gdt, top_table=top, user_table=user, n_pages=n_pages),
        store=store,
        console=console,
        p2m_frames=take(n_l1),  # 512 entries a frame, as an L1 has
        l1_tables=l1_tables.astype(np.uint64),
        l2_tables=take(-(-n_l1 // ENTRIES)),
        l3_table=l3,
        user_l3_table=user_l3,
        pinned=dict(zip((PageType.L1TAB_PIN, PageType.L2TAB_PIN, PageType.L3TAB_PIN), pinned, strict=True)),
    )


def scatter_holes(
    types: npt.NDArray[np.uint8], keep: npt.NDArray[np.uint64], rng: np.random.Generator
) -> None:
    """Make ballooned runs (XTAB, a sixteenth), broken and allocate-only pages, none of them in ``keep``."""
    n_pages = len(types)
    was = types[keep]
    runs = min(32, max(1, n_pages // 64))
    length = max(1, n_pages // 16 // runs)
    for first in rng.integers(0, n_pages - length, runs).tolist():
        types[first : first + length] = PageType.XTAB
    odd = rng.integers(0, n_pages, 8)
    types[odd[:3]] = PageType.BROKEN
    types[odd[3:]] = PageType.XALLOC
    types[keep] = was


def fill(memory: Memory, types: npt.NDArray[np.uint8], rng: np.random.Generator) -> None:
    """Give every page that has data content of its own: shared noise, and a first word no other page has."""
    noise = rng.integers(0, 256, (256, PAGE_SIZE), np.uint8)
    salt = np.uint64(rng.integers(1, 1 << 32)) << np.uint64(32)
    for at in range(0, len(types), len(noise)):
        end = min(at + len(noise), len(types))
        pfns = np.arange(at, end, dtype=np.uint64)[HAS_DATA[types[at:end]]]
        if len(pfns) == end - at:
            memory.pages[at:end] = noise[: end - at]
        else:
            memory.pages[pfns] = noise[: len(pfns)]
        memory.words[pfns, 0] = pfns ^ salt


def write_tables(plan: PvPlan, memory: Memory, types: npt.NDArray[np.uint8], frames: FrameMap) -> None:
    """Write the page tables: all memory mapped once, and Xen's own entries in the L4 tables."""
    words = memory.words
    for tables in plan.tables.values():
        words[tables] = 0
    n_pages = len(types)
    for i, table in enumerate(plan.l1_tables.tolist()):
        pfns = np.arange(i * ENTRIES, min((i + 1) * ENTRIES, n_pages), dtype=np.uint64)
        own = types[pfns]
        flags = np.where(TABLE_LEVEL[own] > 0, np.uint64(READ_ONLY), np.uint64(USABLE))
        mapped = (own != PageType.XTAB) & (own != PageType.BROKEN)
        words[table, : len(pfns)] = np.where(mapped, frames.mfns(pfns) << np.uint64(12) | flags, 0)

    def refer(table: int, slot: int, lower: npt.NDArray[np.uint64] | int, flags: int = TABLE) -> None:
        pfns = np.atleast_1d(np.asarray(lower, np.uint64))
        words[table, slot : slot + len(pfns)] = frames.mfns(pfns) << np.uint64(12) | np.uint64(flags)

    for i, l2_table in enumerate(plan.l2_tables.tolist()):
        refer(l2_table, 0, plan.l1_tables[i * ENTRIES : (i + 1) * ENTRIES])
    refer(plan.l3_table, 0, plan.l2_tables)
    refer(plan.places.top_table, DIRECT_MAP_SLOT, plan.l3_table)
    refer(plan.places.user_table, 0, plan.user_l3_table)
    refer(plan.user_l3_table, 0, plan.pinned[PageType.L2TAB_PIN])
    refer(plan.pinned[PageType.L3TAB_PIN], 0, plan.l2_tables[:1])
    refer(plan.pinned[PageType.L2TAB_PIN], 0, plan.pinned[PageType.L1TAB_PIN])
    refer(plan.pinned[PageType.L1TAB_PIN], 7, plan.store, flags=USABLE)
    for top in (plan.places.top_table, plan.places.user_table):
        words[top, 256] = np.uint64(frames.foreign << 12 | XEN_ENTRY) | PRESENT
