"""Mutated streams, each of which follows from a corpus, a seed and a number, and says how it came about."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from migstream.fuzzing.mutations import MUTATIONS, Editing
from migstream.fuzzing.tree import Node, Tree

__all__ = ["MAX_LENGTH", "Mutation", "mutate", "mutate_one"]

MAX_LENGTH = 1 << 20  # octets of a mutated stream; what is longer is cut
TREES_KEPT = 512  # streams of the corpus whose trees are kept from one mutation to the next
TRIES = 8  # mutations looked at until one applies
STEPS = (1, 1, 1, 1, 2, 2, 3, 5)  # how many mutations a stream gets: mostly few, so that it stays deep

_DRAWN_FROM = [mutation for mutation in MUTATIONS for _ in range(mutation.weight)]


@dataclass(frozen=True)
class Mutation:
    """A mutated stream. ``steps``: what was done, a line each, from the stream it began with."""

    octets: bytes
    steps: tuple[str, ...]


def mutate(
    corpus: Sequence[bytes], seed: int | str, number: int, *, max_length: int = MAX_LENGTH
) -> Mutation:
    """Return mutation ``number`` of the corpus: a pure function of its arguments.

    One stream of the corpus is taken apart and given one to five mutations of the table (`MUTATIONS`).
    ``max_length`` is in octets. Raises `ValueError` for an empty corpus.
    """
    if not corpus:
        raise ValueError("the corpus is empty: give at least one stream to begin with")
    chance = random.Random(f"{seed}/{number}")  # noqa: S311 - replayable, not secret
    first = chance.randrange(len(corpus))
    mutation = mutate_one(corpus[first], corpus, chance, max_length=max_length)
    began = f"corpus stream {first}, {len(corpus[first])} octets"
    return Mutation(mutation.octets, (began, *mutation.steps))


def mutate_one(
    stream: bytes, corpus: Sequence[bytes], chance: random.Random, *, max_length: int = MAX_LENGTH
) -> Mutation:
    """Return ``stream`` mutated, with parts of others of ``corpus``; everything follows from ``chance``."""
    nodes = list(_nodes(stream))
    editing = Editing(nodes, chance, lambda: list(_nodes(chance.choice(corpus))))
    steps = []
    for _ in range(chance.choice(STEPS)):
        for _ in range(TRIES):
            mutation = chance.choice(_DRAWN_FROM)
            step = mutation.apply(editing)
            if step is not None:
                steps.append(f"{mutation.name}: {step}")
                break
    octets = Tree(nodes).build()
    if len(octets) > max_length:
        steps.append(f"cut to {max_length} octets")
        octets = octets[:max_length]
    return Mutation(octets, tuple(steps))


@lru_cache(maxsize=TREES_KEPT)
def _nodes(octets: bytes) -> tuple[Node, ...]:
    return tuple(Tree.parse(octets).nodes)
