"""One line of text for one record: what `inspect --records` shows of it.

Derived from the declaration's fields; a few types whose content a reader looks for have a line of
their own. Text out of the stream is escaped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from migstream.errors import FormatError
from migstream.records import Array, Record, libxc, libxl
from migstream.records.fields import WireField
from migstream.records.hvm_params import HvmParam
from migstream.text import printable

__all__ = ["describe"]

SHOWN = 24  # entries of one record that are worth a line; more are counted


def describe(record: Record) -> str:
    """Return the decoded fields of ``record`` in one line; empty for a record without any."""
    special = _SPECIAL.get(type(record))
    if special is not None:
        return special(record)
    parts = [_field(wire, getattr(record, wire.name)) for wire in record.wire_fields if not wire.reserved]
    parts += [f"{wire.name}={value!r}" for wire, value in record.reserved_fields()]
    if record.surplus:
        parts.append(f"surplus={len(record.surplus)} octets")
    return " ".join(parts)


def _field(wire: WireField, value: object) -> str:
    if isinstance(value, Array):
        return f"{wire.name}={len(value)} entries"
    if isinstance(value, bytes):
        return f"{wire.name}={len(value)} octets"
    assert isinstance(value, int)
    shown = wire.label(value) or (f"{value:#x}" if "pfn" in wire.name else str(value))
    return f"{wire.name}={shown}"


def _hvm_params(record: libxc.HvmParams) -> str:
    shown = []
    for entry in record.params[:SHOWN]:
        name = HvmParam(entry.index).name if entry.index in set(HvmParam) else str(entry.index)
        shown.append(f"{name}={entry.value:#x}")
    more = len(record.params) - len(shown)
    return f"{record.count} parameters: {' '.join(shown)}" + (f" and {more} more" if more > 0 else "")


def _xenstore(record: libxl.EmulatorXenstoreData) -> str:
    head = _emulator(record)
    try:
        pairs = record.pairs
    except FormatError as exc:
        return f"{head} malformed: {exc.message}"
    shown = " ".join(f"{printable(key)}={printable(value)!r}" for key, value in pairs[:SHOWN])
    more = len(pairs) - SHOWN
    return f"{head} {shown}" + (f" and {more} more" if more > 0 else "")


def _emulator_context(record: libxl.EmulatorContext) -> str:
    return f"{_emulator(record)} {len(record.emulator_ctx)} octets of state"


def _emulator(record: libxl.EmulatorXenstoreData | libxl.EmulatorContext) -> str:
    known = record.emulator_id in set(libxl.EmulatorId)
    name = libxl.EmulatorId(record.emulator_id).name if known else f"emulator {record.emulator_id}"
    return f"{name} index={record.index}"


def _origin(record: libxc.Origin) -> str:
    by = _field(record.wire_fields[0], record.hypervisor)
    try:
        properties = record.properties
    except FormatError as exc:
        return f"{by} malformed: {exc.message}"
    shown = " ".join(
        f"{printable(name)}={printable(value)}" for name, value in list(properties.items())[:SHOWN]
    )
    return f"{by} vcpus={record.vcpus} ram={record.ram_size >> 20} MiB {shown}".rstrip()


_SPECIAL: dict[type[Record], Callable[[Any], str]] = {
    libxc.HvmParams: _hvm_params,
    libxc.Origin: _origin,
    libxl.EmulatorXenstoreData: _xenstore,
    libxl.EmulatorContext: _emulator_context,
}
