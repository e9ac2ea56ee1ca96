"""What a campaign's worker processes do: executions by their number, and minimising.

Execution ``n`` of a campaign is the corpus's stream ``n`` as it is, and behind the corpus mutation
``n - len(corpus)``: so it follows from plan and corpus alone, and it does not matter which worker does it,
when, or how often.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import parent_process
from multiprocessing.connection import wait
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Self

from migstream.fuzzing.minimise import Minimised, minimise
from migstream.fuzzing.mutator import MAX_LENGTH, Mutation, mutate
from migstream.fuzzing.target import Command, Execution, Outcome, Target
from migstream.fuzzing.triage import Signature, signature_of
from migstream.fuzzing.verdicts import JUDGES, Verdict, disagreement, own_failure

__all__ = ["Batch", "Found", "Plan", "Shrunk", "Stopped", "Worker", "begin", "execute", "shrink", "stream_of"]

HANGING_S = 10.0  # seconds that the hangs among the executions of a minimisation may take
PATIENCE = 4  # times the slowest execution that ended: how long a hang that is known is waited for
LEAST_PATIENCE_S = 1.0  # a sanitizer's report can take half a second


@dataclass(frozen=True)
class Plan:
    """What every execution follows from, beside the corpus. ``judge``: a key of `JUDGES`, or ``None``."""

    command: Command
    seed: str
    judge: str | None = None
    max_length: int = MAX_LENGTH

    def to_json(self) -> dict[str, object]:
        """Return the fields; `from_json` takes them back."""
        return {**asdict(self), "command": self.command.to_json()}

    @classmethod
    def from_json(cls, fields: dict[str, object]) -> Self:
        """Make a plan of `to_json`'s fields; `TypeError`, `KeyError`, `ValueError` where they are others."""
        command = fields["command"]
        if not isinstance(command, dict):
            raise TypeError("command is an object")
        return cls(**{**fields, "command": Command.from_json(command)})  # type: ignore[arg-type]  # JSON's


@dataclass(frozen=True)
class Found:
    """An execution that is a finding, with what is needed to tell of it."""

    number: int
    signature: Signature
    mutation: Mutation
    execution: Execution
    verdict: Verdict | None
    reproduced: bool


@dataclass
class Batch:
    """What some executions in a row came to.

    ``outcomes`` counts them by outcome; ``hits`` findings by their signature's key, ``found`` has the first
    of each that this worker saw. ``unconfirmed`` counts hangs and wants of memory that did not come again.
    """

    first: int
    count: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    hits: Counter[str] = field(default_factory=Counter)
    found: list[Found] = field(default_factory=list)
    unconfirmed: int = 0


@dataclass(frozen=True)
class Shrunk:
    """A finding's minimised stream, and what the target and migstream made of it."""

    minimised: Minimised
    execution: Execution
    verdict: Verdict | None


class Stopped(Exception):  # noqa: N818 - no error: the campaign ends
    """The campaign was interrupted while a batch or a minimisation ran."""


def stream_of(plan: Plan, corpus: Sequence[bytes], number: int) -> Mutation:
    """Return what execution ``number`` runs."""
    if number < len(corpus):
        return Mutation(corpus[number], (f"corpus stream {number}, {len(corpus[number])} octets, as it is",))
    return mutate(corpus, plan.seed, number - len(corpus), max_length=plan.max_length)


