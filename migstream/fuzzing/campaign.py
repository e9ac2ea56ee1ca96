"""A campaign: one execution after the other on all cores, until time is up; its findings and its state.

Theory of operation. Workers take batches of executions by their numbers; the campaign commits the batches in
the order of the numbers, whoever was first, so its state is one number, ``next``: everything below is
done. The state is written (to a new file, renamed) with every commit, findings before it: a campaign that
is interrupted, or killed, goes on behind the last commit.

A finding is written as it was found, then minimised by a worker beside the others, and written again.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from shutil import rmtree
from typing import Any

from migstream.errors import MigstreamError
from migstream.fuzzing import worker
from migstream.fuzzing.corpus import Corpus
from migstream.fuzzing.display import Display
from migstream.fuzzing.finding_text import record_count
from migstream.fuzzing.findings import Finding, load_finding
from migstream.fuzzing.state import STATE_FILE, Known, State
from migstream.fuzzing.target import Outcome, TargetError, scratch_directory
from migstream.fuzzing.worker import Batch, Found, Shrunk

__all__ = ["Campaign"]

BATCH_S = 0.2  # seconds that a batch is to take: short for the display and Ctrl-C, long for what it costs
LARGEST_BATCH = 200
AHEAD = 8  # batches waiting for each worker: one that hangs is not to keep the others idle
FINDINGS_KEPT = 500  # different ones that are written; further ones are counted


class Campaign:
    """Runs the executions of ``state.plan`` on ``corpus``, and keeps what it finds below ``out``."""

    def __init__(self, state: State, corpus: Corpus, out: Path, jobs: int, display: Display) -> None:
        self.state = state
        self.corpus = corpus
        self.out = out
        self._jobs = jobs
        self._display = display
        self._batches: deque[Future[Batch]] = deque()
        self._shrinking: dict[Future[Shrunk], Finding] = {}
        self._interrupted = False
        self._before_s = state.seconds
        self._started = time.monotonic()

    def run(
        self, *, time_s: float | None = None, executions: int | None = None, findings: int | None = None
    ) -> None:
        """Go on for ``time_s`` seconds, up to execution ``executions``, or until there are ``findings``.

        What is being minimised then is finished. Raises `TargetError` where the target cannot be run,
        `OSError` where a finding cannot be written, `KeyboardInterrupt` after SIGINT or SIGTERM, each with
        a consistent state on the disk.
        """
        self._started = time.monotonic()

        def over() -> bool:
            spent = time.monotonic() - self._started
            enough = findings is not None and len(self.state.findings) >= findings
            return enough or (time_s is not None and spent >= time_s)

        self.state.save(self.out)
        with self._interrupts():
            self._run(over, executions)

    def _run(self, over: Callable[[], bool], executions: int | None) -> None:
        context = get_context("spawn")
        stop = context.Event()
        scratch = scratch_directory()
        pool = ProcessPoolExecutor(
            self._jobs, context, worker.begin, (self.state.plan, self.corpus.streams, scratch, stop)
        )
        try:
            self._resume_minimising(pool)
            self._execute(pool, over, executions)
            while self._shrinking:
                self._display.minimising(len(self._shrinking))
                self._wait_and_commit(pool)
        except BrokenProcessPool:
            raise MigstreamError(
                "a worker process died, killed perhaps for want of memory; go on with fewer --jobs"
            ) from None
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            rmtree(scratch, ignore_errors=True)

    @contextmanager
    def _interrupts(self) -> Iterator[None]:
        """Note SIGINT and SIGTERM instead of raising at once: a commit is not torn in two."""

        def note(number: int, frame: object) -> None:
            self._interrupted = True

        signals = (signal.SIGINT, signal.SIGTERM)
        in_main = threading.current_thread() is threading.main_thread()
        before = [signal.signal(number, note) for number in signals] if in_main else []
        try:
            yield
        finally:
            for number, handler in zip(signals, before, strict=False):
                signal.signal(number, handler)

    def _execute(self, pool: ProcessPoolExecutor, over: Callable[[], bool], executions: int | None) -> None:
        following = self.state.next
        while True:
            ending = over()
            while not ending and len(self._batches) < AHEAD * self._jobs:
                count = self._batch_size()
                if executions is not None:
                    count = min(count, executions - following)
                if count <= 0:
                    break
                self._batches.append(pool.submit(worker.execute, following, count))
                following += count
            if ending:
                # The batches that have not begun are left to whoever goes on; what runs is waited for.
                while self._batches and self._batches[-1].cancel():
                    self._batches.pop()
            if not self._batches:
                return
            self._wait_and_commit(pool)

    def _batch_size(self) -> int:
        done = self.state.next
        if not done:
            return 1
        each = self.state.target_seconds / done
        return max(1, min(LARGEST_BATCH, int(BATCH_S / each) if each else LARGEST_BATCH))

    def _wait_and_commit(self, pool: ProcessPoolExecutor) -> None:
        waited_for: list[Future[Any]] = [*list(self._batches)[:1], *self._shrinking]
        wait(waited_for, timeout=0.2, return_when=FIRST_COMPLETED)
        if self._interrupted:
            raise KeyboardInterrupt
        while self._batches and self._batches[0].done():
            self._commit(self._batches.popleft().result(), pool)
        for future in [future for future in self._shrinking if future.done()]:
            self._commit_minimised(self._shrinking.pop(future), future.result())
        self.state.seconds = self._before_s + time.monotonic() - self._started
        self._display.status(self.state)

    def _commit(self, batch: Batch, pool: ProcessPoolExecutor) -> None:
        state = self.state
        for found in batch.found:
            if found.signature.key in state.findings:
                continue
            if len(state.findings) == FINDINGS_KEPT:
                state.omitted += 1
                continue
            finding = self._finding(found)
            finding.write(self.out)
            state.findings[found.signature.key] = Known(
                found.signature,
                found.number,
                octets=len(finding.stream),
                records=record_count(finding.stream),
            )
            self._display.found(finding, self.out)
            self._submit(pool, finding)
        # Only now, when no finding is left whose writing could fail.
        state.outcomes.update(batch.outcomes)
        state.unconfirmed += batch.unconfirmed
        state.target_seconds += batch.seconds
        for key, hits in batch.hits.items():
            if key in state.findings:
                state.findings[key].hits += hits
        state.next = batch.first + batch.count
        state.save(self.out)
        if batch.first < len(self.corpus.streams) <= state.next:
            self._look_at_corpus()

    def _look_at_corpus(self) -> None:
        """Say so where the target takes none of the corpus; raise `TargetError` where it cannot have run."""
        outcomes, streams = self.state.outcomes, len(self.corpus.streams)
        if outcomes[Outcome.ACCEPT]:
            return
        known = list(self.state.findings.values())
        if streams > 1 and not outcomes[Outcome.REFUSE] and len(known) == 1:
            rmtree(self.out / known[0].signature.name, ignore_errors=True)
            (self.out / STATE_FILE).unlink()
            raise TargetError(
                f"every stream of the corpus ends in the same {known[0].signature}, so nothing can be found; "
                "does the target run at all? One built with a sanitizer needs --memory none"
            )
        self._display.note(
            f"the target accepts none of the {streams} streams of the corpus; is its command right?"
        )

    def _finding(self, found: Found) -> Finding:
        return Finding(
            signature=found.signature,
            command=self.state.plan.command,
            directory=str(Path.cwd()),
            number=found.number,
            seed=self.state.plan.seed,
            steps=found.mutation.steps,
            original=found.mutation.octets,
            stream=found.mutation.octets,
            ending=found.execution.ending,
            output=found.execution.output,
            verdict=None if found.verdict is None else str(found.verdict),
            judge=self.state.plan.judge,
            reproduced=found.reproduced,
        )

    def _resume_minimising(self, pool: ProcessPoolExecutor) -> None:
        for known in self.state.findings.values():
            folder = self.out / known.signature.name
            if known.minimised or not folder.is_dir():
                continue
            self._submit(pool, load_finding(folder))

    def _submit(self, pool: ProcessPoolExecutor, finding: Finding) -> None:
        self._shrinking[pool.submit(worker.shrink, finding.original, finding.signature)] = finding

    def _commit_minimised(self, finding: Finding, shrunk: Shrunk) -> None:
        small = shrunk.minimised
        verdict = None if shrunk.verdict is None else str(shrunk.verdict)
        finding = finding.minimised(small.octets, small.executions, shrunk.execution, verdict)
        finding.update(self.out)
        known = self.state.findings[finding.signature.key]
        known.minimised, known.octets, known.records = True, len(small.octets), record_count(small.octets)
        self.state.save(self.out)
        self._display.minimised(finding, known)
