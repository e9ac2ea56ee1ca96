"""Legacy to version 3: what the reader finds, written as the records that it stands for.

Pages pass uncopied. All else of a state is held until the state is complete and known to be the last: a
plain version 3 image has one. Of a stream with several (Remus) the pages of all complete states are written
one after the other, as in a live migration, and the rest of the last. The pages of each further state wait
in a file (`waiting`) until it is complete; those of one that never is are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import numpy.typing as npt

from migstream.errors import TruncatedError
from migstream.io.writer import StreamWriter
from migstream.legacy.compression import CompressedBatches
from migstream.legacy.image import emulator_records, headers, layout_records, shape_records, state_records
from migstream.legacy.reader import CompressedPages, LegacyItem, LegacyReader, PageBatch, VerifyMode
from migstream.legacy.report import LegacyReport
from migstream.legacy.source import Content
from migstream.legacy.state import GuestState
from migstream.legacy.waiting import WaitingRecords, room_wanted
from migstream.records import PageData, Record, array_of, libxc, libxl
from migstream.records.libxc import GuestType

__all__ = ["convert"]

PAGE_SIZE = 4096
POLICIES: dict[type[Record], str] = {libxc.X86CpuidPolicy: "CPUID", libxc.X86MsrPolicy: "MSR"}


def convert(
    reader: LegacyReader,
    writer: StreamWriter,
    *,
    wrap: bool,
    static_records: Sequence[Record],
    directory: str | None,
) -> LegacyReport:
    """Convert, as `migstream.legacy.convert_legacy` says; ``wrap``: into a libxl stream."""
    with ExitStack() as stack:
        return _Converter(reader, writer, stack, wrap=wrap, directory=directory).run(static_records)


class _Converter:
    def __init__(
        self,
        reader: LegacyReader,
        writer: StreamWriter,
        stack: ExitStack,
        *,
        wrap: bool,
        directory: str | None,
    ) -> None:
        self._reader = reader
        self._header = reader.header
        self._writer = writer
        self._stack = stack
        self._wrap = wrap
        self._directory = directory
        self._state: GuestState | None = None  # the last that is complete
        self._waiting: WaitingRecords | None = None
        self._compressed: CompressedBatches | None = None
        self._pages = 0  # of the state being read
        self._report = LegacyReport(
            self._header.guest,
            self._header.word_size,
            self._header.p2m_size,
            warnings=list(self._header.warnings),
        )

    def run(self, static_records: Sequence[Record]) -> LegacyReport:
        self._start(static_records)
        self._middle()
        assert self._state is not None, "a reader that ends without an error gave a state"
        self._finish(self._state)
        return self._report

    def _start(self, static_records: Sequence[Record]) -> None:
        writer = self._writer
        writer.order = "little"  # as every legacy stream is
        if self._wrap:
            writer.header(libxl.LibxlHeader(options=libxl.LEGACY))
            writer.record(libxl.LibxcContext())
        writer.header(*headers(self._header))
        for record in (*shape_records(self._header), *static_records, libxc.StaticDataEnd()):
            writer.record(record)
        for record in layout_records(self._header):
            writer.record(record)
        given = {type(record) for record in static_records}
        self._report.missing = [name for policy, name in POLICIES.items() if policy not in given]

    # Pages

    def _middle(self) -> None:
        try:
            for item in self._reader.items():
                self._item(item)
        except TruncatedError as exc:
            if self._state is None:
                raise
            self._report.warnings.append(
                f"{exc}: the output has state {self._report.states}, the last complete one"
            )

    def _item(self, item: LegacyItem) -> None:
        match item:
            case PageBatch(entries=entries, content=None):
                self._compressed_batches().batch(entries)
            case PageBatch(entries=entries, pages=pages, content=Content() as content):
                self._write_batch(entries, pages, content)
            case CompressedPages(content):
                self._compressed_batches().compressed(content)
            case VerifyMode():
                with self._page_writer() as writer:
                    writer.record(libxc.Verify())
            case GuestState():
                self._complete(item)

    @contextmanager
    def _page_writer(self) -> Iterator[StreamWriter]:
        """Give what pages are written to now: the first state's go straight to the output."""
        if self._state is None:
            yield self._writer
            return
        if self._waiting is None:
            self._waiting = WaitingRecords(self._directory)
            self._stack.callback(self._waiting.close)
        with room_wanted(self._directory):
            yield self._waiting.writer

    def _compressed_batches(self) -> CompressedBatches:
        if self._compressed is None:
            self._compressed = CompressedBatches(
                self._reader.source, self._header.p2m_size, self._write_pages, self._directory
            )
            self._stack.callback(self._compressed.close)
        return self._compressed

    def _write_batch(self, entries: npt.NDArray[np.uint64], pages: int, content: Content) -> None:
        if not len(entries):
            return
        octets = array_of(8, entries).raw
        length = PageData.head_size + len(octets) + PAGE_SIZE * pages
        head = libxc.RecordHeader(type=PageData.code, length=length).build()
        with self._page_writer() as writer:
            writer.write(head, PageData.struct("little").pack(len(entries), 0), octets)
            content.splice_to(writer)
        self._pages += pages

    def _write_pages(self, entries: npt.NDArray[np.uint64], pages: memoryview) -> None:
        if len(entries):
            with self._page_writer() as writer:
                writer.pages(array_of(8, entries), [pages])
            self._pages += len(pages) // PAGE_SIZE

    def _complete(self, state: GuestState) -> None:
        if self._compressed is not None:
            self._compressed.finish(state.offset)
        if self._waiting is not None:
            self._waiting.release(self._writer)
        self._state = state
        self._report.states += 1
        self._report.pages += self._pages
        self._pages = 0

    # The state

    def _finish(self, state: GuestState) -> None:
        writer, report = self._writer, self._report
        for record in state_records(self._header, state):
            writer.record(record)
        writer.end()
        if self._wrap:
            for record in emulator_records(self._header, state):
                writer.record(record)
            writer.end()
        if state.device_model is not None:
            report.device_model = state.device_model.signature
        report.losses += self._losses(state)
        if self._header.guest is GuestType.HVM and state.device_model is None and self._wrap:
            report.warnings.append("no device model record follows the image of this HVM guest")
        if report.states > 1:
            report.warnings.append(f"a checkpointed stream: of {report.states} states the last was written")

    def _losses(self, state: GuestState) -> list[str]:
        losses = []
        if state.device_model is not None and not self._wrap:
            losses.append(
                f"QEMU's state, {len(state.device_model.content)} octets: a libxc image has no place for it"
            )
        if state.toolstack is not None and state.toolstack.octets:
            if self._header.guest is not GuestType.HVM:
                losses.append("toolstack data: they belong to HVM guests")
            elif not self._wrap:
                losses.append("libxl's toolstack data (QEMU's physmap): a libxc image has no place for it")
        return losses
