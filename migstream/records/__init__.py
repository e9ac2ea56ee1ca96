"""What the bytes mean: one declaration for each header and record of every layer. No I/O here.

``record_class`` and ``record_name`` look a type code up; everything else is in the modules
(`libxc`, `page_data`, `libxl`, `xl`, `envelopes`), beside the section of the specification that it follows.
"""

from __future__ import annotations

from migstream.records import envelopes, libxc, libxl, xl
from migstream.records.array import Array, array_of
from migstream.records.fields import ByteOrder
from migstream.records.page_data import PageData
from migstream.records.schema import REGISTRY, Declaration, OpaqueRecord, Record

__all__ = [
    "MAX_RECORD_LENGTH",
    "OPTIONAL",
    "RECORD_ALIGNMENT",
    "Array",
    "ByteOrder",
    "Declaration",
    "OpaqueRecord",
    "PageData",
    "Record",
    "array_of",
    "envelopes",
    "is_optional",
    "libxc",
    "libxl",
    "padding_length",
    "record_class",
    "record_name",
    "record_types",
    "xl",
]

OPTIONAL = 0x8000_0000  # a type with this bit may be ignored by who does not know it
RECORD_ALIGNMENT = 8  # octets that a record's padding fills up to
MAX_RECORD_LENGTH = 128 << 20  # the longest body that Xen reads (xg_sr_stream_format.h, REC_LENGTH_MAX)


def record_class(layer: str, code: int) -> type[Record] | None:
    """Return the declaration of ``layer``'s record type ``code``, or ``None`` if it is not known."""
    return REGISTRY[layer].get(code)


def record_types(layer: str) -> list[type[Record]]:
    """Return every declared record of ``layer`` in the order of type codes."""
    return [cls for _, cls in sorted(REGISTRY[layer].items())]


def record_name(layer: str, code: int) -> str:
    """Return the type's name, or ``UNKNOWN_0x...``, ``OPTIONAL_0x...`` for one that is not known."""
    known = REGISTRY[layer].get(code)
    if known is not None:
        return known.type
    return f"{'OPTIONAL' if is_optional(layer, code) else 'UNKNOWN'}_0x{code:08x}"


def is_optional(layer: str, code: int) -> bool:
    """Whether a reader that does not know the type may ignore it; xapi's segments have no such bit."""
    return bool(code & OPTIONAL) and layer != "xapi"


def padding_length(length: int) -> int:
    """Return how many octets of padding follow a body of ``length`` octets: 0 to 7."""
    return -length % RECORD_ALIGNMENT
