"""PAGE_DATA: PFNs with their types, and the pages that follow them in the stream.

This is the hot record: a 64 GiB guest is 16,384 of them. Its entries stay octets until somebody asks
for them as an array, and the commonest shape, consecutive PFNs of one type, is recognised without
any array at all.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from migstream.records.array import Array
from migstream.records.fields import COUNTED, ByteOrder, array, reserved, u32
from migstream.records.page_types import DATA_TYPES, PFN_MASK, RESERVED_MASK, TYPE_SHIFT
from migstream.records.schema import Record

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Entries", "PageData", "PfnRun", "RunTemplates"]


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
        return Entries(self.entries.raw, self.entries.order)

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


class RunTemplates:
    """The octets that runs of entries would have, kept and moved on from one run to the next.

    One template for each length of run; not to be shared by threads. Bytes of a template change only
    where they differ from the last run's: usually the second lowest of each entry, in one strided copy.
    """

    KEPT = 8  # lengths: a stream has one or two; with more, the templates are made anew

    def __init__(self) -> None:
        self._templates: dict[int, _RunTemplate] = {}

    def run(self, first: int, count: int) -> bytearray:
        """Return the octets of ``count`` little-endian entries ``first``, ``first`` + 1, and so on."""
        template = self._templates.get(count)
        if template is None:
            if len(self._templates) == self.KEPT:
                self._templates.clear()
            template = self._templates[count] = _RunTemplate(count)
        return template.moved_to(first)


class _RunTemplate:
    def __init__(self, count: int) -> None:
        self._count = count
        self._octets = bytearray(8 * count)
        self._lowest = bytes(range(256)) * (count // 256 + 2)
        self._second = b"".join(bytes([i]) * 256 for i in range(256)) * (count // 65536 + 2)
        self._low = self._high = -1

    def moved_to(self, first: int) -> bytearray:
        octets, count = self._octets, self._count
        low, high = first & 0xFFFF, first >> 16
        if (low ^ self._low) & 0xFF or self._low < 0:
            octets[0::8] = self._lowest[low & 0xFF : (low & 0xFF) + count]
        octets[1::8] = self._second[low : low + count]
        crosses = low + count > 0x10000  # the upper six bytes change within the run
        if crosses or high != self._high:
            for byte in range(6):
                octets[2 + byte :: 8] = b"".join(
                    bytes([(high + step >> 8 * byte) & 0xFF]) * length
                    for step, length in enumerate(_split(low, count))
                )
        self._low, self._high = low, -1 if crosses else high
        return octets


def _split(low: int, count: int) -> list[int]:
    """Return how ``count`` values from ``low`` on fall into blocks of 2^16."""
    lengths = []
    while count:
        lengths.append(min(count, 0x10000 - low))
        count -= lengths[-1]
        low = 0
    return lengths


class Entries:
    """PAGE_DATA entries, n of them, seen as PFNs and types."""

    def __init__(
        self, raw: bytes | memoryview, order: ByteOrder = "little", templates: RunTemplates | None = None
    ) -> None:
        self.raw = raw
        self.order = order
        self._templates = templates

    def __len__(self) -> int:
        return len(self.raw) // 8

    @property
    def first_pfn(self) -> int:
        """The PFN of the first entry; there is one."""
        return int.from_bytes(self.raw[:8], self.order) & PFN_MASK

    @property
    def last_pfn(self) -> int:
        """The PFN of the last entry; there is one."""
        return int.from_bytes(self.raw[-8:], self.order) & PFN_MASK

    @cached_property
    def run(self) -> PfnRun | None:
        """The entries as one run, or ``None`` where they are not one.

        Compares their octets with those that a run would have: a few microseconds for 1024 entries, and
        no numpy needed, which would take longer to import than a large file to inspect.
        """
        count = len(self.raw) // 8
        if not count or self.order != "little":
            return None
        first = int.from_bytes(self.raw[:8], "little")
        first_pfn = first & PFN_MASK
        if first & RESERVED_MASK or first_pfn + count - 1 > PFN_MASK:
            return None
        # In this order it is one memcmp; a memoryview on the left would compare octet by octet.
        template: object = (self._templates or RunTemplates()).run(first, count)
        alike = template == self.raw
        return PfnRun(first_pfn, count, first >> TYPE_SHIFT) if alike else None

    @cached_property
    def _array(self) -> npt.NDArray[np.uint64]:
        return Array(8, self.raw, self.order).numpy()

    @cached_property
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
