"""The legacy reader: a stream as a sequence of page batches and consistent states.

Theory of operation. A legacy stream is a header, then one or more rounds of *body* and *tail*. The body is
a series of chunks; a plain save has one round, a checkpointed one (Remus) as many as it lived for. Which
chunk says what is `chunks.CHUNKS`. `LegacyReader.items` hands out

* a `PageBatch` for each batch of PFNs, before its pages are read,
* `CompressedPages` for each piece of compressed page data,
* `VerifyMode` where the pages from here on are there to be compared only,
* a `GuestState` for each tail: with it, the pages so far are one consistent state.

What small chunks tell is collected into the next `GuestState`. What nobody consumed is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from migstream.io.inputs import Input
from migstream.legacy.chunks import CHUNKS, PAGES, Body, ChunkType
from migstream.legacy.header import read_header
from migstream.legacy.source import Content
from migstream.legacy.state import Collected, GuestState, Qemu, ToolstackData, read_tail
from migstream.records.legacy import MAX_BATCH
from migstream.records.libxc import GuestType, X86TscInfo
from migstream.records.page_types import DATA_TYPES, TYPE_SHIFT, PageType

__all__ = ["CompressedPages", "LegacyItem", "LegacyReader", "PageBatch", "VerifyMode"]

PAGE_SIZE = 4096
MAX_VCPUS = 4096  # as many as Xen's own saver and restorer knew
MAX_TOOLSTACK = 1 << 20  # octets of toolstack data; real ones have a few hundred

LEGACY_TYPE_SHIFT = 28  # a word's bits 31-28 are its type,
LEGACY_PFN_MASK = (1 << LEGACY_TYPE_SHIFT) - 1  # bits 27-0 its PFN
#: What a saver wrote in place of a PFN that it could not map: which PFN that was is not told.
NOTHING = PageType.XTAB << LEGACY_TYPE_SHIFT
_KNOWN = np.isin(np.arange(16), list(PageType))  # by type, bool[16]
_HAS_DATA = np.isin(np.arange(16), list(DATA_TYPES))


@dataclass(frozen=True)
class PageBatch:
    """PFNs with their types, and the pages of those whose type has data.

    ``entries`` are uint64[n], as PAGE_DATA has them (it may be that none is left); ``pages`` is how many of
    them have data. ``content`` holds these pages; ``None`` where they come as `CompressedPages`.
    """

    entries: npt.NDArray[np.uint64]
    pages: int
    content: Content | None


@dataclass(frozen=True)
class CompressedPages:
    """A piece of compressed page data, for the batches before it whose pages are still to come."""

    content: Content


@dataclass(frozen=True)
class VerifyMode:
    """All pages from here on are there to be compared with those before."""


LegacyItem = PageBatch | CompressedPages | VerifyMode | GuestState


class LegacyReader:
    """A legacy stream, read once from the input's position.

    The options are those of `migstream.legacy.convert_legacy`.
    """

    def __init__(
        self,
        source: Input,
        guest: GuestType | None = None,
        *,
        checkpointed: bool | None = None,
        device_model: bool = True,
    ) -> None:
        self.source, self.header = read_header(source, guest)
        # An envelope that goes on behind the image holds a single state.
        self._may_go_on = device_model if checkpointed is None else checkpointed
        self._qemu = Qemu.OR_END if device_model else Qemu.OR_ANYTHING
        self._collected = Collected()
        self._compressing = False
        self._readers = {
            Body.NONE: self._flag,
            Body.PARAM: self._param,
            Body.VCPU_INFO: self._vcpu_info,
            Body.TSC_INFO: self._tsc_info,
            Body.SIZED_DATA: self._toolstack,
        }

    def items(self) -> Iterator[LegacyItem]:
        """Yield the stream's items in order; one pass. Raises `FormatError` and `TruncatedError`."""
        while True:
            yield from self._body()
            state = read_tail(self.source, self.header, self._collected, self._qemu)
            if state.device_model is not None:
                self._qemu = Qemu.REQUIRED  # a further state without it is no whole one
            yield state
            self._compressing = "ENABLE_COMPRESSION" in self._collected.flags
            if self._ends(state) or not self.source.input.peek(1):
                return

    def _ends(self, state: GuestState) -> bool:
        ended_by_qemu = state.device_model is not None and state.device_model.to_end
        return "LAST_CHECKPOINT" in self._collected.flags or ended_by_qemu or not self._may_go_on

    def _body(self) -> Iterator[LegacyItem]:
        source = self.source
        while True:
            offset = source.position
            source.enter("CHUNK")
            marker = source.integer(4, "a chunk's id", signed=True)
            if marker == 0:
                return
            if marker > 0:
                source.rename(PAGES)
                batch = self._batch(marker, offset)
                yield batch
                if batch.content is not None:
                    batch.content.skip()
                continue
            chunk = self._chunk_type(marker, offset)
            if chunk.body is Body.COMPRESSED:
                compressed = CompressedPages(Content(source, source.word("a length"), "compressed pages"))
                yield compressed
                compressed.content.skip()
            elif chunk.name == "ENABLE_VERIFY_MODE":
                yield VerifyMode()
            else:
                self._readers[chunk.body](chunk)

    def _chunk_type(self, marker: int, offset: int) -> ChunkType:
        """Return what the negative id ``marker``, found at ``offset``, stands for in this stream."""
        chunk = CHUNKS.get(marker)
        if chunk is None:
            raise self.source.fault(
                f"expected a chunk: 1 to {MAX_BATCH} PFNs, 0, or an id from -1 to {min(CHUNKS)}; "
                f"found {marker}",
                offset,
            )
        self.source.rename(chunk.name)
        if chunk.body is Body.TMEM:
            raise self.source.fault(
                "transcendent memory (tmem) has no place in later streams and cannot be carried over",
                offset,
                hint="switch tmem off in the guest and save it again with the Xen that wrote this",
            )
        if chunk.body is Body.PARAM and self.header.guest is not GuestType.HVM:
            raise self.source.fault("an HVM parameter in the stream of a PV guest", offset)
        if chunk.body is Body.COMPRESSED and not self._compressing:
            raise self.source.fault(
                "compressed pages, but no ENABLE_COMPRESSION before the last tail", offset
            )
        return chunk

    # Batches

    def _batch(self, count: int, offset: int) -> PageBatch:
        source = self.source
        if count > MAX_BATCH:
            raise source.fault(f"a batch of {count} PFNs; at most {MAX_BATCH} are allowed", offset)
        start = source.position
        words = source.words(count, "a batch's PFNs")

        def fault(wrong: npt.NDArray[np.bool_], message: str) -> None:
            if wrong.any():
                at = int(wrong.argmax())
                raise source.fault(
                    f"entry {at} is {int(words[at]):#x}: {message}", start + at * source.word_size
                )

        types = words >> np.uint64(LEGACY_TYPE_SHIFT)
        pfns = words & np.uint64(LEGACY_PFN_MASK)
        fault(types > PageType.XTAB, "only the lower 32 bits are used")
        fault(~_KNOWN[types], "page types 5 to 8 are reserved")
        told = words != NOTHING
        fault(
            told & (pfns >= self.header.p2m_size), f"its PFN is not below p2m_size {self.header.p2m_size:#x}"
        )
        entries = (types << np.uint64(TYPE_SHIFT) | pfns)[told]
        pages = int(np.count_nonzero(_HAS_DATA[types]))
        content = None if self._compressing else Content(source, PAGE_SIZE * pages, "a batch's pages")
        return PageBatch(entries, pages, content)

    # Small chunks

    def _flag(self, chunk: ChunkType) -> None:
        self._collected.flags.add(chunk.name)

    def _param(self, chunk: ChunkType) -> None:
        self.source.skip(4, "padding")
        value = self.source.integer(8, "the parameter's value")
        # Savers leave out what is zero, and restorers take zero for absent.
        if chunk.param is not None and value:
            self._collected.params[chunk.param] = value

    def _vcpu_info(self, chunk: ChunkType) -> None:
        offset = self.source.position
        highest = self.source.integer(4, "the highest vCPU id", signed=True)
        if not 0 <= highest < MAX_VCPUS:
            raise self.source.fault(
                f"the highest vCPU id is {highest}, expected 0 to {MAX_VCPUS - 1}", offset
            )
        octets = self.source.take(8 * (highest // 64 + 1), "the bitmap of vCPUs")
        online = int.from_bytes(octets, "little")
        self._collected.vcpu_ids = [i for i in range(highest + 1) if online >> i & 1]
        self._collected.vcpu_info_seen = True

    def _tsc_info(self, chunk: ChunkType) -> None:
        mode = self.source.integer(4, "the TSC mode")
        nsec = self.source.integer(8, "the TSC's nanoseconds")
        khz = self.source.integer(4, "the TSC's frequency")
        incarnation = self.source.integer(4, "the TSC's incarnation")
        self._collected.tsc = X86TscInfo(mode=mode, khz=khz, nsec=nsec, incarnation=incarnation)

    def _toolstack(self, chunk: ChunkType) -> None:
        offset = self.source.position
        length = self.source.integer(4, "the length of toolstack data")
        if length > MAX_TOOLSTACK:
            raise self.source.fault(
                f"{length} octets of toolstack data; more than {MAX_TOOLSTACK} are not read", offset
            )
        self._collected.toolstack = ToolstackData(
            self.source.take(length, "toolstack data"), offset + 4, self.source.record
        )
