"""The targets for atheris, whose choice of streams follows what they cover.

To run one, or all in turn::

    python -m fuzz.corpus build/corpus
    python -m fuzz.atheris_targets restore -max_total_time=600 build/corpus
    python -m fuzz.atheris_targets all -runs=1000

The first argument names the target, of `fuzz.targets`; the rest is libFuzzer's. Mutations are those of
`migstream.fuzzing`, three of four times; else libFuzzer's own.
"""

from __future__ import annotations

import os
import random
import sys
from typing import TYPE_CHECKING

import atheris

if TYPE_CHECKING:
    from fuzz.targets import Target

LIBFUZZERS_OWN = 4  # one mutation in so many is libFuzzer's, which knows which comparisons failed
EVERY = "all"


def main() -> int:
    """Run what the first argument names; return 0 if nothing was found."""
    # Instrumented on import: what is to be covered, not what does the covering.
    with atheris.instrument_imports(include=["migstream"], enable_loader_override=False):
        from fuzz.targets import TARGETS

    name, arguments = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if name == EVERY:
        return max(_in_a_child(target, arguments) for target in TARGETS.values())
    if name not in TARGETS:
        names = ", ".join([*TARGETS, EVERY])
        sys.exit(f"usage: python -m fuzz.atheris_targets TARGET [libFuzzer's arguments]\ntargets: {names}")
    _fuzz(TARGETS[name], arguments)
    return 0


def _in_a_child(target: Target, arguments: list[str]) -> int:
    """Run one target in a process of its own, as libFuzzer ends its process; return that one's exit code."""
    print(f"target {target.name}", file=sys.stderr, flush=True)
    child = os.fork()
    if not child:
        _fuzz(target, arguments)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _fuzz(target: Target, arguments: list[str]) -> None:
    from migstream.fuzzing.mutator import mutate_one

    corpus = target.corpus()

    def mutated(octets: bytes, max_size: int, seed: int) -> bytes:
        if seed % LIBFUZZERS_OWN == 0:
            return bytes(atheris.Mutate(octets, max_size))
        return mutate_one(octets, corpus, random.Random(seed), max_length=max_size).octets

    def execute(octets: bytes) -> None:
        target.execute(octets)

    atheris.Setup([sys.argv[0], *arguments], execute, custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
