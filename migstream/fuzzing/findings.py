"""A finding on the disk: one folder with the stream, a description to read, and a script that replays it.

=================  =====================================================================================
``stream``         the stream, minimised once that is done
``original``       the mutated stream as it was found
``finding.json``   everything about it, for programs and for ``migstream fuzz --replay``
``finding.txt``    the same to read: signature, what was mutated, the records, what the target wrote
``replay.sh``      runs the target on ``stream`` under the same limits; needs a shell, not migstream
=================  =====================================================================================
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Self

from migstream.errors import MigstreamError
from migstream.fuzzing.finding_text import describe, record_count, replay_script
from migstream.fuzzing.target import Command, Execution
from migstream.fuzzing.triage import Signature
from migstream.io.outputs import new_file

__all__ = ["Finding", "FindingError", "load_finding"]

SCHEMA = "migstream-finding-1"


class FindingError(MigstreamError):
    """What was named is not a finding's folder, or not one that this version reads."""


@dataclass(frozen=True)
class Finding:
    """One finding.

    ``number`` is the execution that came upon it first, ``steps`` what was done to the corpus for it;
    ``ending`` and ``output`` are the target's on ``stream``, ``verdict`` migstream's where it was asked.
    ``reproduced``: it came again at once. ``minimised_by``: executions that made ``stream`` of
    ``original``; ``None`` as long as that is not done.
    """

    signature: Signature
    command: Command
    directory: str
    number: int
    seed: str
    steps: tuple[str, ...]
    original: bytes = field(repr=False)
    stream: bytes = field(repr=False)
    ending: str
    output: bytes = field(repr=False)
    verdict: str | None = None
    judge: str | None = None
    reproduced: bool = True
    minimised_by: int | None = None

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.signature.name

    def minimised(self, stream: bytes, executions: int, execution: Execution, verdict: str | None) -> Self:
        """Return the finding with a smaller stream, and what the target made of that."""
        return replace(
            self,
            stream=stream,
            minimised_by=executions,
            ending=execution.ending,
            output=execution.output,
            verdict=verdict,
        )

    def to_json(self) -> dict[str, object]:
        """Return everything but the two streams."""
        return {
            "schema": SCHEMA,
            "signature": self.signature.to_json(),
            "command": self.command.to_json(),
            "directory": self.directory,
            "number": self.number,
            "seed": self.seed,
            "steps": list(self.steps),
            "ending": self.ending,
            "output": self.output.decode("latin-1"),
            "verdict": self.verdict,
            "judge": self.judge,
            "reproduced": self.reproduced,
            "minimised_by": self.minimised_by,
            "octets": len(self.stream),
            "records": record_count(self.stream),
        }

    def write(self, out: Path) -> Path:
        """Write the folder below ``out``; it appears when it is complete. Returns its path."""
        folder = out / self.name
        aside = Path(mkdtemp(prefix=".new-", dir=out))
        try:
            aside.chmod(0o777 & ~_umask())
            (aside / "original").write_bytes(self.original)
            self._write_rest(aside)
            if folder.exists():  # from a campaign that was killed before it could note that
                shutil.rmtree(folder)
            aside.rename(folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        return folder

    def update(self, out: Path) -> None:
        """Write what changed when the stream was minimised, a file at a time."""
        self._write_rest(out / self.name)

    def _write_rest(self, folder: Path) -> None:
        described = json.dumps(self.to_json(), indent=2) + "\n"
        contents = {
            "stream": self.stream,
            "finding.json": described.encode(),
            "finding.txt": describe(self).encode("utf-8", "backslashreplace"),
            "replay.sh": replay_script(self).encode("utf-8", "surrogateescape"),
        }
        for name, octets in contents.items():
            with new_file(folder / name, durable=False) as fd:
                os.write(fd, octets)
        (folder / "replay.sh").chmod(0o777 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load_finding(folder: Path) -> Finding:
    """Read a finding back; raises `FindingError`, `OSError`."""
    path = folder / "finding.json"
    if not path.is_file():
        raise FindingError(f"{folder} is no finding: it has no finding.json; name a folder of a campaign's")
    try:
        fields = json.loads(path.read_text())
        if fields["schema"] != SCHEMA:
            raise FindingError(f"{path} has the schema {fields['schema']}, expected {SCHEMA}")
        return Finding(
            signature=Signature.from_json(fields["signature"]),
            command=Command.from_json(fields["command"]),
            directory=fields["directory"],
            number=fields["number"],
            seed=fields["seed"],
            steps=tuple(fields["steps"]),
            original=(folder / "original").read_bytes(),
            stream=(folder / "stream").read_bytes(),
            ending=fields["ending"],
            output=fields["output"].encode("latin-1"),
            verdict=fields["verdict"],
            judge=fields["judge"],
            reproduced=fields["reproduced"],
            minimised_by=fields["minimised_by"],
        )
    except (ValueError, KeyError, TypeError) as exc:
        raise FindingError(f"{path} is damaged: {exc!r}") from None
