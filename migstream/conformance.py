"""The conformance corpus: small streams, and what a reader has to make of each (``spec/vectors/README.md``).

`load_vectors` reads it; `check` holds migstream itself against a vector. How another implementation is run
on them is in `conformance_reader`.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from migstream.errors import MigstreamError, StreamError
from migstream.inspection import Line, Report, inspect
from migstream.io import reader
from migstream.io.reader import Stream
from migstream.verification import verify

__all__ = [
    "FORMAT",
    "Answer",
    "CorpusError",
    "Vector",
    "check",
    "decode",
    "load_vectors",
    "vectors_directory",
]

FORMAT = "migstream-vectors-1"
SHOWN = 64  # octets of a field that the decoded form has in full; of longer ones it has length and digest
TARGET_PAGES = 4096  # of the guest that a vector is restored into: 16 MiB


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
    here = Path(__file__).parent
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


def decode(octets: bytes) -> dict[str, Any]:
    """Return what is in a stream, in the form that the corpus keeps: inspect's, without what may differ.

    Its keys are those of ``spec/inspect.md``. Fields of more than 64 octets are ``{"octets": length,
    "sha256": digest}``; of an error there is only where reading ended, of a body that does not fit its type
    only that it is ``malformed``: the words are each implementation's own.
    """
    report = Report()
    with _opened(octets) as stream:
        records = [_record(line) for line in inspect(stream, report)]
    whole = report.to_json()
    kept = ("layers", "guest_type", "page_size", "xen_version", "vcpus", "pages", "pass_count")
    out = {key: whole[key] for key in (*kept, "checkpoints", "static_data", "config", "ending", "trailer")}
    out["config"] = _brief(out["config"])
    out["error_offset"] = None if report.error is None else report.error.offset
    return {"records": records, **out}


@contextmanager
def _opened(octets: bytes) -> Iterator[Stream]:
    """Open octets as a file is opened: compressed ones are unpacked."""
    with tempfile.TemporaryFile() as file:
        file.write(octets)
        file.seek(0)
        with reader.open(file.fileno()) as stream:
            yield stream


def _record(line: Line) -> dict[str, object]:
    out = line.to_json()
    del out["record"]
    if out.pop("error", None) is not None:
        out["malformed"] = True
    if "fields" in out:
        out["fields"] = _brief(out["fields"])
    return out


def _brief(value: object) -> object:
    """Replace long octets in hex, anywhere in ``value``, by their length and digest."""
    match value:
        case str() if len(value) > 2 * SHOWN:
            try:
                octets = bytes.fromhex(value)
            except ValueError:
                return value
            return {"octets": len(octets), "sha256": hashlib.sha256(octets).hexdigest()}
        case dict():
            return {key: _brief(item) for key, item in value.items()}
        case list():
            return [_brief(item) for item in value]
    return value


def check(vector: Vector) -> Iterator[str]:
    """Read ``vector`` with migstream itself, and yield in what it differs from what is expected."""
    with _opened(vector.octets) as stream:
        found = verify(stream)
    rules = tuple(sorted(found.counts))
    if found.sound() != vector.sound:
        yield f"verify: expected {_soundness(vector.sound)}, found {_soundness(found.sound())}"
    if rules != vector.rules:
        yield f"rules: expected {' '.join(vector.rules) or 'none'}, found {' '.join(rules) or 'none'}"
    answer, missing, why = _restore(vector)
    if vector.restore is not None and answer is not vector.restore:
        yield f"restore: expected {vector.restore}, found {answer}{f' ({why})' if why else ''}"
    if missing != vector.missing:
        yield f"missing: expected {_told(vector.missing)}, found {_told(missing)}"
    if decode(vector.octets) != vector.decoded:
        yield "decoded: differs from the JSON of the corpus"


def _soundness(sound: bool) -> str:
    return "sound" if sound else "not sound"


def _told(missing: tuple[str, ...] | None) -> str:
    return "never told" if missing is None else " and ".join(missing) or "nothing"


def _restore(vector: Vector) -> tuple[Answer, tuple[str, ...] | None, StreamError | None]:
    """Restore into a model; return the answer, the static data missing if that was told, and an error."""
    import os

    from migstream.engines.common import Missing, StreamType
    from migstream.engines.restore import RestoreCallbacks, restore
    from migstream.guests.model import ModelGuest
    from migstream.records.libxc import GuestType

    told: list[tuple[str, ...]] = []

    def static_data_done(missing: Missing) -> int:
        told.append(tuple(str(flag.name) for flag in missing))
        return 0

    callbacks = RestoreCallbacks(
        static_data_done=static_data_done,
        checkpoint=lambda: 1,
        postcopy=lambda: 1,
        wait_checkpoint=lambda: 1,
        suspend=lambda: 1,
        restore_results=lambda store, console: None,
    )
    target = ModelGuest.empty(TARGET_PAGES, GuestType[vector.guest.upper()])
    back_channel = os.open(os.devnull, os.O_WRONLY)
    answer, error = Answer.ACCEPT, None
    try:
        with _opened(vector.octets) as stream:
            restore(
                target,
                stream,
                stream_type=StreamType(vector.stream_type),
                callbacks=callbacks,
                send_back_fd=back_channel,
            )
    except StreamError as exc:
        answer, error = Answer.REFUSE, exc
    finally:
        os.close(back_channel)
    return answer, told[0] if told else None, error
