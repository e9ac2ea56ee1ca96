"""The memory of a stream as an image that other tools read: raw, ELF core, Xen core dump or LiME.

An image has what the guest ends up with after a restore (`PageIndex`): one copy of each page, in the order
of PFNs. Memory stays as the stream has it, so the page tables of a PV guest name PFNs, and can be followed
within the image, as CR3 can. Pages without content, be they holes, ballooned (XTAB), only allocated (XALLOC)
or broken, are left out, and counted.

The stream is walked twice, once for the index and once to fetch the pages; none is held in memory.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from migstream.errors import FormatError, GuestError
from migstream.guests import lime, xen_core
from migstream.guests.elf import vmcore_head
from migstream.guests.protocols import PAGE_SHIFT, PAGE_SIZE
from migstream.guests.registers import guest_contexts, processors
from migstream.io.ranges import RangeWriter
from migstream.io.seekable import SeekableStream
from migstream.page_index import PageIndex
from migstream.records import envelopes, libxc, libxl
from migstream.records.libxc import GuestType
from migstream.records.page_types import PageType

__all__ = ["Extraction", "ImageFormat", "PageTables", "Selection", "device_model", "extract_memory"]


class ImageFormat(Enum):
    """What an image is written as."""

    RAW = "raw"
    ELF = "elf"
    XEN_CORE = "xen-core"
    LIME = "lime"


class PageTables(Enum):
    """What becomes of a PV guest's page tables; in a stream they name PFNs, in a guest machine frames."""

    PFN = "pfn"  # as they are in the stream
    OMIT = "omit"  # left out


TABLES = frozenset(int(t) for t in PageType if t.page_table_level)


@dataclass(frozen=True)
class Selection:
    """Which pages are wanted: PFNs in [``first``, ``end``), and what becomes of page tables."""

    first: int = 0
    end: int | None = None
    page_tables: PageTables = PageTables.PFN

    @property
    def omit(self) -> frozenset[int]:
        """Types of pages that are left out although they have content."""
        return TABLES if self.page_tables is PageTables.OMIT else frozenset()


@dataclass(frozen=True)
class Extraction:
    """What an extraction wrote and left out.

    ``pages`` were written; ``left_out`` counts by type those that were not, of the PFNs that the stream has.
    ``page_tables`` of the pages are page tables of a PV guest. ``vcpus``: whose registers the image has.
    """

    pages: int
    left_out: Counter[PageType]
    page_tables: int
    vcpus: int

    def to_json(self) -> dict[str, object]:
        """Return the counts, types by name."""
        left_out = {type.name: count for type, count in sorted(self.left_out.items())}
        return {**vars(self), "left_out": left_out}


def extract_memory(
    source: SeekableStream,
    index: PageIndex,
    fd: int,
    format: ImageFormat,
    selection: Selection | None = None,
) -> Extraction:
    """Write the memory that ``index`` found in ``source`` to the descriptor ``fd``, an empty file.

    All formats but raw may go to a pipe as well. Of a selection, a raw image starts at its first PFN.

    Raises `GuestError` where the selection has no page, `FormatError` where the stream is no image of a
    guest, `OSError` as writing does.
    """
    chosen = selection or Selection()
    guest = index.guest_type
    counts = index.count_by_type(chosen.first, chosen.end)
    pages = sum(n for type, n in counts.items() if PageType(type).has_data and type not in chosen.omit)
    if not pages:
        raise GuestError("the stream has no page with content there, so there is no image to write")
    out = RangeWriter(source.input, fd)
    vcpus = _WRITERS[format](index, out, fd, chosen, guest, pages)
    out.flush()
    return Extraction(
        pages=pages,
        left_out=Counter(
            {PageType(t): n for t, n in counts.items() if not PageType(t).has_data or t in chosen.omit}
        ),
        page_tables=0 if chosen.omit else sum(counts[type] for type in TABLES),
        vcpus=vcpus,
    )


def device_model(index: PageIndex) -> bytes:
    """Return the device model's state, QEMU's as a rule. Raises `FormatError` where there is none."""
    for record in index.around.values():
        match record:
            case libxl.EmulatorContext():
                return record.emulator_ctx
            case envelopes.QemuTrad() | envelopes.QemuXen():
                return record.state
    raise FormatError("the stream has no EMULATOR_CONTEXT: its guest had no device model")


def _raw(index: PageIndex, out: RangeWriter, fd: int, chosen: Selection, guest: GuestType, pages: int) -> int:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise GuestError("a raw image has holes and needs a regular file; the other formats can go elsewhere")
    expected = -1
    for run in index.runs(chosen.first, chosen.end, omit=chosen.omit):
        if run.first != expected:
            out.seek((run.first - chosen.first) << PAGE_SHIFT)
        out.copy(run.offset, run.pages << PAGE_SHIFT)
        expected = run.first + run.pages
    return 0


def _elf(index: PageIndex, out: RangeWriter, fd: int, chosen: Selection, guest: GuestType, pages: int) -> int:
    registers = processors(index.state)
    out.write(vmcore_head(*index.pfn_runs(chosen.first, chosen.end, omit=chosen.omit), registers))
    _pages(index, out, chosen)
    return len(registers)


def _lime(
    index: PageIndex, out: RangeWriter, fd: int, chosen: Selection, guest: GuestType, pages: int
) -> int:
    starts, counts = index.pfn_runs(chosen.first, chosen.end, omit=chosen.omit)
    ranges = zip(starts.tolist(), counts.tolist(), strict=True)
    end = -1
    for run in index.runs(chosen.first, chosen.end, omit=chosen.omit):
        if run.first != end:
            out.write(lime.range_header(*next(ranges)))
        out.copy(run.offset, run.pages << PAGE_SHIFT)
        end = run.first + run.pages
    return 0


def _xen_core(
    index: PageIndex, out: RangeWriter, fd: int, chosen: Selection, guest: GuestType, pages: int
) -> int:
    contexts = guest_contexts(index.state)
    shared_info = next((r.shared_info for r in index.state.state if isinstance(r, libxc.SharedInfo)), b"")
    domain = next(d for layer in index.layers if (d := layer.header(libxc.DomainHeader)))
    xen = domain.xen_major, domain.xen_minor
    out.write(xen_core.core_head(guest, pages, contexts, shared_info, xen=xen))
    _pages(index, out, chosen)
    for pfns in index.pfns_with_pages(chosen.first, chosen.end, omit=chosen.omit):
        out.write(xen_core.frame_list(guest, pfns))
    out.write(xen_core.core_tail(guest, shared_info))
    return len(contexts)


def _pages(index: PageIndex, out: RangeWriter, chosen: Selection) -> None:
    for run in index.runs(chosen.first, chosen.end, omit=chosen.omit):
        out.copy(run.offset, run.pages * PAGE_SIZE)


#: Each writes an image and returns of how many vCPUs it has the registers.
_WRITERS: dict[ImageFormat, Callable[[PageIndex, RangeWriter, int, Selection, GuestType, int], int]] = {
    ImageFormat.RAW: _raw,
    ImageFormat.ELF: _elf,
    ImageFormat.XEN_CORE: _xen_core,
    ImageFormat.LIME: _lime,
}
