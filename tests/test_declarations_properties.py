"""Declarations by properties: what cannot be is refused with the field's name, and arrays are sequences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migstream.errors import FormatError
from migstream.records import ByteOrder, Declaration, OpaqueRecord, PageData, Record, array_of, libxc, libxl
from migstream.records.fields import INT_CHAR, array, octets, u8
from migstream.records.legacy import is_legacy
from migstream.records.page_data import RunTemplates
from migstream.testing import records
from migstream.testing.records import declarations

QUICK = settings(max_examples=100, deadline=None)
orders: st.SearchStrategy[ByteOrder] = st.sampled_from(["little", "big"])
every_declaration = pytest.mark.parametrize("declared", declarations(), ids=lambda cls: cls.__qualname__)


@QUICK
@given(records(), st.data())
def test_json_that_lacks_a_field_or_has_one_malformed_is_refused_by_its_name(
    record: Record, data: st.DataObject
) -> None:
    kind, form = type(record), record.to_json()
    with pytest.raises(ValueError, match=f"{kind.__name__}: expected an object"):
        kind.from_json([form])  # type: ignore[arg-type]  # what is tested
    if not kind.wire_fields:
        return
    wire = data.draw(st.sampled_from(kind.wire_fields))
    with pytest.raises(ValueError, match=f"field {wire.name} is missing"):
        kind.from_json({key: value for key, value in form.items() if key != wire.name})
    with pytest.raises(ValueError, match=f"{kind.__name__}.{wire.name}"):
        kind.from_json(form | {wire.name: data.draw(st.sampled_from([None, "no hex", -1, 1 << 70, 1.5]))})


@QUICK
@given(records(), st.data())
def test_a_value_is_frozen_shows_its_fields_and_equals_only_its_like(
    record: Record, data: st.DataObject
) -> None:
    kind = type(record)
    assert record != "text"
    assert {record: 1}[kind.parse(record.build())] == 1
    for wire in kind.wire_fields:
        assert f"{wire.name}=" in repr(record)
        assert wire.wire_type.startswith(("u", "octets", wire.entry.__name__ if wire.entry else "u"))
        assert wire.names or wire.label(0) == ""
    with pytest.raises(AttributeError, match="is frozen"):
        record.anything = 1  # type: ignore[attr-defined]  # what is tested
    with pytest.raises(TypeError, match="has no field strange"):
        kind(strange=data.draw(st.integers()))  # type: ignore[call-arg]  # what is tested


@every_declaration
def test_what_does_not_fit_a_field_is_refused(declared: type[Declaration]) -> None:
    usual: dict[str, object] = {}
    for wire in declared.wire_fields:
        if wire.kind == "array":
            usual[wire.name] = array_of(wire.entry or wire.size, [])
        else:
            usual[wire.name] = bytes(wire.size) if wire.kind == "octets" else 0
    for wire in declared.wire_fields:
        if wire.counts:
            with pytest.raises(ValueError, match=f"{wire.name} is not the length of {wire.counts}, 0"):
                declared(**usual | {wire.name: 3})
        elif wire.kind == "int":
            with pytest.raises(ValueError, match=declared.__name__):
                declared(**usual | {wire.name: 1 << 8 * wire.size}).build()
        elif wire.kind == "octets" and wire.size:
            with pytest.raises(ValueError, match=f"{wire.name} has to be {wire.size} octets long"):
                declared(**usual | {wire.name: b""})


@every_declaration
@given(st.data())
def test_a_body_too_short_names_the_field_that_it_ends_in(
    declared: type[Declaration], data: st.DataObject
) -> None:
    if not declared.head_size:
        return
    length = data.draw(st.integers(0, declared.head_size - 1))
    with pytest.raises(
        FormatError, match=f"needs at least {declared.head_size} octets, the body has {length}"
    ) as told:
        declared.parse(bytes(length))
    assert told.value.field in {wire.name for wire in declared.wire_fields}


def test_a_declaration_that_cannot_be_laid_out_is_refused_where_it_is_made() -> None:
    with pytest.raises(TypeError, match="only the last field may be of variable length"):

        class _Wrong(Declaration):
            first: bytes = octets("as long as it likes")
            second: int = u8("behind it")

    class Needs(Declaration):
        values: Any = array(4, "no default")

    with pytest.raises(TypeError, match="needs the field values"):
        Needs()  # type: ignore[call-arg]  # what is tested


entries = st.lists(st.integers(0, 255), max_size=9)


@QUICK
@given(
    st.sampled_from(sorted(INT_CHAR)), entries, entries, orders, st.integers(-12, 12), st.integers(-12, 12)
)
def test_an_array_is_a_sequence_in_either_order(
    size: int, values: list[int], others: list[int], order: ByteOrder, start: int, stop: int
) -> None:
    made = array_of(size, values)
    other = type(made)(made.entry, made.in_order(order), order)
    assert other == made
    assert hash(other) == hash(made)
    assert (made == array_of(size, others)) == (values == others)
    assert made != values
    assert list(other) == values
    assert list(other[start:stop]) == values[start:stop]
    assert other.numpy().tolist() == values
    assert np.array(other).tolist() == values
    assert repr(made) == f"<Array of {len(values)} u{8 * size}>"
    for index, value in enumerate(values):
        assert other[index] == value
        assert other[index - len(values)] == value
    with pytest.raises(IndexError):
        other[len(values)]
    with pytest.raises(ValueError, match="steps of 1"):
        other[::2]


@QUICK
@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 1 << 40)), max_size=5))
def test_an_array_of_declarations_is_one_of_its_entries(pairs: list[tuple[int, int]]) -> None:
    made = [libxc.HvmParamEntry(index=index, value=value) for index, value in pairs]
    entries = array_of(libxc.HvmParamEntry, made)
    assert list(entries) == made
    assert list(map(tuple, entries.numpy().tolist())) == pairs
    assert repr(entries) == f"<Array of {len(pairs)} HvmParamEntry>"
    assert array_of(libxc.HvmParamEntry, entries.numpy()) == entries


@QUICK
@given(st.sampled_from(["libxc", "libxl", "xapi"]), st.integers(0, (1 << 64) - 1), st.binary(max_size=20))
def test_a_record_of_unknown_type_survives_json_or_is_refused(layer: str, code: int, body: bytes) -> None:
    record = OpaqueRecord.of(layer, code, body)
    if layer == "xapi" or code < 1 << 32:
        assert OpaqueRecord.from_json(record.to_json()) == record
        assert record != OpaqueRecord.of(layer, code ^ 1, body)
    else:
        with pytest.raises(ValueError, match=r"type_code .* is not one"):
            OpaqueRecord.from_json(record.to_json())


@QUICK
@given(st.lists(st.text(st.sampled_from("\0kv\u00fc"), max_size=4), max_size=6))
def test_pairs_of_strings_survive_unless_one_holds_a_nul_or_has_no_partner(texts: list[str]) -> None:
    pairs = list(zip(texts[::2], texts[1::2], strict=False))
    if any("\0" in text for pair in pairs for text in pair):
        with pytest.raises(ValueError, match="NUL"):
            libxl.EmulatorXenstoreData.pack(pairs)
        return
    data = libxl.EmulatorXenstoreData.pack(pairs)
    assert libxl.EmulatorXenstoreData(emulator_id=0, index=0, data=data).pairs == pairs
    for damaged in (data + b"odd\0", data + b"no end"):
        with pytest.raises(FormatError, match=r"pairs|no NUL"):
            _ = libxl.EmulatorXenstoreData(emulator_id=0, index=0, data=damaged).pairs


@QUICK
@given(st.lists(st.tuples(st.integers(0, 1 << 51), st.integers(1, 600)), max_size=24))
def test_a_template_gives_any_run_whatever_runs_it_gave_before(runs: list[tuple[int, int]]) -> None:
    templates = RunTemplates()
    for first, count in runs:
        expected = b"".join(pfn.to_bytes(8, "little") for pfn in range(first, first + count))
        assert templates.run(first, count) == expected


@QUICK
@given(st.integers(0, 12), st.sampled_from([4, 8]), st.sampled_from([0xFFFF_FFFF, 1, 1024, 0, 1025]))
def test_a_legacy_stream_is_known_by_its_first_words_and_by_no_fewer(
    length: int, width: int, mark: int
) -> None:
    start = (0x10000).to_bytes(width, "little") + mark.to_bytes(4, "little")
    told = length >= width + 4 and mark not in {0, 1025}
    assert (is_legacy(start[:length]) is not None) == told


def test_the_types_of_page_data_stay_octets_until_they_are_asked_for() -> None:
    made = PageData.parse(bytes.fromhex("0200000000000000 0300000000000000 04000000000000f0"))
    assert (made.pfns.tolist(), made.types.tolist()) == ([3, 4], [0, 15])
