"""Mutations: each one applies somewhere, says what it did, and follows from its number alone."""

from __future__ import annotations

import os
import subprocess
import sys
from random import Random

import pytest

from migstream.fuzzing.mutations import MUTATIONS, Editing, Mutation
from migstream.fuzzing.mutator import mutate
from migstream.fuzzing.tree import Node, Tree
from migstream.records import libxc
from tests import build, legacy_streams, streams

PV = streams.PvGuest().stream()
CONTEXT = bytes.fromhex("0100 0000 0400 0000 86123854 0200 0100 0200 0000 abcd 0000 0000 0000 0000")
HVM = streams.stream(streams.pages(0, [1, 2]), libxc.HvmContext(hvm_ctx=CONTEXT), streams.END)
CORPUS = (
    PV,
    HVM,
    build.image("big"),
    build.xl(build.libxl_stream()),
    build.remus_stream(),
    build.xapi(build.segment(0xF0), build.image(), build.segment(0xF00, b"QEVM")),
    build.xend(legacy_streams.hvm()),
)
NUMBERS = range(250)


def applied(mutation: Mutation, number: int) -> tuple[bytes, bytes, str | None]:
    """Apply one mutation to a stream of the corpus; return the stream, what came of it, and the step."""
    chance = Random(number)

    def other() -> list[Node]:
        return Tree.parse(chance.choice(CORPUS)).nodes

    stream = chance.choice(CORPUS)
    tree = Tree.parse(stream)
    step = mutation.apply(Editing(tree.nodes, chance, other))
    return stream, tree.build(), step


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_mutation_applies_and_changes_the_stream_as_its_step_says(mutation: Mutation) -> None:
    changed = 0
    for number in NUMBERS:
        stream, octets, step = applied(mutation, number)
        if step is None:
            assert octets == stream
        changed += octets != stream
    assert changed > 10


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_mutation_survives_streams_that_are_mutated_already(mutation: Mutation) -> None:
    for number in range(150):
        chance = Random(number)
        tree = Tree.parse(mutate(CORPUS, "base", number).octets)
        mutation.apply(Editing(tree.nodes, chance, list))
        tree.build()


@pytest.mark.parametrize("name", ["entry", "count", "pages", "pfn", "type", "xenstore", "hvm-entry"])
def test_a_mutated_body_leaves_framing_right(name: str) -> None:
    mutation = next(m for m in MUTATIONS if m.name == name)
    for number in NUMBERS[:100]:
        before, octets, step = applied(mutation, number)
        if step is not None:
            assert Tree.parse(octets).labels() == Tree.parse(before).labels()


@pytest.mark.parametrize("name", ["length", "cut", "noise"])
def test_a_lie_about_framing_changes_what_is_framed(name: str) -> None:
    mutation = next(m for m in MUTATIONS if m.name == name)
    pairs = [applied(mutation, number)[:2] for number in NUMBERS[:100]]
    assert sum(Tree.parse(a).labels() != Tree.parse(b).labels() for a, b in pairs) > 20


def test_a_mutation_is_the_same_in_every_process() -> None:
    program = (
        "import hashlib; from migstream.fuzzing.mutator import mutate;"
        "from tests.test_fuzzing_mutations import CORPUS;"
        "print(hashlib.sha256(repr([mutate(CORPUS, 7, n) for n in range(50)]).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(digests) == 1


def test_a_mutation_depends_on_seed_and_number_but_not_on_what_was_asked_before() -> None:
    assert mutate(CORPUS, 3, 14) == mutate(CORPUS, 3, 14)
    assert mutate(CORPUS, "3", 15) == mutate(CORPUS, 3, 15)
    assert len({mutate(CORPUS, seed, number).octets for seed in range(10) for number in range(20)}) > 180


def test_steps_say_where_it_began_and_what_was_done() -> None:
    first, *steps = mutate(CORPUS, 1, 2).steps
    assert first.startswith("corpus stream ")
    assert steps
    names = {mutation.name for mutation in MUTATIONS}
    assert all(step.split(":")[0] in names for step in steps)


def test_no_mutation_is_longer_than_asked_for() -> None:
    for number in range(100):
        mutation = mutate(CORPUS, 1, number, max_length=500)
        assert len(mutation.octets) <= 500
        if len(mutation.octets) == 500:
            assert mutation.steps[-1] == "cut to 500 octets"


def test_an_empty_corpus_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one stream"):
        mutate([], 1, 1)


def test_streams_without_any_structure_are_mutated_too() -> None:
    assert len({mutate([b"", HVM], 1, number).octets for number in range(50)}) > 20
    assert len({mutate([b"no stream"], 1, number).octets for number in range(50)}) > 20
