"""The conformance corpus: small streams, and what a reader has to make of each (``spec/vectors/README.md``).

`load_vectors` reads it, `run_own` holds migstream itself against it, and `ExternalReader` any other program.
"""

from __future__ import annotations

from migstream.conformance.corpus import FORMAT, Answer, CorpusError, Vector, load_vectors, vectors_directory
from migstream.conformance.outcome import Kind, Outcome, score
from migstream.conformance.own import check, decode, run_own
from migstream.conformance.reader import ExternalReader, Level, ReaderError

__all__ = [
    "FORMAT",
    "Answer",
    "CorpusError",
    "ExternalReader",
    "Kind",
    "Level",
    "Outcome",
    "ReaderError",
    "Vector",
    "check",
    "decode",
    "load_vectors",
    "run_own",
    "score",
    "vectors_directory",
]
