"""The conformance corpus: every vector gets the answers that its author wrote down, and nothing lacks one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migstream.conformance import CorpusError, Vector, check, load_vectors, vectors_directory
from migstream.engines.common import StreamType
from migstream.engines.restore_checks import CONTEXT_RULES, LENGTH_RULES
from migstream.io.layers import INSIDE
from migstream.layout import TABLE, Kind, Layout, Problem
from migstream.records import Record, libxc, libxl, record_class, record_types
from migstream.records.legacy import is_legacy
from migstream.records.libxc import GuestType
from migstream.records.page_types import PageType, type_name
from migstream.verification import RULES, Severity
from spec.vectors import make
from spec.vectors.errata import ERRATA

VECTORS = load_vectors()
DATA = vectors_directory()
README = Path(__file__).parents[1] / "spec" / "vectors" / "README.md"


def records(layer: str) -> Iterator[tuple[Vector, dict[str, Any]]]:
    """Yield every record of a layer whose body fits its type."""
    for vector in VECTORS:
        for record in vector.decoded["records"]:
            if record["layer"] == layer and "malformed" not in record:
                yield vector, record


# The vectors


def test_the_committed_corpus_is_what_the_cases_say() -> None:
    assert make.stale() == []


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.name)
def test_a_vector_gets_its_verdict_rules_missing_data_and_json(vector: Vector) -> None:
    assert list(check(vector)) == []


def test_a_check_tells_every_difference() -> None:
    vector = next(v for v in VECTORS if v.name == "hvm-image")
    other = dict(
        vars(vector),
        sound=False,
        rules=("after-end",),
        restore="refuse",
        missing=("CPUID",),
        decoded={},
    )
    assert [line.split(":")[0] for line in check(Vector(**other))] == [
        "verify",
        "rules",
        "restore",
        "missing",
        "decoded",
    ]


def test_the_corpus_is_small_and_each_vector_is_told_in_a_line() -> None:
    sizes = [path.stat().st_size for path in DATA.iterdir()]
    assert sum(sizes) < 1_500_000
    assert max(sizes) < 500_000
    assert len(VECTORS) >= 150
    for vector in VECTORS:
        assert re.fullmatch(r"[a-z0-9-]+", vector.name)
        assert re.fullmatch(r"[ -~]{3,}[^.]", vector.description), vector.name
        assert vector.octets or vector.name == "cut-empty"


def test_no_verdict_contradicts_its_rules() -> None:
    for vector in VECTORS:
        errors = [rule for rule in vector.rules if RULES[rule].severity is Severity.ERROR]
        assert vector.sound == (not errors), vector.name


# What they cover, by the code's own tables


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_broken_by_a_vector(rule: str) -> None:
    assert any(rule in vector.rules for vector in VECTORS)


@pytest.mark.parametrize(
    "kind", [kind for layer in ("libxc", "libxl", "xapi") for kind in record_types(layer)], ids=str
)
def test_every_record_type_is_in_a_vector(kind: type[Record]) -> None:
    assert any(record["code"] == kind.code for _, record in records(kind.layer))


@pytest.mark.parametrize("kind", [*LENGTH_RULES, *CONTEXT_RULES], ids=str)
def test_every_rule_of_length_is_broken_by_a_vector_that_is_refused(kind: type[Record]) -> None:
    assert any(
        record["code"] == kind.code
        and ("malformed" in record or {"body-length", "vcpu-context-size", "p2m-length"} & set(vector.rules))
        for vector in VECTORS
        if vector.restore == "refuse" or vector.group == "origin"
        for record in vector.decoded["records"]
    )


def test_every_guest_version_order_and_stream_type_is_there() -> None:
    images = {
        (vector.decoded["guest_type"], layer["version"], layer["byte_order"])
        for vector in VECTORS
        for layer in vector.decoded["layers"]
        if layer["name"] == "libxc"
    }
    for guest in GuestType:
        for version in (2, 3):
            assert (guest.name.lower(), version, "little") in images
    assert {order for _, _, order in images} == {"little", "big"}
    assert {vector.stream_type for vector in VECTORS} == {kind.value for kind in StreamType}


def test_every_layer_and_both_orders_of_those_that_have_two_are_there() -> None:
    layers = {(la["name"], la["byte_order"]) for vector in VECTORS for la in vector.decoded["layers"]}
    assert {name for name, _ in layers} == {*INSIDE, "libxc"}
    assert {order for name, order in layers if name == "libxl"} == {"little", "big"}
    assert {order for name, order in layers if name == "xl"} == {"little", "big"}


def test_every_page_type_is_there_and_the_reserved_ones() -> None:
    found = {type for vector in VECTORS for type in vector.decoded["pages"]["by_type"]}
    assert found >= {type_name(type) for type in (*PageType, 5, 6, 7, 8)}


def test_every_emulator_and_checkpoint_state_is_there() -> None:
    told = [record.get("fields", {}) for _, record in records("libxl")]
    assert {fields.get("emulator_id") for fields in told} > set(libxl.EmulatorId)
    assert {fields.get("control_id") for fields in told} > set(libxl.CheckpointStateId)


def test_every_legacy_shape_is_there() -> None:
    shapes = {is_legacy(vector.octets[:12]) for vector in VECTORS if vector.group == "legacy"}
    told = {(shape.word_size, shape.guest) for shape in shapes if shape is not None}
    assert told == {(width, guest) for width in (4, 8) for guest in GuestType}


def misplaced(layout: Layout, kind: type[Record]) -> set[tuple[Kind, str]]:
    return {(problem.kind, problem.message) for problem in layout.problems(kind)}


def possible_problems(guest: GuestType) -> set[tuple[Kind, str]]:
    """Return everything that `layout` can find wrong with a record's place in an image of ``guest``."""
    empty = Layout(guest, 3, checkpointed=False)
    found = {(problem.kind, problem.message) for problem in empty.missing()}
    for kind in TABLE:
        found |= misplaced(empty, kind)
        late, repeated, inferred = (Layout(guest, version) for version in (3, 3, 2))
        late.note(libxc.StaticDataEnd)
        repeated.note(kind)
        for first in (libxc.X86PvP2mFrames, libxc.PageData):
            inferred.note(first)
        found |= misplaced(late, kind) | misplaced(repeated, kind) | misplaced(inferred, kind)
    return found


