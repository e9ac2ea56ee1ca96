"""Where a campaign stands, and the file that keeps it: ``campaign.json`` in the folder of its findings."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from migstream.errors import MigstreamError
from migstream.fuzzing.triage import Signature
from migstream.fuzzing.worker import Plan
from migstream.io.outputs import new_file

__all__ = ["STATE_FILE", "Known", "State", "StateError", "load_state"]

SCHEMA = "migstream-fuzz-1"
STATE_FILE = "campaign.json"


class StateError(MigstreamError):
    """There is no campaign to go on with, or another one than was asked for."""


@dataclass
class Known:
    """A finding as the state knows it: its first execution, how often it came, its stream's present size."""

    signature: Signature
    number: int
    hits: int = 0
    minimised: bool = False
    octets: int = 0
    records: int = 0

    def to_json(self) -> dict[str, object]:
        """Return the fields."""
        return {
            "name": self.signature.name,
            "signature": self.signature.to_json(),
            "number": self.number,
            "hits": self.hits,
            "minimised": self.minimised,
            "octets": self.octets,
            "records": self.records,
        }


@dataclass
class State:
    """A campaign: its plan and corpus, and what was done. Every execution below ``next`` is done.

    ``seconds`` is how long it ran, ``target_seconds`` how long the target did, on all cores together.
    ``findings`` are by their signature's key; ``omitted`` counts those that were not kept.
    """

    plan: Plan
    corpus_directory: str | None
    corpus_digest: str
    next: int = 0
    seconds: float = 0.0
    target_seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: dict[str, Known] = field(default_factory=dict)
    unconfirmed: int = 0
    omitted: int = 0

    def to_json(self) -> dict[str, object]:
        """Return everything, as ``--json`` and the state file have it."""
        return {
            "plan": self.plan.to_json(),
            "corpus": {"directory": self.corpus_directory, "digest": self.corpus_digest},
            "executions": self.next,
            "seconds": round(self.seconds, 3),
            "target_seconds": round(self.target_seconds, 3),
            "outcomes": dict(self.outcomes),
            "findings": [known.to_json() for known in self.findings.values()],
            "unconfirmed": self.unconfirmed,
            "omitted": self.omitted,
        }

    def save(self, out: Path) -> None:
        """Write the state; what was there stays until it is complete. Raises `OSError`."""
        octets = json.dumps({"schema": SCHEMA, **self.to_json()}, indent=1).encode()
        with new_file(out / STATE_FILE, durable=False) as fd:
            written = 0
            while written < len(octets):
                written += os.write(fd, octets[written:])


def load_state(out: Path) -> State:
    """Read a campaign's state back; raises `StateError`."""
    path = out / STATE_FILE
    try:
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise StateError(f"{out} holds no campaign to go on with; start one without --resume") from None
    except (OSError, ValueError) as exc:
        raise StateError(f"{path} cannot be read: {exc}") from None
    try:
        if fields["schema"] != SCHEMA:
            raise StateError(f"{path} has the schema {fields['schema']!r}, expected {SCHEMA}")
        return State(
            plan=Plan.from_json(fields["plan"]),
            corpus_directory=fields["corpus"]["directory"],
            corpus_digest=fields["corpus"]["digest"],
            next=fields["executions"],
            seconds=fields["seconds"],
            target_seconds=fields["target_seconds"],
            outcomes=Counter(fields["outcomes"]),
            findings={known.signature.key: known for known in map(_known, fields["findings"])},
            unconfirmed=fields["unconfirmed"],
            omitted=fields["omitted"],
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise StateError(f"{path} is damaged: {exc!r}; start a campaign with another --out") from None


def _known(fields: dict[str, Any]) -> Known:
    return Known(
        Signature.from_json(fields["signature"]),
        number=fields["number"],
        hits=fields["hits"],
        minimised=fields["minimised"],
        octets=fields["octets"],
        records=fields["records"],
    )
