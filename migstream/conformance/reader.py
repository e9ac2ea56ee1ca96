"""Another implementation, run on the vectors: a command that says accept or refuse by its exit code."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum

from migstream.conformance.corpus import Answer, Vector
from migstream.conformance.outcome import Kind, Outcome
from migstream.errors import MigstreamError

__all__ = ["ExternalReader", "Level", "ReaderError"]

_ANSWERS = {0: Answer.ACCEPT, 1: Answer.REFUSE}
_SAID = 200  # octets of what a reader that crashed said last


class ReaderError(MigstreamError):
    """The reader's command cannot be run at all."""


class Level(StrEnum):
    """What a reader is asked."""

    VERIFY = "verify"  # is the stream sound?
    RESTORE = "restore"  # would libxenguest restore it?


@dataclass(frozen=True)
class ExternalReader:
    """A command that is run once a vector.

    In its arguments ``{}`` stands for the path of a file with the stream, ``{type}`` for the stream type
    (plain, remus, colo) and ``{guest}`` for the type of the guest (hvm, pv) that it is to be restored into.
    Without ``{}`` the stream comes on standard input. It exits with 0 for a stream that it accepts and with
    1 for one that it refuses; anything else counts as a crash, and so does more than ``timeout_s`` seconds,
    after which it is killed with all that it started.
    """

    command: str
    level: Level = Level.VERIFY
    timeout_s: float = 10.0

    def asked_about(self, vector: Vector) -> bool:
        """Whether the command can be asked: a restore is told what it needs to know about the stream."""
        if self.level is Level.VERIFY:
            return True
        other_guest = vector.decoded["guest_type"] not in (None, vector.guest)
        return (
            vector.restore is not None
            and ("{type}" in self.command or vector.stream_type == "plain")
            and ("{guest}" in self.command or not other_guest)
        )

    def run(self, vectors: Iterable[Vector]) -> Iterator[Outcome]:
        """Yield what the command makes of each vector that it can be asked about; several run at a time.

        Raises `ReaderError` where the command cannot be run.
        """
        asked = [vector for vector in vectors if self.asked_about(vector)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            yield from pool.map(self.ask, asked)

    def ask(self, vector: Vector) -> Outcome:
        """Run the command on one vector; raises `ReaderError` where that is not possible."""
        expected = vector.verdict if self.level is Level.VERIFY else vector.restore
        with (
            tempfile.NamedTemporaryFile(prefix=f"{vector.name}-") as stream,
            tempfile.TemporaryFile() as said,
        ):
            stream.write(vector.octets)
            stream.flush()
            status = self._run(vector, stream.name, said.fileno())
            said.seek(max(0, os.fstat(said.fileno()).st_size - _SAID))
            last = said.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
        if status is None:
            return Outcome(
                vector, Kind.TIMED_OUT, (f"expected {expected}, no answer in {self.timeout_s:g} s",)
            )
        found = _ANSWERS.get(status)
        if found is None:
            how = f"signal {_signal_name(-status)}" if status < 0 else f"exit code {status}"
            return Outcome(vector, Kind.CRASHED, (f"expected {expected}, found {how}: {last}".rstrip(": "),))
        if found is not expected:
            return Outcome(vector, Kind.DIFFERS, (f"expected {expected}, found {found}",))
        return Outcome(vector, Kind.AGREES)

    def _run(self, vector: Vector, path: str, said: int) -> int | None:
        """Return the command's status as `subprocess` has it, or ``None`` after the timeout."""
        values = {"{}": path, "{type}": vector.stream_type, "{guest}": vector.guest}
        with open(path if "{}" not in self.command else os.devnull, "rb") as stdin:
            try:
                arguments = shlex.split(self.command)
                if not arguments:
                    raise ValueError("it is empty")
                for placeholder, value in values.items():
                    arguments = [argument.replace(placeholder, value) for argument in arguments]
                process = subprocess.Popen(
                    arguments,
                    stdin=stdin,
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    start_new_session=True,
                )
            except (OSError, ValueError) as exc:
                why = exc.strerror if isinstance(exc, OSError) else exc
                raise ReaderError(f"the reader cannot be run: {why}; --reader takes a command line") from exc
        try:
            return process.wait(self.timeout_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the session that it leads, so all it started
                process.wait()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
