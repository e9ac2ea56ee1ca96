"""What the engines ask of a guest: the save engine of a `SaveSource`, restore of a `RestoreTarget`.

Everything with pages is a guest: a running machine, a model in memory, a raw file. Arrays of PFNs are
uint64[n], arrays of page types uint8[n] (values of `PageType`). Pages are buffers of memory that the guest
owns: the engines hand them to the kernel as they are and never copy them.

A guest that cannot do what it is asked raises `GuestError`, whose message goes to the user.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from migstream.bitmap import PfnBitmap
from migstream.records import Record
from migstream.records.libxc import GuestType

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "PAGE_SHIFT",
    "PAGE_SIZE",
    "HasEmulator",
    "HasNotes",
    "RestoreTarget",
    "RestoredRings",
    "SaveSource",
    "Starts",
    "TakesEmulator",
    "TakesRuns",
]

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT  # octets; the only page size that x86 streams have


@dataclass(frozen=True)
class RestoredRings:
    """Where a restored guest talks to its host: PFNs of the xenstore and console rings, if it has them."""

    store_pfn: int | None
    console_pfn: int | None


class SaveSource(Protocol):
    """A guest whose state can be read while it runs or is suspended.

    The dirty log's operations are Xen's (XEN_DOMCTL_SHADOW_OP_*); a source that cannot log refuses
    `enable_dirty_log`, and can still be saved while it is suspended.
    """

    @property
    def guest_type(self) -> GuestType:
        """PV or HVM."""

    @property
    def max_pfn(self) -> int:
        """The highest PFN that the guest has, or may get."""

    def static_records(self) -> Sequence[Record]:
        """Return what does not change while the guest runs, without STATIC_DATA_END."""

    def layout_records(self) -> Sequence[Record]:
        """Return what has to stand between the static data and the pages: P2M_FRAMES of a PV guest."""

    def state_records(self) -> Sequence[Record]:
        """Return the state behind the pages: TSC, vCPUs, HVM context and so on. The guest is suspended."""

    def page_types(self, pfns: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
        """Return the types of ``pfns`` as they are now; XTAB for those that have no page."""

    def pages(
        self, pfns: npt.NDArray[np.uint64], types: npt.NDArray[np.uint8]
    ) -> tuple[Sequence[memoryview], npt.NDArray[np.bool_]]:
        """Return the pages of ``pfns``, all of which have data, and which of them must wait.

        The buffers hold the pages in order, contiguous ones coalesced. A page table comes out normalised
        (its entries as PFNs) in memory of its own. Where the second value, bool[n], is true the page
        could not be taken now (a page table in change): its buffer is absent, and it is asked for again
        when the guest is suspended.
        """

    def enable_dirty_log(self) -> None:
        """Start to log writes. Every page counts as clean from here on."""

    def disable_dirty_log(self) -> None:
        """Stop to log writes."""

    def clean_dirty_log(self, into: PfnBitmap) -> None:
        """Move the log into ``into`` (what was there is replaced) and start an empty one, as one step."""

    def peek_dirty_log(self, into: PfnBitmap) -> None:
        """Copy the log into ``into`` and keep it."""

    def suspend(self) -> None:
        """Stop the guest, for good measure or until `resume`. Raises `GuestError` if it does not stop."""

    def resume(self) -> None:
        """Let a suspended guest run on."""

    @property
    def suspended(self) -> bool:
        """Whether the guest is stopped with reason suspend."""


class RestoreTarget(Protocol):
    """A guest being made from a stream."""

    @property
    def guest_type(self) -> GuestType:
        """PV or HVM; a stream of the other type is refused."""

    @property
    def max_pfn(self) -> int:
        """The highest PFN that this target will take; a page beyond it is refused, never allocated."""

    @property
    def vcpu_limit(self) -> int:
        """How many virtual processors this target can have; the state of one beyond is refused."""

    def populate(self, pfns: npt.NDArray[np.uint64]) -> None:
        """Give the guest memory at ``pfns``, none of which has any. Raises `GuestError` if none is left."""

    def populated(self, pfns: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Return which of ``pfns`` have memory, bool[n]."""

    def set_page_types(self, pfns: npt.NDArray[np.uint64], types: npt.NDArray[np.uint8]) -> None:
        """Note the types of ``pfns``, populated or not."""

    def page_types(self, pfns: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
        """Return the types noted last; XTAB where none was."""

    def pages(self, pfns: npt.NDArray[np.uint64]) -> Sequence[memoryview]:
        """Return the writable memory of ``pfns``, all populated, in order, contiguous pages coalesced."""

    def localise(self, level: int, page: memoryview) -> None:
        """Turn a page table of ``level`` (1 to 4) from PFNs into the target's frames, in place.

        Only asked of PV targets. A PFN that an entry refers to and that has no memory yet gets some.
        Raises `GuestError` for an entry that points past `max_pfn`.
        """

    def apply(self, record: Record) -> None:
        """Take over one record of state, in the order in which restore applies them."""

    def complete(self) -> RestoredRings:
        """Finish: every page and record is there. May be called again after a further checkpoint (COLO)."""

    def clean_dirty_log(self, into: PfnBitmap) -> None:
        """Move the log of the target's own writes into ``into`` and start an empty one (COLO only)."""


@runtime_checkable
class HasEmulator(Protocol):
    """What a `SaveSource` may offer besides: devices of an emulator, so that its stream is a libxl stream."""

    def emulator_records(self) -> Sequence[Record]:
        """Return EMULATOR_XENSTORE_DATA and EMULATOR_CONTEXT. The guest is suspended, its pages are sent."""


@runtime_checkable
class HasNotes(Protocol):
    """What a `SaveSource` may offer besides: what its user should know of how it was saved."""

    def notes(self) -> Sequence[str]:
        """Return a sentence on each: how writes were tracked, and why so."""


@runtime_checkable
class TakesEmulator(Protocol):
    """What a `RestoreTarget` may offer besides: an emulator whose state a libxl stream brings."""

    def take_emulator(self, record: Record) -> None:
        """Take over one of libxl's records, once its state is complete. Raises `GuestError`."""


@runtime_checkable
class Starts(Protocol):
    """What a `RestoreTarget` may offer besides: a guest that can run once it is restored."""

    def start(self) -> None:
        """Let the complete guest run.

        Raises `GuestError` if it certainly does not, so that another host may have it back, and
        `UnsettledError` where it may run, or may have run.
        """


class TakesRuns(Protocol):
    """What a `RestoreTarget` may offer besides: a whole run of ordinary pages in one call.

    The engine asks whether the method is there. Most of a guest arrives as runs of 1024 PFNs, for which
    arrays cost more than the pages.
    """

    def take_run(self, first_pfn: int, count: int, type: int) -> memoryview:
        """Do as `populate`, `set_page_types` and `pages` for ``count`` PFNs from ``first_pfn``.

        Those that have no memory get some; all are of ``type``, which has data and is no page table. Returns
        their writable memory. Raises `GuestError` as `populate` does.
        """
