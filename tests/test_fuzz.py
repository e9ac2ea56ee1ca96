"""The fuzz harness itself: its seeds are sound, its mutations replay, and a short run finds nothing."""

from __future__ import annotations

from fuzz.reader import execute, mutate, seeds


def test_the_seeds_but_the_odd_pv_one_and_the_legacy_one_are_sound() -> None:
    assert [execute(seed) for seed in seeds()] == [True, False, True, True, True, True, True, False]


def test_an_execution_follows_from_its_number() -> None:
    corpus = seeds()
    assert mutate(3, 14, corpus) == mutate(3, 14, corpus)
    assert mutate(3, 14, corpus) != mutate(3, 15, corpus)


def test_mutated_streams_bring_out_no_other_error_than_our_own() -> None:
    corpus = seeds()
    verdicts = [execute(mutate(1, number, corpus)) for number in range(1500)]
    assert 0 < sum(verdicts) < len(verdicts)
