"""The streams that a campaign begins with: a directory's, or the conformance corpus that comes along."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from migstream.conformance import load_vectors
from migstream.errors import MigstreamError
from migstream.fuzzing.tree import Raw, Tree
from migstream.io.detect import open_input

__all__ = ["MAX_STREAM", "Corpus", "CorpusDirectoryError", "load_corpus"]

MAX_STREAM = 256 << 10  # octets, unpacked: small streams are what a fuzzer gets through many of
MAX_FILES = 100_000


class CorpusDirectoryError(MigstreamError):
    """The corpus cannot be used: no directory, or no stream in it."""


@dataclass(frozen=True)
class Corpus:
    """Streams, their names (a file's path within the directory), and files left out: name and reason."""

    streams: tuple[bytes, ...]
    names: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def digest(self) -> str:
        """Tells this corpus from any other: what an execution is follows from it."""
        lengths = b"".join(len(stream).to_bytes(8, "big") for stream in self.streams)
        return hashlib.sha256(lengths + b"".join(self.streams)).hexdigest()


def load_corpus(directory: Path | None, *, max_stream: int = MAX_STREAM) -> Corpus:
    """Read every stream below ``directory``, of any form that migstream reads, unpacked, in order of names.

    A directory of conformance vectors gives these. ``None``: those that come with migstream. Equal streams
    are taken once. Raises `CorpusDirectoryError` where there is none, and `MigstreamError` where
    the vectors are damaged.
    """
    if directory is None or (directory / "index.json").is_file():
        vectors = load_vectors(directory)
        short = {v.octets: v.name for v in vectors if v.octets and len(v.octets) <= max_stream}
        return Corpus(tuple(short), tuple(short.values()))
    if not directory.is_dir():
        raise CorpusDirectoryError(
            f"{directory} is no directory; give one with streams in it, or leave out --corpus for the "
            "streams that come with migstream"
        )
    found: list[tuple[str, bytes]] = []
    left_out: list[tuple[str, str]] = []
    for path in sorted(directory.rglob("*"))[:MAX_FILES]:
        if not path.is_file():
            continue
        name = str(path.relative_to(directory))
        try:
            source = open_input(path)
            try:
                found.append((name, source.read(max_stream + 1)))
            finally:
                source.close()
        except (OSError, MigstreamError) as exc:
            left_out.append((name, exc.strerror or str(exc) if isinstance(exc, OSError) else str(exc)))
    corpus = _corpus(found, left_out, max_stream)
    if not corpus.streams:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in corpus.left_out[:5])
        raise CorpusDirectoryError(f"{directory} holds no stream to begin with{reasons}")
    return corpus


def _corpus(found: Sequence[tuple[str, bytes]], left_out: list[tuple[str, str]], max_stream: int) -> Corpus:
    streams: dict[bytes, str] = {}
    for name, octets in found:
        if len(octets) > max_stream:
            left_out.append((name, f"longer than {max_stream} octets"))
        elif all(isinstance(node, Raw) and not node.label.startswith("legacy") for node in _nodes(octets)):
            left_out.append((name, "not a stream"))
        else:
            streams.setdefault(octets, name)
    return Corpus(tuple(streams), tuple(streams.values()), tuple(left_out))


def _nodes(octets: bytes) -> Sequence[object]:
    return Tree.parse(octets).nodes
