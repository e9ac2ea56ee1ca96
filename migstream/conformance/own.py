"""migstream itself, held against the corpus, within this process."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from migstream.conformance.corpus import Answer, Vector
from migstream.conformance.outcome import Kind, Outcome
from migstream.errors import StreamError
from migstream.inspection import Line, Report, inspect
from migstream.io import reader
from migstream.io.reader import Stream
from migstream.verification import verify

__all__ = ["check", "decode", "run_own"]

SHOWN = 64  # octets of a field that the decoded form has in full; of longer ones it has length and digest
TARGET_PAGES = 4096  # of the guest that a vector is restored into: 16 MiB


def run_own(vectors: Iterable[Vector]) -> Iterator[Outcome]:
    """Yield what migstream itself makes of each vector: everything that the corpus says is compared."""
    for vector in vectors:
        try:
            differences = tuple(check(vector))
        except Exception as exc:  # a reader must not end so: that is what is looked for here
            yield Outcome(vector, Kind.CRASHED, (f"{type(exc).__name__}: {exc}",))
        else:
            yield Outcome(vector, Kind.DIFFERS if differences else Kind.AGREES, differences)


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
