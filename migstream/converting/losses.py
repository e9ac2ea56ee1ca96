"""What a conversion leaves out although it says something: counted by record type, told before it is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from migstream.converting.options import ConvertError, Target
from migstream.io.reader import Frame
from migstream.records import Record, envelopes, libxc, libxl, record_class, record_name

__all__ = ["Losses", "keeps"]

#: Records of other layers that only bind the libxc image in; xapi's config is told of with the envelope.
_STRUCTURE: frozenset[type[Record]] = frozenset(
    {
        libxl.LibxlEnd,
        libxl.LibxcContext,
        libxl.CheckpointEnd,
        envelopes.Xenops,
        envelopes.Libxc,
        envelopes.Libxl,
        envelopes.EndOfImage,
    }
)
#: libxc's records that version 2 does not have, but for STATIC_DATA_END, which a reader of it infers.
_SINCE_VERSION_3: frozenset[type[Record]] = frozenset({libxc.X86CpuidPolicy, libxc.X86MsrPolicy})


def keeps(layer: str, code: int, target: Target) -> bool:
    """Whether a record of this type means in ``target`` what it meant in the input, or meant nothing."""
    declared = record_class(layer, code)
    if layer not in target.layers:
        return declared in _STRUCTURE
    return not (target.version == 2 and declared in _SINCE_VERSION_3)


class Losses:
    """The records that a conversion to ``target`` loses: by type, how many and where the first one is."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._count: Counter[tuple[str, int]] = Counter()
        self._octets: Counter[tuple[str, int]] = Counter()
        self._first: dict[tuple[str, int], int] = {}

    def __bool__(self) -> bool:
        return bool(self._count)

    def note(self, layer: str, code: int, offset: int, octets: int) -> None:
        """Count a record, if it is lost."""
        if keeps(layer, code, self._target):
            return
        key = layer, code
        self._count[key] += 1
        self._octets[key] += octets
        self._first.setdefault(key, offset)

    def note_frame(self, frame: Frame) -> None:
        """Count a frame, if it is lost."""
        self.note(frame.layer.name, frame.code, frame.offset, frame.length)

    def lines(self) -> Iterator[str]:
        """Yield one line a record type."""
        for (layer, code), count in self._count.items():
            records = "record" if count == 1 else "records"
            yield (
                f"{layer} {record_name(layer, code)}: {count} {records}, {self._octets[layer, code]} octets, "
                f"the first at offset {self._first[layer, code]}"
            )

    def refuse(self) -> None:
        """Raise `ConvertError` with the whole list, if there is any loss."""
        if self:
            listed = "; ".join(self.lines())
            raise ConvertError(
                f"{self._target.name} cannot hold {listed}. Nothing was written; --lossy leaves them out"
            )
