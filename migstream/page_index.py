"""Where the last copy of each page of a guest lies in a stream: its final memory, without its content.

A stream that was written while the guest ran brings pages several times, and a checkpointed one brings
rounds of which the last may be void. `PageIndex.of` walks a stream once and keeps of each PFN what a restore
would end up with: the type named last, and the offset of the page that came with it. Nine octets a PFN,
whatever the number of passes; memory that no PFN of the stream falls into is never touched.

The offsets are of use where the input can be seeked: `migstream.io.seekable` makes it so.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from migstream.errors import FormatError, StreamError, TruncatedError
from migstream.guests.protocols import PAGE_SHIFT, PAGE_SIZE
from migstream.guests.state_book import StateBook
from migstream.io.reader import Frame, Layer, Stream
from migstream.layout import TABLE
from migstream.page_list import HAS_DATA, PageList
from migstream.records import Record, envelopes, libxc, libxl, xl
from migstream.records.libxc import GuestType
from migstream.records.pv_state import PV_LAYOUTS

__all__ = [
    "BODY_LIMIT",
    "DEFAULT_MAX_MEMORY",
    "KEPT_AROUND",
    "PageIndex",
    "implied_memory",
]

DEFAULT_MAX_MEMORY = 64 << 30  # octets of guest memory where the stream does not say how much there is
MOST_IMPLIED = 1 << 40  # octets that a config may imply: its number costs a liar nothing
BELOW_4G = 4 << 30  # octets: an HVM guest's memory makes room for devices below this address
BODY_LIMIT = 8 << 20  # octets of a libxc record that is kept; no real one of those comes near
AROUND_LIMIT = 16  # records around the image that are kept; a real stream has three
VCPU_LIMIT = 1 << 13  # vCPUs whose state is kept: Xen's own limit

#: The records of other layers than libxc that belong to a guest's state.
KEPT_AROUND: frozenset[type[Record]] = frozenset(
    (
        *(libxl.EmulatorContext, libxl.EmulatorXenstoreData),
        *(envelopes.Xenops, envelopes.QemuTrad, envelopes.QemuXen),
    )
)

_RESERVED_TYPES = (5, 8)  # the first and the last


class PageIndex(PageList):
    """The final state of a guest in a stream: its pages by PFN, and the records that go with them.

    ``layers`` are the stream's, ``state`` its libxc records, ``around`` the records of the layers around
    those, by what they are, such as ``libxl EMULATOR_CONTEXT of emulator 2, index 0``. ``checkpoints`` is how
    many were completed, ``void`` how many octets behind the last of them were left out of account. ``error``
    is what ended a stream early that was read with ``partial``.
    """

    def __init__(self, max_memory: int) -> None:
        """Make an empty index for PFNs below ``max_memory`` octets."""
        super().__init__(max_memory >> PAGE_SHIFT)
        self.max_memory = max_memory
        self.layers: list[Layer] = []
        self.state = StateBook()
        self.around: dict[str, Record] = {}
        self.checkpoints = 0
        self.void = 0
        self.error: StreamError | None = None

    @classmethod
    def of(
        cls,
        stream: Stream,
        *,
        checkpoint: int | None = None,
        max_memory: int | None = None,
        partial: bool = False,
        observe: Callable[[Frame], None] | None = None,
    ) -> PageIndex:
        """Walk ``stream``, of which nothing was read yet, and return the index of its final state.

        That is the state at its END; in a checkpointed stream, the one at its last complete checkpoint, or at
        number ``checkpoint`` (from 1). What is sent again behind VERIFY is not looked at. ``max_memory``:
        octets that the guest may reach up to; ``None`` for what the stream implies (`implied_memory`), else
        64 GiB. With ``partial``, a damaged stream counts up to the damage. ``observe`` is shown every frame
        but those of pages; it may decode it, but not consume its body otherwise.

        Raises `StreamError` for a damaged stream, for a page past ``max_memory`` and for a checkpoint that is
        not there; `OSError` and `DeadlineError` as reading does.
        """
        return _Walk(stream, checkpoint, max_memory, observe).run(partial)

    @property
    def guest_type(self) -> GuestType:
        """PV or HVM, as the domain header says. Raises `FormatError` where it says something else."""
        for layer in self.layers:
            domain = layer.header(libxc.DomainHeader)
            if domain is not None:
                if domain.type in set(GuestType):
                    return GuestType(domain.type)
                raise FormatError(
                    f"type {domain.type} is no guest type", offset=layer.offset + 24, field="type"
                )
        raise FormatError("the input has no libxc image, so no memory")


def implied_memory(layers: list[Layer]) -> int | None:
    """Return up to which octet a guest reaches that has the memory of its xl config; ``None`` without one.

    ``b_info.max_memkb``, and the 4 GiB below which an HVM guest's memory makes room for devices; at most
    1 TiB. (PV guests have X86_PV_P2M_FRAMES, which says it exactly.)
    """
    import json

    config = next((found for layer in layers if (found := layer.header(xl.SaveFileConfig))), None)
    if config is None:
        return None
    try:
        value = json.loads(config.text)["b_info"]["max_memkb"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return min((value << 10) + BELOW_4G, MOST_IMPLIED) if isinstance(value, int) and value > 0 else None


class _Round:
    """What came since the last checkpoint, and counts only when the next one is complete."""

    def __init__(self, size: int) -> None:
        self.pages = PageList(size)
        self.records: list[Record] = []
        self.around: dict[str, Record] = {}


class _Walk:
    """One walk over a stream."""

    def __init__(
        self,
        stream: Stream,
        checkpoint: int | None,
        max_memory: int | None,
        observe: Callable[[Frame], None] | None,
    ) -> None:
        self.observe = observe
        self.stream = stream
        self.checkpoint = checkpoint
        self.asked = max_memory
        self.index = PageIndex(DEFAULT_MAX_MEMORY if max_memory is None else max_memory)
        self.round: _Round | None = None  # none before the first checkpoint: a plain stream needs none
        self.verifying = False
        self.limited_by = "--max-memory" if max_memory is not None else "the default, 64 GiB"

    def run(self, partial: bool) -> PageIndex:
        index = self.index
        try:
            self._walk()
        except TruncatedError as exc:
            # A sender that died after a checkpoint is what checkpoints are for: the last complete one counts.
            if not self.stream.checkpoints and not partial:
                raise
            index.error = exc
        except StreamError as exc:
            if not partial:
                raise
            index.error = exc
        self._commit()
        if self.checkpoint is not None and index.checkpoints != self.checkpoint:
            raise FormatError(
                f"checkpoint {self.checkpoint} was asked for; the stream has {index.checkpoints}"
            )
        if index.checkpoints:
            index.void = self.stream.position - self.stream.checkpoint_offset
        return index

    def _walk(self) -> None:
        for item in self.stream.items():
            self._commit()
            if self.checkpoint is not None and self.index.checkpoints == self.checkpoint:
                return
            if isinstance(item, Layer):
                self._layer(item)
            elif not isinstance(item, Frame):
                return
            elif item.is_page_data:
                if not self.verifying:
                    self._pages(item)
            else:
                if self.observe is not None:
                    self.observe(item)
                self._record(item)

    def _commit(self) -> None:
        """Where a checkpoint was completed since the last look, make what came before it count."""
        index = self.index
        if self.stream.checkpoints == index.checkpoints:
            return
        index.checkpoints = self.stream.checkpoints
        if self.round is not None:
            index.absorb(self.round.pages)
            for record in self.round.records:
                index.state.apply(record)
            index.around |= self.round.around
        self.round = _Round(index.size)

    def _layer(self, layer: Layer) -> None:
        self.index.layers.append(layer)
        domain = layer.header(libxc.DomainHeader)
        if domain is None:
            return
        if domain.page_shift != PAGE_SHIFT:
            raise FormatError(
                f"pages of 2^{domain.page_shift} octets; expected 2^{PAGE_SHIFT}, as every x86 guest has",
                offset=layer.offset + 28,
                layer=layer.name,
                field="page_shift",
            )
        implied = implied_memory(self.index.layers)
        if implied is not None:
            self._limit(implied, "b_info.max_memkb of the config")

    def _limit(self, octets: int, why: str) -> None:
        """Bound the guest by what the stream says of it, unless the caller did, or pages came already."""
        if self.asked is None and not self.index.end:
            self.index.max_memory = octets
            self.index.resize(octets >> PAGE_SHIFT)
            self.limited_by = why

    def _record(self, frame: Frame) -> None:
        declared = frame.record_class
        if declared is libxc.Verify:
            self.verifying = True
        if declared is None:
            return
        if declared in KEPT_AROUND:
            kept = self.index.around if self.round is None else self.round.around
            record = frame.record()
            name = f"{frame.layer.name} {frame.type_name}"
            if isinstance(record, libxl.EmulatorContext | libxl.EmulatorXenstoreData):
                name += f" of emulator {record.emulator_id}, index {record.index}"
            if name in kept or len(kept) < AROUND_LIMIT:
                kept[name] = record
        elif declared in TABLE and frame.length <= BODY_LIMIT:
            self._libxc_record(frame.record(), frame)

    def _libxc_record(self, record: Record, frame: Frame) -> None:
        if isinstance(record, libxc.VcpuRecord) and record.vcpu_id >= VCPU_LIMIT:
            raise FormatError(
                f"vCPU {record.vcpu_id}; a guest has at most {VCPU_LIMIT}",
                offset=frame.offset + 8,
                layer=frame.layer.name,
                record=frame.ref,
                field="vcpu_id",
            )
        if isinstance(record, libxc.X86PvP2mFrames):
            # Only as far as the record really has frames: its own length vouches for the number.
            described = len(record.p2m_pfns) * PV_LAYOUTS[4].p2m_entries_per_frame
            end = min(record.p2m_end_pfn + 1, record.p2m_start_pfn + described)
            if record.p2m_start_pfn == 0:
                self._limit(end << PAGE_SHIFT, "the end of the guest's p2m")
        if self.round is None:
            self.index.state.apply(record)
        else:
            self.round.records.append(record)

    def _pages(self, frame: Frame) -> None:
        known = self.index if self.round is None else self.round.pages
        count, _ = frame.page_head()
        at = start = frame.offset + 16 + 8 * count
        for entries in frame.entries(count):
            pfns, types = entries.pfns, entries.types
            self._check(frame, pfns, types, known.size)
            with_data = HAS_DATA[types]
            offsets = np.full(len(pfns), -1, np.int64)
            pages = int(np.count_nonzero(with_data))
            offsets[with_data] = at + PAGE_SIZE * np.arange(pages)
            at += PAGE_SIZE * pages
            if at - frame.offset - 8 > frame.length:
                break
            size = self.stream.input.size
            if size is not None and at > size:  # a cut record: what is there of it counts with `partial`
                whole = offsets + PAGE_SIZE <= size
                pfns, types, offsets = pfns[whole], types[whole], offsets[whole]
            known.put(pfns.astype(np.int64), types, offsets)
        if at - frame.offset - 8 != frame.length:
            raise FormatError(
                f"expected {8 + 8 * count} octets of entries and {PAGE_SIZE} for each page among them, "
                f"{(at - start) // PAGE_SIZE} so far; the body has {frame.length} octets",
                offset=frame.offset,
                layer=frame.layer.name,
                record=frame.ref,
                field="length",
            )
        frame.finish()  # raises for a cut one here, where the error knows the record

    def _check(
        self, frame: Frame, pfns: npt.NDArray[np.uint64], types: npt.NDArray[np.uint8], size: int
    ) -> None:
        if not len(pfns):
            return
        reserved = (types >= _RESERVED_TYPES[0]) & (types <= _RESERVED_TYPES[1])
        highest = int(pfns.max())
        if highest < size and not reserved.any():
            return
        message, hint = (
            (
                f"PFN {highest:#x} is past the {self.index.max_memory:,} octets that the guest may have "
                f"({self.limited_by})",
                "--max-memory allows more",
            )
            if highest >= size
            else (f"type {int(types[reserved][0])} of PFN {int(pfns[reserved][0]):#x} is reserved", None)
        )
        raise FormatError(
            message,
            offset=frame.offset,
            layer=frame.layer.name,
            record=frame.ref,
            field="entries",
            hint=hint,
        )
