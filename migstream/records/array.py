"""Arrays on the wire: octets, decoded element by element on access, or all at once by numpy."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from migstream.records.fields import INT_CHAR, ORDER_CHAR, ByteOrder, Octets

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from migstream.records.schema import Declaration

__all__ = ["Array", "array_of"]

E = TypeVar("E", bound="int | Declaration")


class Array(Sequence[E]):
    """A wire array: its octets, decoded element by element on access, or all at once by `numpy`.

    Nothing is decoded when it is made, so a record may hold 128 MiB of entries at no cost.
    """

    __slots__ = ("_format", "entry", "order", "raw", "size")

    def __init__(self, entry: type[Declaration] | int, raw: Octets, order: ByteOrder) -> None:
        self.entry = entry
        self.raw = memoryview(raw).cast("B") if len(raw) else memoryview(b"")
        self.order = order
        self.size = entry if isinstance(entry, int) else entry.head_size
        self._format = ORDER_CHAR[order] + INT_CHAR[entry] if isinstance(entry, int) else ""

    def __len__(self) -> int:
        return len(self.raw) // self.size

    @overload
    def __getitem__(self, index: int) -> E: ...
    @overload
    def __getitem__(self, index: slice) -> Array[E]: ...
    def __getitem__(self, index: int | slice) -> E | Array[E]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise ValueError("an Array is sliced in steps of 1")
            return Array(self.entry, self.raw[start * self.size : stop * self.size], self.order)
        position = range(len(self))[index] * self.size
        octets_ = self.raw[position : position + self.size]
        if isinstance(self.entry, int):
            return cast(E, struct.unpack(self._format, octets_)[0])
        return cast(E, self.entry.parse(octets_, self.order))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        if self.order == other.order and self.entry == other.entry:
            return self.raw == other.raw
        return self.entry == other.entry and self.in_order(other.order) == other.raw

    def __hash__(self) -> int:
        return hash((self.entry, self.in_order("little")))

    def __repr__(self) -> str:
        entry = f"u{8 * self.size}" if isinstance(self.entry, int) else self.entry.__name__
        return f"<Array of {len(self)} {entry}>"

    def numpy(self) -> npt.NDArray[Any]:
        """Return the elements as an array without copying: uint of ``entry`` octets, or a structure."""
        import numpy as np

        return np.frombuffer(self.raw, dtype=_dtype(self.entry, self.order))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        import numpy as np

        return np.array(self.numpy(), dtype=dtype, copy=copy)

    def in_order(self, order: ByteOrder) -> bytes:
        """Return the octets of the whole array in ``order``."""
        if order == self.order or not self.raw:
            return bytes(self.raw)
        return self.numpy().astype(_dtype(self.entry, order)).tobytes()


def array_of(entry: type[Declaration] | int, values: Iterable[Any]) -> Array[Any]:
    """Make an `Array`: integers of ``entry`` octets, or declarations; a numpy array is taken whole."""
    if hasattr(values, "dtype"):
        import numpy as np

        wire = np.asarray(values).astype(_dtype(entry, "little"))
        return Array(entry, wire.tobytes(), "little")
    if isinstance(entry, int):
        integers = list(values)
        return Array(entry, struct.pack(f"<{len(integers)}{INT_CHAR[entry]}", *integers), "little")
    return Array(entry, b"".join(value.build("little") for value in values), "little")


def _dtype(entry: type[Declaration] | int, order: ByteOrder) -> np.dtype[Any]:
    import numpy as np

    sign = ORDER_CHAR[order]
    if isinstance(entry, int):
        return np.dtype(f"{sign}u{entry}")
    return np.dtype(
        [(w.name, f"{sign}u{w.size}" if w.kind == "int" else f"V{w.size}") for w in entry.wire_fields]
    )
