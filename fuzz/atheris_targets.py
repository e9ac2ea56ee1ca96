"""The targets for atheris, whose choice of streams follows what they cover.

To run one::

    python -m fuzz.corpus build/corpus
    python -m fuzz.atheris_targets restore -max_total_time=600 build/corpus

The first argument is a target of `fuzz.targets`; the rest is libFuzzer's. Mutations are those of
`migstream.fuzzing`, three of four times; else libFuzzer's own.
"""

from __future__ import annotations

import random
import sys

import atheris

LIBFUZZERS_OWN = 4  # one mutation in so many is libFuzzer's, which knows which comparisons failed


def main() -> None:
    """Run the target that the first argument names; does not return."""
    # Instrumented on import: what is to be covered, not what does the covering.
    with atheris.instrument_imports(include=["migstream"], enable_loader_override=False):
        from fuzz.targets import TARGETS
    from migstream.fuzzing.mutator import mutate_one

    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in TARGETS:
        sys.exit(f"usage: python -m fuzz.atheris_targets {{{','.join(TARGETS)}}} [libFuzzer's arguments]")
    target = TARGETS[name]
    corpus = target.corpus()

    def mutated(octets: bytes, max_size: int, seed: int) -> bytes:
        if seed % LIBFUZZERS_OWN == 0:
            return bytes(atheris.Mutate(octets, max_size))
        chance = random.Random(seed)
        return mutate_one(octets, corpus, chance, max_length=max_size).octets

    def execute(octets: bytes) -> None:
        target.execute(octets)

    atheris.Setup([sys.argv[0], *sys.argv[2:]], execute, custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
