"""The corpus as it lies in files: ``spec/vectors/README.md`` has the formats."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from migstream.errors import MigstreamError

__all__ = ["FORMAT", "Answer", "CorpusError", "Vector", "load_vectors", "vectors_directory"]

FORMAT = "migstream-vectors-1"


class CorpusError(MigstreamError):
    """The corpus cannot be read: it is not there, or damaged."""


class Answer(StrEnum):
    """What a reader makes of a stream."""

    ACCEPT = "accept"
    REFUSE = "refuse"


@dataclass(frozen=True)
class Vector:
    """One stream with what is expected of a reader.

    ``sound``: whether it is sound, by the specification. ``rules``: the rules of verify that it breaks,
    sorted. ``restore``: what libxenguest answers, into a guest of type ``guest`` (``hvm``, ``pv``) and for a
    stream of type ``stream_type`` (``plain``, ``remus``, ``colo``); ``None`` where it is not libxenguest
    that reads the stream. ``missing``: static data (``CPUID``, ``MSR``) that a restore tells its caller to
    make up; ``None`` where it never gets to tell. ``decoded``: what is in it, see `decode`.
    """

    name: str
    group: str
    description: str
    octets: bytes
    sound: bool
    rules: tuple[str, ...]
    restore: Answer | None
    missing: tuple[str, ...] | None
    guest: str
    stream_type: str
    reference: str | None
    decoded: dict[str, Any]

    @property
    def verdict(self) -> Answer:
        """What a verifier answers: ``accept`` what is sound."""
        return Answer.ACCEPT if self.sound else Answer.REFUSE


def vectors_directory() -> Path:
    """Return where the corpus is: in the installed package, or in the source tree."""
    here = Path(__file__).parents[1]
    places = (here / "vectors", here.parent / "spec" / "vectors" / "data")
    return next((place for place in places if (place / "index.json").exists()), places[0])


def load_vectors(directory: str | Path | None = None) -> list[Vector]:
    """Return every vector of the corpus in ``directory``, by default the one that comes with migstream.

    Raises `CorpusError` where it is not there, of another format, or damaged.
    """
    place = vectors_directory() if directory is None else Path(directory)
    try:
        index = json.loads((place / "index.json").read_text("ascii"))
        if index["format"] != FORMAT:
            raise CorpusError(f"{place}: expected the format {FORMAT}, found {index['format']!r}")
        streams = {group: _read_hex(place / f"{group}.hex") for group in index["groups"]}
        decoded = {group: json.loads((place / f"{group}.json").read_text("ascii")) for group in streams}
        return [_vector(entry, streams, decoded) for entry in index["vectors"]]
    except OSError as exc:
        raise CorpusError(f"{exc.filename}: {exc.strerror}; the corpus is in spec/vectors/data") from exc
    except (ValueError, KeyError, TypeError) as exc:
        raise CorpusError(f"{place}: the corpus is damaged: {type(exc).__name__}: {exc}") from exc


def _vector(entry: dict[str, Any], streams: dict[str, Any], decoded: dict[str, Any]) -> Vector:
    name, group, missing = entry["name"], entry["group"], entry["missing"]
    return Vector(
        name=name,
        group=group,
        description=entry["description"],
        octets=streams[group][name],
        sound=entry["sound"],
        rules=tuple(entry["rules"]),
        restore=None if entry["restore"] is None else Answer(entry["restore"]),
        missing=None if missing is None else tuple(missing),
        guest=entry["guest"],
        stream_type=entry["stream_type"],
        reference=entry.get("reference"),
        decoded=decoded[group][name],
    )


def _read_hex(path: Path) -> dict[str, bytes]:
    """Read streams from their text: a name in brackets, then octets in hex, ``hex*n`` for n times these."""
    streams: dict[str, list[bytes]] = {}
    parts: list[bytes] = []
    for line in path.read_text("ascii").splitlines():
        if line.startswith("["):
            parts = streams.setdefault(line[1:-1], [])
        elif not line.startswith("#"):
            for token in line.split():
                octets, _, times = token.partition("*")
                parts.append(bytes.fromhex(octets) * int(times or 1))
    return {name: b"".join(octets) for name, octets in streams.items()}