def problems_of(vector: Vector) -> set[tuple[Kind, str]]:
    """Return what is wrong with the places of a vector's libxc records."""
    guest, image = vector.decoded["guest_type"], None
    for layer in vector.decoded["layers"]:
        image = layer if layer["name"] == "libxc" else image
    if image is None or guest not in {"pv", "hvm"}:
        return set()
    layout = Layout(GuestType[guest.upper()], image["version"], vector.stream_type != "plain")
    found: list[Problem] = []
    for record in vector.decoded["records"]:
        kind = record_class("libxc", record["code"]) if record["layer"] == "libxc" else None
        if kind is None:
            continue
        vcpu_id = record.get("fields", {}).get("vcpu_id", 0)
        found += layout.problems(kind, vcpu_id)
        layout.note(kind, vcpu_id)
        if kind is libxc.End:
            found += layout.missing()
    return {(problem.kind, problem.message) for problem in found}


def test_every_problem_of_layout_is_in_a_vector() -> None:
    there = {problem for vector in VECTORS for problem in problems_of(vector)}
    for guest in GuestType:
        lacking = possible_problems(guest) - there
        assert not lacking


def test_every_erratum_has_a_vector_and_every_rule_that_stands_on_one_too() -> None:
    assert {vector.reference for vector in VECTORS} - {None} == set(ERRATA.values())
    for rule in RULES.values():
        if "Errata" in rule.reference:
            assert any(v.reference and "Errata" in v.reference for v in VECTORS if rule.id in v.rules)


# The files


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=9), st.integers(1, 40)), max_size=8))
def test_octets_survive_being_written_as_the_corpus_writes_them(
    tmp_path_factory: pytest.TempPathFactory, runs: list[tuple[bytes, int]]
) -> None:
    octets = b"".join(unit * times for unit, times in runs)
    text = make.to_hex(octets)
    assert all(len(line) <= 100 for line in text.splitlines())
    read = b""
    for token in text.split():
        digits, _, times = token.partition("*")
        read += bytes.fromhex(digits) * int(times or 1)
    assert read == octets


def test_a_corpus_that_is_not_there_or_damaged_is_told(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"index.json: No such file"):
        load_vectors(tmp_path)
    index = json.loads((DATA / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | {"format": "new"}))
    with pytest.raises(CorpusError, match="expected the format migstream-vectors-1, found 'new'"):
        load_vectors(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps(index | {"groups": ["hvm"]}))
    (tmp_path / "hvm.hex").write_text("[hvm]\n0x\n")
    with pytest.raises(CorpusError, match="damaged: ValueError"):
        load_vectors(tmp_path)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Return a corpus of a few vectors."""
    index = json.loads((DATA / "index.json").read_text())
    names = {"hvm-image", "pv-image", "bad-id", "remus-as-plain", "cut-in-body", "after-end"}
    index["vectors"] = [entry for entry in index["vectors"] if entry["name"] in names]
    assert len(index["vectors"]) == len(names)
    for path in DATA.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "index.json").unlink()
    (tmp_path / "index.json").write_text(json.dumps(index))
    return tmp_path


def test_the_checker_of_the_readme_runs_as_it_stands(small: Path) -> None:
    (checker,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (small / "checker.py").write_text(checker)

    def checked(*reader: str) -> list[str]:
        told = subprocess.run(
            [sys.executable, small / "checker.py", small, *reader],
            check=False,
            stdout=subprocess.PIPE,
            text=True,
        )
        lines = told.stdout.splitlines()
        assert told.returncode == bool(lines)
        return [line.split(":")[0] for line in lines]

    verify = "import sys; from migstream.cli.group import group; group(['verify', '-q', sys.argv[1]])"
    assert checked(sys.executable, "-c", verify) == []
    assert checked("true") == ["bad-id", "cut-in-body"]


def test_the_readme_names_every_key_of_the_files() -> None:
    text = README.read_text()
    entries = json.loads((DATA / "index.json").read_text())["vectors"]
    keys = {key for entry in entries for key in entry} | set(VECTORS[0].decoded)
    assert [key for key in sorted(keys) if f"`{key}`" not in text] == []
