"""Every declaration, by strategies derived from its own fields: parse, build and JSON lose nothing."""

from __future__ import annotations

import json

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from migstream.errors import FormatError
from migstream.records import ByteOrder, Declaration, libxl
from migstream.records.page_data import PageData
from migstream.testing.records import declarations, records

every_declaration = pytest.mark.parametrize("declared", declarations(), ids=lambda cls: cls.__qualname__)
orders: st.SearchStrategy[ByteOrder] = st.sampled_from(("little", "big"))


@every_declaration
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_what_is_built_parses_to_the_same_value(declared: type[Declaration], data: st.DataObject) -> None:
    value, order = data.draw(records(declared)), data.draw(orders)
    wire = value.build(order)
    assert len(wire) >= declared.head_size
    assert declared.parse(wire, order) == value
    assert declared.parse(memoryview(bytearray(wire)), order) == value


@every_declaration
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_what_parses_builds_the_same_octets_with_any_surplus(
    declared: type[Declaration], data: st.DataObject
) -> None:
    wire, order = data.draw(st.binary(min_size=declared.head_size, max_size=120)), data.draw(orders)
    counted = next((w for w in declared.wire_fields if w.counted_by), None)
    if counted is not None:
        at, unit = declared.offset_of(counted.counted_by), counted.size or 1
        count = int.from_bytes(wire[at : at + 4], order)
        if count * unit > len(wire) - declared.head_size:
            with pytest.raises(FormatError, match=f"{counted.counted_by} is {count}"):
                declared.parse(wire, order)
            return
    value = declared.parse(wire, order)
    built = value.build(order)
    assert wire.startswith(built) if declared.payload else wire == built


@every_declaration
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_json_there_and_back_is_the_same_value(declared: type[Declaration], data: st.DataObject) -> None:
    wire = data.draw(records(declared)).build("big")
    surplus = b"" if declared.payload else data.draw(st.binary(max_size=3))
    value = declared.parse(wire + surplus, "big")
    assert declared.from_json(json.loads(json.dumps(value.to_json()))) == value


@every_declaration
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_the_other_byte_order_is_another_form_of_the_same_value(
    declared: type[Declaration], data: st.DataObject
) -> None:
    value = data.draw(records(declared))
    swapped = declared.parse(value.build("big"), "big")
    assert swapped.build("little") == value.build("little")
    assert hash(swapped) == hash(value)


@every_declaration
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_reserved_fields_are_reported_when_and_only_when_they_are_not_zero(
    declared: type[Declaration], data: st.DataObject
) -> None:
    value = data.draw(records(declared))
    reported = {wire.name: found for wire, found in value.reserved_fields()}
    for wire in declared.wire_fields:
        if wire.reserved:
            field = getattr(value, wire.name)
            assert (wire.name in reported) == (any(field) if isinstance(field, bytes) else field != 0)
        else:
            assert wire.name not in reported


@settings(max_examples=200, deadline=None)
@given(
    pairs=st.lists(
        st.tuples(
            *[st.binary(max_size=12).map(lambda b: b.replace(b"\0", b"").decode("utf-8", "surrogateescape"))]
            * 2
        )
    )
)
def test_xenstore_pairs_there_and_back(pairs: list[tuple[str, str]]) -> None:
    packed = libxl.EmulatorXenstoreData.pack(pairs)
    assert libxl.EmulatorXenstoreData(emulator_id=0, index=0, data=packed).pairs == pairs


def test_every_registered_record_is_among_the_declarations() -> None:
    from migstream.records.schema import REGISTRY

    registered = {cls for layer in REGISTRY.values() for cls in layer.values()}
    assert registered <= set(declarations())
    assert PageData in registered
