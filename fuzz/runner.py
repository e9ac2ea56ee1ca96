"""Runs targets on mutations: each worker all targets in turn, with numbers of its own."""

from __future__ import annotations

import resource
import shlex
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType

from fuzz.targets import TARGETS
from migstream.fuzzing.mutator import Mutation, mutate

__all__ = ["Plan", "replay", "run"]

HANG_S = 20.0  # of CPU time that one execution may take: the clock goes on while others have the processor
WAIT_S = 600.0  # by the clock: it waits for something that never comes
MEMORY = 4 << 30  # octets of address space that a worker may have: an allocation by an unchecked field fails
CLOCK_EVERY = 16  # executions between two looks at the clock


@dataclass(frozen=True)
class Plan:
    """What to run: targets by name, for ``seconds`` together, and where findings go (or nowhere)."""

    targets: tuple[str, ...]
    seed: str
    seconds: float
    workers: int
    findings: Path | None = None


@dataclass
class Done:
    """What a worker did with one target, in how many seconds of a core's time.

    ``findings``: by signature, the first number and its traceback.
    """

    target: str
    executions: int = 0
    seconds: float = 0.0
    answers: Counter[str] = field(default_factory=Counter)
    findings: dict[str, tuple[int, str]] = field(default_factory=dict)


class Hang(BaseException):
    """An execution that took too long; not an `Exception`, so that no handler of the package takes it."""


def mutation(target: str, seed: str, number: int) -> Mutation:
    """Return what execution ``number`` of a target is given."""
    return mutate(TARGETS[target].corpus(), f"{target}/{seed}", number)


def run(plan: Plan) -> int:
    """Run a plan, report, and return 0 if nothing was found, else 1."""
    context = get_context("fork")
    connections, processes = [], []
    for worker in range(plan.workers):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(plan, worker, theirs))
        process.start()
        theirs.close()
        connections.append(ours)
        processes.append(process)
    totals = {name: Done(name) for name in plan.targets}
    open_ones: list[Connection] = list(connections)
    while open_ones:
        for connection in wait(open_ones):
            assert isinstance(connection, Connection)
            try:
                _add(totals, connection.recv(), plan)
            except EOFError:
                open_ones.remove(connection)
    for process in processes:
        process.join()
    died = [process.exitcode for process in processes if process.exitcode]
    for code in died:
        print(f"a worker died: exit code {code}", file=sys.stderr)
    return _report(totals, died=bool(died))


def _add(totals: dict[str, Done], part: Done, plan: Plan) -> None:
    total = totals[part.target]
    total.executions += part.executions
    total.seconds += part.seconds
    total.answers += part.answers
    for signature, (number, text) in part.findings.items():
        if signature not in total.findings:
            total.findings[signature] = number, text
            _tell(part.target, plan, number, text)


def _command(target: str, seed: str, number: int) -> str:
    return f"python -m fuzz --target {target} --seed {shlex.quote(seed)} --only {number}"


def _tell(target: str, plan: Plan, number: int, text: str) -> None:
    command = _command(target, plan.seed, number)
    print(f"finding: {command}\n{text}", file=sys.stderr, flush=True)
    if plan.findings is not None:
        plan.findings.mkdir(parents=True, exist_ok=True)
        made = mutation(target, plan.seed, number)
        place = plan.findings / f"{target}-{number}"
        place.with_suffix(".stream").write_bytes(made.octets)
        steps = "\n".join(made.steps)
        place.with_suffix(".txt").write_text(f"{command}\n\n{steps}\n\n{text}", "utf-8")


def _report(totals: dict[str, Done], *, died: bool) -> int:
    for done in totals.values():
        rate = done.executions / done.seconds if done.seconds else 0
        answers = ", ".join(f"{n} {answer}" for answer, n in done.answers.most_common())
        print(f"{done.target:12} {done.executions:10} executions {rate:7.0f}/s a core: {answers}")
    executions = sum(done.executions for done in totals.values())
    found = sum(len(done.findings) for done in totals.values())
    print(f"{executions} executions, {found} findings")
    return int(found > 0 or died)


def _work(plan: Plan, worker: int, connection: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, _hang)
    signal.signal(signal.SIGALRM, _hang)
    share = plan.seconds / len(plan.targets)
    for name in plan.targets:
        connection.send(_one_target(plan, name, worker, share))


def _one_target(plan: Plan, name: str, worker: int, seconds: float) -> Done:
    target, done = TARGETS[name], Done(name)
    target.corpus()
    started, worked = time.monotonic(), time.process_time()
    for number in count(worker, plan.workers):
        octets = mutation(name, plan.seed, number).octets
        try:
            with _watched():
                done.answers[target.execute(octets)] += 1
        except (Exception, Hang) as exc:
            done.findings.setdefault(_signature(exc), (number, traceback.format_exc(limit=-4)))
        done.executions += 1
        if done.executions % CLOCK_EVERY == 0 and time.monotonic() - started >= seconds:
            break
    done.seconds = time.process_time() - worked
    return done


def _signature(exc: BaseException) -> str:
    """Return what tells findings apart: the type, and the innermost line."""
    innermost = traceback.extract_tb(exc.__traceback__)[-1]
    message = str(exc) if isinstance(exc, AssertionError) else ""
    return f"{type(exc).__name__} {innermost.filename}:{innermost.lineno} {message[:80]}"


@contextmanager
def _watched() -> Iterator[None]:
    signal.setitimer(signal.ITIMER_PROF, HANG_S)
    signal.setitimer(signal.ITIMER_REAL, WAIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _hang(number: int, frame: FrameType | None) -> None:
    limit = f"{HANG_S:g} s of CPU time" if number == signal.SIGPROF else f"{WAIT_S:g} s"
    raise Hang(f"no end after {limit}")


def replay(target: str, seed: str, number: int) -> int:
    """Execute one number, with all that is known about it; return 0 if it is no finding, else 1."""
    made = mutation(target, seed, number)
    print("\n".join(made.steps))
    try:
        print(TARGETS[target].execute(made.octets))
    except Exception:
        traceback.print_exc()
        return 1
    return 0
