"""The fields that declarations are made of: what `schema.Declaration` understands.

Each of the functions stands behind a field's annotation and says its wire type, its meaning and its unit.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from migstream.records.schema import Declaration

__all__ = [
    "COUNTED",
    "INT_CHAR",
    "MISSING",
    "ORDER_CHAR",
    "ByteOrder",
    "Octets",
    "WireField",
    "array",
    "octets",
    "reserved",
    "u8",
    "u16",
    "u32",
    "u64",
]

ByteOrder = Literal["little", "big"]
Octets = bytes | bytearray | memoryview

ORDER_CHAR: dict[ByteOrder, str] = {"little": "<", "big": ">"}  # as struct and numpy name byte orders
INT_CHAR = {1: "B", 2: "H", 4: "I", 8: "Q"}  # as struct names integers of so many octets
MISSING = object()  # a field without a default
COUNTED = -1  # the default of a count field: take it from what it counts


class WireField:
    """One field as it stands on the wire.

    ``size`` is in octets, of one element for an array, and 0 for octets that fill the body.
    """

    __slots__ = (
        "counted_by",
        "counts",
        "default",
        "doc",
        "entry",
        "kind",
        "name",
        "names",
        "reserved",
        "size",
        "unit",
    )

    def __init__(
        self,
        kind: Literal["int", "octets", "array"],
        size: int,
        doc: str,
        *,
        default: object,
        unit: str = "",
        names: type[IntEnum] | None = None,
        reserved: bool = False,
        counts: str = "",
        counted_by: str = "",
        entry: type[Declaration] | None = None,
    ) -> None:
        self.name = ""  # the declaring class knows it
        self.kind = kind
        self.size = size
        self.doc = doc
        self.default = default
        self.unit = unit
        self.names = names
        self.reserved = reserved
        self.counts = counts
        self.counted_by = counted_by
        self.entry = entry

    @property
    def variable(self) -> bool:
        """Whether its length depends on the record's body."""
        return self.kind == "array" or self.size == 0 or bool(self.counted_by)

    @property
    def wire_type(self) -> str:
        """The type as the tables in ``spec/`` name it, such as ``u32`` or ``u64[count]``."""
        if self.kind == "int":
            return f"u{8 * self.size}"
        extent = self.counted_by or "..."
        if self.kind == "octets":
            return f"octets[{self.size or extent}]"
        return f"{self.entry.__name__ if self.entry else f'u{8 * self.size}'}[{extent}]"

    def label(self, value: int) -> str:
        """Return the name of ``value`` where the field has names, else an empty string."""
        if self.names is None:
            return ""
        try:
            return self.names(value).name
        except ValueError:
            return ""


def _int(size: int, doc: str, default: Any, **wire: Any) -> Any:
    return WireField("int", size, doc, default=default, **wire)


def u8(
    doc: str, *, unit: str = "", names: type[IntEnum] | None = None, counts: str = "", default: Any = MISSING
) -> Any:
    """Declare an unsigned integer of one octet; ``counts`` names the array whose length it is."""
    return _int(1, doc, default, unit=unit, names=names, counts=counts)


def u16(
    doc: str, *, unit: str = "", names: type[IntEnum] | None = None, counts: str = "", default: Any = MISSING
) -> Any:
    """Declare an unsigned integer of two octets, as `u8`."""
    return _int(2, doc, default, unit=unit, names=names, counts=counts)


def u32(
    doc: str, *, unit: str = "", names: type[IntEnum] | None = None, counts: str = "", default: Any = MISSING
) -> Any:
    """Declare an unsigned integer of four octets, as `u8`."""
    return _int(4, doc, default, unit=unit, names=names, counts=counts)


def u64(
    doc: str, *, unit: str = "", names: type[IntEnum] | None = None, counts: str = "", default: Any = MISSING
) -> Any:
    """Declare an unsigned integer of eight octets, as `u8`."""
    return _int(8, doc, default, unit=unit, names=names, counts=counts)


def reserved(size: int, *, default: int | bytes) -> Any:
    """Declare a field that the specification reserves: zero on save, ignored on restore, kept here."""
    kind: Literal["int", "octets"] = "int" if size in INT_CHAR else "octets"
    return WireField(kind, size, "reserved, zero", default=default, reserved=True)


def octets(doc: str, *, size: int = 0, counted_by: str = "", default: Any = MISSING) -> Any:
    """Declare raw octets: a fixed ``size``, as many as a field says, or (0) the rest of the body."""
    return WireField("octets", size, doc, default=default, counted_by=counted_by)


def array(entry: type[Declaration] | int, doc: str, *, counted_by: str = "", default: Any = MISSING) -> Any:
    """Declare an array of declarations, or of integers of ``entry`` octets, to the end of the body."""
    if isinstance(entry, int):
        return WireField("array", entry, doc, default=default, counted_by=counted_by)
    return WireField("array", entry.head_size, doc, default=default, counted_by=counted_by, entry=entry)