class Worker:
    """Runs the target, judges, and remembers which findings it has told of."""

    def __init__(self, plan: Plan, corpus: Sequence[bytes], directory: Path, stop: Event) -> None:
        self.plan = plan
        self.corpus = corpus
        self.target = Target(plan.command, directory)
        self._judge = JUDGES[plan.judge] if plan.judge is not None else None
        self._stop = stop
        self._told: dict[str, bool] = {}  # signature's key: whether it came again
        self._hang_told = False
        self._slowest_s = 0.0  # of the executions that came to an end

    def execute(self, first: int, count: int) -> Batch:
        """Do ``count`` executions from number ``first`` on. Raises `Stopped`, `TargetError`."""
        batch = Batch(first)
        for number in range(first, first + count):
            self._check_stop()
            mutation = stream_of(self.plan, self.corpus, number)
            # A hang that is new has the whole timeout, twice. More of the same would take all of the time.
            timeout_s = self._patience() if self._hang_told else None
            execution, verdict, signature = self._run(mutation.octets, timeout_s)
            batch.count += 1
            batch.seconds += execution.seconds
            batch.outcomes[execution.outcome] += 1
            if signature is None:
                continue
            if signature.key not in self._told:
                reproduced = self._run(mutation.octets)[2] == signature
                if not reproduced and signature.kind in (Outcome.HANG, Outcome.MEMORY):
                    batch.unconfirmed += 1  # the machine was busy
                    continue
                self._told[signature.key] = reproduced
                self._hang_told |= signature.kind == Outcome.HANG
                batch.found.append(Found(number, signature, mutation, execution, verdict, reproduced))
            batch.hits[signature.key] += 1
        return batch

    def shrink(self, octets: bytes, signature: Signature) -> Shrunk:
        """Minimise a finding's stream. Raises `Stopped`, `TargetError`."""
        patience_s = self._patience()
        hangs_left = max(5, int(HANGING_S / patience_s))

        def keeps(tried: bytes) -> bool:
            nonlocal hangs_left
            if not hangs_left:
                return False
            execution, _, found = self._run(tried, patience_s)
            hangs_left -= execution.outcome is Outcome.HANG
            return found == signature

        minimised = minimise(octets, keeps)
        execution, verdict, found = self._run(minimised.octets)
        if found != signature:  # a small one was slow only, or it comes and goes
            minimised = Minimised(octets, minimised.executions, False)
            execution, verdict, _ = self._run(octets)
        return Shrunk(minimised, execution, verdict)

    def _patience(self) -> float:
        """Return after how many seconds an execution is taken for a hang of which there were others."""
        return min(self.plan.command.timeout_s, max(LEAST_PATIENCE_S, PATIENCE * self._slowest_s))

    def _run(
        self, octets: bytes, timeout_s: float | None = None
    ) -> tuple[Execution, Verdict | None, Signature | None]:
        self._check_stop()
        execution = self.target.run(octets, timeout_s)
        if execution.outcome is not Outcome.HANG:
            self._slowest_s = max(self._slowest_s, execution.seconds)
        path = str(self.target.stream_path)
        signature = signature_of(execution, path)
        verdict = None
        if self._judge is not None and signature is None:
            try:
                verdict = self._judge(octets)
            except Exception:  # of which migstream is to raise none: a finding too, in migstream
                return execution, None, own_failure(traceback.format_exc())
            signature = disagreement(execution, verdict, path)
        return execution, verdict, signature

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Stopped


# In a worker process, its one worker, and the functions by which the campaign reaches it.

_worker: Worker | None = None


def begin(plan: Plan, corpus: Sequence[bytes], scratch: Path, stop: Event) -> None:
    """Make this process a worker; its directory is one of its own below ``scratch``."""
    global _worker  # noqa: PLW0603 - one worker a process, made by the pool's initializer
    # The terminal's Ctrl-C is the campaign's business; a handler, unlike SIG_IGN, is not inherited by exec.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    directory = scratch / str(os.getpid())
    directory.mkdir()
    threading.Thread(target=_end_with_campaign, args=(scratch,), daemon=True).start()
    _worker = Worker(plan, corpus, directory, stop)


def _end_with_campaign(scratch: Path) -> None:
    """Wait until the campaign's process is gone, however it went, and leave nothing behind it."""
    campaign = parent_process()
    if campaign is not None:
        wait([campaign.sentinel])
        shutil.rmtree(scratch, ignore_errors=True)
        os._exit(1)


def execute(first: int, count: int) -> Batch:
    """Run `Worker.execute` in a worker process."""
    assert _worker is not None
    return _worker.execute(first, count)


def shrink(octets: bytes, signature: Signature) -> Shrunk:
    """Run `Worker.shrink` in a worker process."""
    assert _worker is not None
    return _worker.shrink(octets, signature)
