"""Records and headers with any values that their declarations allow: strategies made of ``wire_fields``."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any, TypeVar, cast

import hypothesis.strategies as st

from migstream.records import Declaration, Record, array_of, envelopes, libxc, libxl, xl
from migstream.records.fields import WireField
from migstream.records.schema import REGISTRY

__all__ = ["declarations", "records", "values_of"]

D = TypeVar("D", bound=Declaration)

MAX_OCTETS = 40  # of a field of variable length: enough for a codec
MAX_ENTRIES = 4
MODULES: tuple[ModuleType, ...] = (envelopes, libxc, libxl, xl)


def records(cls: type[D] | None = None, *, layer: str | None = None) -> st.SearchStrategy[D]:
    """Return values of ``cls``; without it of any record, of ``layer`` if given: libxc, libxl or xapi.

    Every field holds what its wire type can, so most values mean nothing to a guest; counts follow what they
    count. `streams` has records that fit each other.
    """
    if cls is None:
        layers = REGISTRY.values() if layer is None else [REGISTRY[layer]]
        known = [known for declared in layers for known in declared.values()]
        return cast("st.SearchStrategy[D]", st.sampled_from(known).flatmap(records))
    free = {wire.name: values_of(wire) for wire in cls.wire_fields if not wire.counts}
    return st.builds(cls, **free)


def values_of(wire: WireField) -> st.SearchStrategy[Any]:
    """Return what a field may hold, as its wire type says."""
    if wire.kind == "int":
        return st.integers(0, (1 << 8 * wire.size) - 1)
    if wire.kind == "octets":
        fixed = not wire.variable
        return st.binary(min_size=wire.size if fixed else 0, max_size=wire.size if fixed else MAX_OCTETS)
    entry = wire.entry
    if entry is None:
        integers = st.lists(st.integers(0, (1 << 8 * wire.size) - 1), max_size=MAX_ENTRIES)
        return integers.map(lambda items: array_of(wire.size, items))
    return st.lists(records(entry), max_size=MAX_ENTRIES).map(lambda items: array_of(entry, items))


def declarations() -> list[type[Declaration]]:
    """Return every class that declares a header or a record, without the bases that only share fields."""
    found = {
        cls
        for module in MODULES
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, Declaration) and cls not in (Declaration, Record)
    }
    whole = (cls for cls in found if not issubclass(cls, Record) or cls.code >= 0)
    return sorted(whole, key=lambda cls: cls.__qualname__)
