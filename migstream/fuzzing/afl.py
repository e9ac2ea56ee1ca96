"""The mutator as a custom mutator of AFL++, to be named in the environment variable ``AFL_PYTHON_MODULE``.

AFL++ brings a Python of its own (Debian 12's: 3.11), which finds this package by ``PYTHONPATH``; nothing
but the standard library is needed beside it. The names and signatures here are AFL++'s (its
docs/custom_mutators.md). ``post_process`` is not among them: a stream goes to the target as it was mutated,
wrong lengths on purpose included. ``fuzz/README.md`` has the command.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from migstream.fuzzing.mutator import mutate_one

__all__ = ["deinit", "describe", "fuzz", "fuzz_count", "init"]

PER_STREAM = 64  # mutations of each stream of the queue, each time AFL++ takes it up


@dataclass
class _State:
    chance: random.Random = field(default_factory=random.Random)
    steps: tuple[str, ...] = ()


_STATE = _State()


def init(seed: int) -> None:
    """Begin: everything follows from ``seed``, and from what AFL++ hands in."""
    _STATE.chance.seed(seed)
    _STATE.steps = ()


def deinit() -> None:
    """End: nothing is held that would have to be let go of."""


def fuzz_count(buf: bytearray) -> int:
    """Return how often ``buf`` is to be mutated."""
    return PER_STREAM


def fuzz(buf: bytearray, add_buf: bytearray | None, max_size: int) -> bytearray:
    """Return ``buf`` mutated, with parts of ``add_buf``, of the queue too; at most ``max_size`` octets.

    AFL++ ends where nothing comes back, so that a stream of no octets is left to its own mutations.
    """
    stream = bytes(buf)
    corpus = [stream, bytes(add_buf)] if add_buf else [stream]
    mutation = mutate_one(stream, corpus, _STATE.chance, max_length=max_size)
    _STATE.steps = mutation.steps
    return bytearray(mutation.octets) or buf[:max_size]


def describe(max_description_length: int) -> bytes:
    """Return what the last mutation was, for a file's name: ``field,drop``.

    In octets, which AFL++ takes (src/afl-fuzz-python.c), whatever its documentation's example shows.
    """
    names = ",".join(step.split(":")[0].replace(" ", "-") for step in _STATE.steps)
    return names.encode("ascii")[:max_description_length]
