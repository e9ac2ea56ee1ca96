"""The conformance corpus: every vector gets the answers that its author wrote down, and none is missing."""

from __future__ import annotations

import pytest

from migstream.conformance import Vector, check, load_vectors
from spec.vectors import make

VECTORS = load_vectors()


def test_the_committed_corpus_is_what_the_cases_say() -> None:
    assert make.stale() == []


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.name)
def test_a_vector_gets_its_verdict_rules_missing_data_and_json(vector: Vector) -> None:
    assert list(check(vector)) == []
