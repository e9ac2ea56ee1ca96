"""Smaller streams with the same finding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migstream.fuzzing.finding_text import record_count
from migstream.fuzzing.minimise import minimise
from migstream.fuzzing.mutator import mutate
from migstream.fuzzing.tree import Record, Tree
from tests import build

SEEDS = (build.image(), build.libxl_stream(), build.xl(build.libxl_stream()), build.remus_stream())


def counting(predicate: Callable[[bytes], bool]) -> tuple[Callable[[bytes], bool], list[bytes]]:
    tried: list[bytes] = []

    def keeps(octets: bytes) -> bool:
        tried.append(octets)
        return predicate(octets)

    return keeps, tried


def records(octets: bytes) -> list[Record]:
    return [node for node in Tree.parse(octets).nodes if isinstance(node, Record)]


@settings(max_examples=40, deadline=None)
@given(
    number=st.integers(0, 10_000), needle=st.sampled_from([b"\x11", b"\x22\x22", b"QEVM", b"XENF", b"key\0"])
)
def test_the_result_keeps_the_finding_is_never_larger_and_nothing_is_tried_twice(
    number: int, needle: bytes
) -> None:
    octets = mutate(SEEDS, "minimise", number).octets
    if needle not in octets:
        return
    keeps, tried = counting(lambda stream: needle in stream)
    result = minimise(octets, keeps, executions=200)
    assert needle in result.octets
    assert len(result.octets) <= len(octets)
    assert len(set(tried)) == len(tried) == result.executions <= 200


@given(st.binary(max_size=300))
@settings(max_examples=40, deadline=None)
def test_any_octets_are_minimised_to_nothing_where_anything_is_a_finding(octets: bytes) -> None:
    assert minimise(octets, lambda stream: True).octets == b""


def test_records_that_do_not_matter_are_dropped() -> None:
    result = minimise(build.xl(build.libxl_stream()), lambda stream: b"QEVM" in stream)
    assert result.complete
    assert record_count(result.octets) <= 1
    assert len(result.octets) <= 16 + 8 + 4


def test_a_stream_that_needs_its_headers_keeps_them() -> None:
    def params_and_end(stream: bytes) -> bool:
        found = [record.label for record in records(stream)]
        return "libxc HVM_PARAMS" in found and found[-1] == "libxc END"

    result = minimise(build.image(), params_and_end)
    assert [node.label for node in Tree.parse(result.octets).nodes] == [
        "libxc ImageHeader",
        "libxc DomainHeader",
        "libxc HVM_PARAMS",
        "libxc END",
    ]
    assert records(result.octets)[0].body == b""


def test_fewer_pages_are_left_and_the_count_says_so() -> None:
    def has_second_page(stream: bytes) -> bool:
        return any(
            record.label == "libxc PAGE_DATA"
            and len(record.body) == 8 + 8 * int.from_bytes(record.body[:4], "little") + 4096
            for record in records(stream)
        )

    octets = build.header() + build.page_data(list(range(8)), b"".join(map(build.page, range(8))))
    assert has_second_page(minimise(octets + build.page_data([3], build.page(1)), has_second_page).octets)
    with_kind_five = build.header() + build.page_data([1, 2, 5 << 60 | 3, 4], build.page(7) * 4)

    def sound_record_of_kind_five(stream: bytes) -> bool:
        for record in records(stream):
            body = record.body
            count = int.from_bytes(body[:4], "little")
            entries = [int.from_bytes(body[at : at + 8], "little") for at in range(8, 8 + 8 * count, 8)]
            if len(body) == 8 + 8 * count + 4096 * count and any(entry >> 60 == 5 for entry in entries):
                return True
        return False

    smallest = minimise(with_kind_five, sound_record_of_kind_five).octets
    assert records(smallest)[0].body == (1).to_bytes(8, "little") + (5 << 60).to_bytes(8, "little") + bytes(
        4096
    )


def test_values_become_small() -> None:
    def large_khz(stream: bytes) -> bool:
        return any(
            record.label == "libxc X86_TSC_INFO"
            and len(record.body) == 24
            and int.from_bytes(record.body[4:8], "little") > 1000
            for record in records(stream)
        )

    body = records(minimise(build.image(), large_khz).octets)[0].body
    assert 1000 < int.from_bytes(body[4:8], "little") <= 2001
    assert body[:4] + body[8:] == bytes(20)


def test_a_length_that_has_to_lie_lies_less() -> None:
    lying = (
        build.header() + build.record(build.PAGE_DATA, b"12345678")[:4] + b"\xff\xff\xff\x7f" + b"12345678"
    )

    def ends_within(stream: bytes) -> bool:
        return any(record.length > len(record.body) for record in records(stream))

    result = minimise(lying, ends_within)
    assert records(result.octets)[0].length == 1
    assert len(result.octets) == 48


def test_executions_are_bounded() -> None:
    keeps, tried = counting(lambda stream: False)
    result = minimise(build.image(), keeps, executions=10)
    assert (len(tried), result.complete, result.octets) == (10, False, build.image())


def test_progress_hears_of_each_execution() -> None:
    heard: list[tuple[int, int]] = []
    result = minimise(
        build.image(), lambda stream: b"\x11" in stream, progress=lambda *told: heard.append(told)
    )
    assert [number for number, _ in heard] == list(range(1, result.executions + 1))
    assert heard[-1][1] == len(result.octets)


@pytest.mark.parametrize("stream", SEEDS)
def test_what_cannot_be_made_smaller_stays_as_it_is(stream: bytes) -> None:
    result = minimise(stream, lambda tried: tried == stream, executions=1000)
    assert result.octets == stream
    assert result.complete
