"""A guest that does what a test tells it, and a recorder that merges what it was asked with the records."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from migstream.bitmap import PfnBitmap
from migstream.errors import GuestError
from migstream.io import reader
from migstream.records import PageData, Record, array_of, libxc
from migstream.records.libxc import GuestType
from migstream.records.page_types import PageType

PAGE = 4096

Pfns = npt.NDArray[np.uint64]


class Recorder:
    """Notes events together with how much of the stream was written when they happened."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.events: list[tuple[int, str]] = []

    def note(self, event: str) -> None:
        self.events.append((os.fstat(self.fd).st_size, event))

    def answers(self, name: str, *values: int) -> Callable[[], int]:
        """Return a callback that notes ``name`` and answers ``values`` in turn."""
        left = list(values)

        def callback() -> int:
            self.note(name)
            return left.pop(0)

        return callback

    def story(self) -> list[str]:
        """Return records and events in the order in which they happened."""
        os.lseek(self.fd, 0, os.SEEK_SET)
        told = [(0, -1, "headers")]
        with reader.open(self.fd) as stream:
            told += [(f.offset, 1, f.type_name) for f in stream]
        told += [(size, 0, event) for size, event in self.events]
        # Something at the size that a record starts at happened before that record was written.
        return [text for _, _, text in sorted(told, key=lambda item: item[:2])]

    def page_data(self) -> list[PageData]:
        os.lseek(self.fd, 0, os.SEEK_SET)
        with reader.open(self.fd) as stream:
            records = (frame.record() for frame in stream if frame.is_page_data)
            return [record for record in records if isinstance(record, PageData)]

    def sent(self) -> list[list[int]]:
        """Return the PFNs of each PAGE_DATA record."""
        return [record.pfns.tolist() for record in self.page_data()]


@dataclass
class ScriptedGuest:
    """A guest of ``size`` pages; ``dirtied`` holds what each CLEAN of the log finds, in turn."""

    recorder: Recorder
    size: int = 64
    guest_type: GuestType = GuestType.HVM
    dirtied: list[Sequence[int]] = field(default_factory=list)
    refuses: set[str] = field(default_factory=set)
    waits: set[int] = field(default_factory=set)  # page tables that change all the time while it runs
    suspended: bool = False
    stays_awake: bool = False

    def __post_init__(self) -> None:
        self.memory = np.random.default_rng(1).integers(0, 256, (self.size, PAGE), np.uint8)
        self.types = np.zeros(self.size, np.uint8)

    @property
    def max_pfn(self) -> int:
        return self.size - 1

    def _do(self, event: str) -> None:
        self.recorder.note(event)
        if event in self.refuses:
            raise GuestError(f"cannot do: {event}")

    def static_records(self) -> Sequence[Record]:
        policies: list[Record] = [
            libxc.X86CpuidPolicy(leaves=array_of(libxc.CpuidLeaf, [])),
            libxc.X86MsrPolicy(msrs=array_of(libxc.MsrEntry, [])),
        ]
        pv = self.guest_type is GuestType.PV
        return [libxc.X86PvInfo(guest_width=8, pt_levels=4), *policies] if pv else policies

    def layout_records(self) -> Sequence[Record]:
        if self.guest_type is GuestType.HVM:
            return []
        return [libxc.X86PvP2mFrames(p2m_start_pfn=0, p2m_end_pfn=self.max_pfn, p2m_pfns=array_of(8, [1]))]

    def state_records(self) -> Sequence[Record]:
        tsc = libxc.X86TscInfo(mode=0, khz=1, nsec=2, incarnation=0)
        if self.guest_type is GuestType.HVM:
            return [
                tsc,
                libxc.HvmContext(hvm_ctx=b"context!"),
                libxc.HvmParams(params=array_of(libxc.HvmParamEntry, [])),
            ]
        return [tsc, libxc.SharedInfo(shared_info=bytes(PAGE))]

    def page_types(self, pfns: Pfns) -> npt.NDArray[np.uint8]:
        return self.types[pfns]

    def pages(
        self, pfns: Pfns, types: npt.NDArray[np.uint8]
    ) -> tuple[Sequence[memoryview], npt.NDArray[np.bool_]]:
        waiting = np.isin(pfns, sorted(self.waits))
        return [memoryview(self.memory[pfn]) for pfn in pfns[~waiting].tolist()], waiting

    def enable_dirty_log(self) -> None:
        self._do("log on")

    def disable_dirty_log(self) -> None:
        self._do("log off")

    def clean_dirty_log(self, into: PfnBitmap) -> None:
        self._do("CLEAN")
        into.clear()
        into.add(np.array(self.dirtied.pop(0) if self.dirtied else [], np.uint64))

    def peek_dirty_log(self, into: PfnBitmap) -> None:
        self._do("PEEK")
        into.clear()

    def suspend(self) -> None:
        self._do("suspend")
        self.waits.clear()
        self.suspended = not self.stays_awake

    def resume(self) -> None:
        self._do("resume")
        self.suspended = False


HOLE, BROKEN, ALLOCATE = PageType.XTAB, PageType.BROKEN, PageType.XALLOC
