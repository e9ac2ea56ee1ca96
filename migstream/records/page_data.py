"""PAGE_DATA: PFNs with their types, and the pages that follow them in the stream.

This is the hot record: a 64 GiB guest is 16,384 of them. Its entries stay octets until somebody asks
for them as an array, and the commonest shape, consecutive PFNs of one type, is recognised without
any array at all.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from migstream.records.page_types import DATA_TYPES, PFN_MASK, RESERVED_MASK, TYPE_SHIFT
from migstream.records.schema import COUNTED, Array, Record, array, reserved, u32

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Entries", "PageData", "PfnRun"]


class PageData(Record, layer="libxc", code=0x01, type="PAGE_DATA"):
    """Content of guest pages. The pages follow the PFNs: one for each entry whose type has data."""

    payload: ClassVar[str] = "one guest page for each entry whose type has data, in the order of the entries"

    count: int = u32("number of PFNs, at least 1", counts="entries", default=COUNTED)
    reserved1: int = reserved(4, default=0)
    entries: Array[int] = array(
        8, "bits 63-60: page type, bits 59-52: reserved, bits 51-0: PFN", counted_by="count"
    )

    @cached_property
    def unpacked(self) -> Entries:
        """The entries with PFNs and types told apart."""
        return Entries(self.entries)

    @property
    def pfns(self) -> npt.NDArray[np.uint64]:
        """The PFNs, uint64[n]."""
        return self.unpacked.pfns

    @property
    def types(self) -> npt.NDArray[np.uint8]:
        """Their types, uint8[n]: values of `PageType`, or a reserved number."""
        return self.unpacked.types


class PfnRun(NamedTuple):
    """Consecutive PFNs of one type, with no reserved bit set."""

    first: int
    length: int
    type: int


@lru_cache(maxsize=8)
def _run_terms(count: int) -> tuple[int, int]:
    """Return (R, S) so that entries first, first + 1, ... read as one integer are first * R + S."""
    ones = int.from_bytes(b"\x01\0\0\0\0\0\0\0" * count, "little")
    steps = int.from_bytes(b"".join(i.to_bytes(8, "little") for i in range(count)), "little")
    return ones, steps


class Entries:
    """PAGE_DATA entries, n of them, seen as PFNs and types."""

    def __init__(self, entries: Array[int]) -> None:
        self.entries = entries

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def run(self) -> PfnRun | None:
        """The entries as one run, or ``None`` where they are not one.

        Compares them as a single long integer with the one that a run would be: 5 us for 1024
        entries, and no numpy needed, which would take longer to import than a large file to inspect.
        """
        entries = self.entries
        count = len(entries)
        if count == 0 or entries.order != "little":
            return None
        first = entries[0]
        type, first_pfn = first >> TYPE_SHIFT, first & PFN_MASK
        if first & RESERVED_MASK or first_pfn + count - 1 > PFN_MASK:
            return None
        ones, steps = _run_terms(count)
        if int.from_bytes(entries.raw, "little") != first * ones + steps:
            return None
        return PfnRun(first_pfn, count, type)

    @cached_property
    def _array(self) -> npt.NDArray[np.uint64]:
        return self.entries.numpy()

    @property
    def pfns(self) -> npt.NDArray[np.uint64]:
        """The PFNs, uint64[n]."""
        import numpy as np

        return self._array & np.uint64(PFN_MASK)

    @cached_property
    def types(self) -> npt.NDArray[np.uint8]:
        """The types, uint8[n]."""
        import numpy as np

        return (self._array >> np.uint64(TYPE_SHIFT)).astype(np.uint8)

    @property
    def with_data(self) -> npt.NDArray[np.bool_]:
        """Which entries have a page in the record, bool[n]."""
        import numpy as np

        table = np.zeros(16, np.bool_)
        table[list(DATA_TYPES)] = True
        return table[self.types]

    @property
    def reserved_bits(self) -> npt.NDArray[np.uint64]:
        """Bits 59-52 of each entry, in place, uint64[n]."""
        import numpy as np

        return self._array & np.uint64(RESERVED_MASK)

    def count_by_type(self) -> dict[int, int]:
        """Return how many entries each type has."""
        import numpy as np

        counts = np.bincount(self.types, minlength=16).tolist()
        return {type: n for type, n in enumerate(counts) if n}
