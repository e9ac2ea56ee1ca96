"""``migstream fuzz``: run a program on mutated streams, and keep what it does not survive."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from migstream.cli.common import reporting_errors, size_option
from migstream.text import printable

if TYPE_CHECKING:
    from migstream.fuzzing.corpus import Corpus
    from migstream.fuzzing.state import State
    from migstream.fuzzing.target import Command

DEFAULT_TIME_S = 60.0
MEMORY = "1G"
LEFT_OUT_SHOWN = 5


@click.command(
    epilog="""\b
Examples:
  migstream fuzz --target './reader {}' --time 60
  migstream fuzz --target './reader -' --stdin --corpus streams --time 3600 --jobs 4
  migstream fuzz --target 'xen-reader {}' --differential --out disagreements
  migstream fuzz --resume --out findings --time 3600
  migstream fuzz --replay findings/crash-SIGSEGV-0123456789
"""
)
@click.option("--target", metavar="'CMD {}'", help="The program and its arguments; {} is the stream's file.")
@click.option("--stdin", is_flag=True, help="Give the stream to its standard input (a file) instead of {}.")
@click.option(
    "--corpus",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Streams to begin with, packed or not. Default: the conformance vectors that come with migstream.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="findings",
    metavar="DIR",
    show_default=True,
    help="Where findings and the campaign's state go.",
)
@click.option("--time", "time_s", type=click.FloatRange(min=0), metavar="SECONDS", help="How long (60).")
@click.option(
    "--executions", type=click.IntRange(min=1), metavar="N", help="End at execution N of the campaign."
)
@click.option("--findings", type=click.IntRange(min=1), metavar="N", help="End once there are N findings.")
@click.option("--seed", default="0", show_default=True, help="What the mutations follow from.")
@click.option(
    "--differential",
    "judge",
    type=click.Choice(["verify", "restore"]),
    is_flag=False,
    flag_value="verify",
    help="Keep where the target and migstream disagree too: accept (exit code 0) or refuse. migstream asks "
    "verify (the default: sound or not), or restore into a model guest.",
)
@click.option(
    "--jobs", type=click.IntRange(min=1), metavar="N", help="Executions at a time (the processors)."
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0.01),
    default=5.0,
    metavar="SECONDS",
    show_default=True,
    help="An execution that takes longer is a hang.",
)
@click.option(
    "--memory",
    default=MEMORY,
    metavar="SIZE",
    show_default=True,
    help="Address space of an execution, or 'none', which a target with a sanitizer needs.",
)
@click.option(
    "--crash-code",
    "crash_codes",
    type=int,
    multiple=True,
    metavar="N",
    help="An exit code that is a crash too.",
)
@click.option(
    "--codes-only",
    is_flag=True,
    help="Look at exit codes and signals only: what the output says is no crash.",
)
@click.option("--resume", is_flag=True, help="Go on with the campaign in --out.")
@click.option(
    "--replay", type=click.Path(path_type=Path), metavar="FOLDER", help="Run the target on one finding again."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line: findings, status, result.")
@click.pass_context
def command(
    ctx: click.Context,
    target: str | None,
    stdin: bool,
    corpus: Path | None,
    out: Path,
    time_s: float | None,
    executions: int | None,
    findings: int | None,
    seed: str,
    judge: str | None,
    jobs: int | None,
    timeout_s: float,
    memory: str,
    crash_codes: tuple[int, ...],
    codes_only: bool,
    resume: bool,
    replay: Path | None,
    as_json: bool,
) -> None:
    """Run a program on mutated streams, and keep what crashes, hangs or disagrees.

    The program sees the streams of the corpus first, then mutations of them. There is no shell. A crash is a
    signal, a sanitizer's report, an uncaught exception; a hang takes longer than --timeout. Findings
    are told apart by signal and output, minimised by the grammar, and written to a folder each:
    the stream, what was mutated, and a script that replays it. Ctrl-C ends a campaign, --resume goes on.

    Exit code: 0 nothing found, 1 something found (--replay: it came again) or the campaign failed, 2 wrong
    usage or a target that cannot be run, 130 interrupted.
    """
    if replay is not None:
        _replay(replay, as_json=as_json)
        return
    from migstream.fuzzing.corpus import CorpusDirectoryError
    from migstream.fuzzing.state import StateError
    from migstream.fuzzing.target import CRASH_CODES, Command, TargetError

    if time_s is None and executions is None and findings is None:
        time_s = DEFAULT_TIME_S
    with reporting_errors(str(out)):
        try:
            if resume:
                given = _given(ctx, "target", "stdin", "seed", "judge", "timeout_s", "memory", "crash_codes")
                if given:
                    raise click.UsageError(f"--resume takes {given} from the campaign; leave it out")
                state, streams = _resumed(out, corpus)
            else:
                if target is None:
                    raise click.UsageError("Missing option '--target', such as --target './reader {}'.", ctx)
                described = Command(
                    _split(target),
                    stdin=stdin,
                    timeout_s=timeout_s,
                    memory=None if memory == "none" else size_option("--memory", memory, MEMORY),
                    crash_codes=CRASH_CODES | set(crash_codes),
                    look_at_output=not codes_only,
                )
                state, streams = _begun(described, seed, judge, out, corpus)
            state.plan.command.check()
            _run(state, streams, out, jobs, as_json, time_s, executions, findings)
        except (TargetError, CorpusDirectoryError, StateError) as exc:
            raise click.UsageError(printable_lines(str(exc))) from None
    sys.exit(1 if state.findings else 0)


def printable_lines(text: str) -> str:
    """Return text of several lines, each safe to show."""
    return "\n".join(map(printable, text.split("\n")))


def _given(ctx: click.Context, *names: str) -> str:
    """Return the option that was given on the command line, of several that may not be."""
    from click.core import ParameterSource

    for parameter in ctx.command.params:
        if (
            parameter.name in names
            and ctx.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
        ):
            return parameter.opts[0]
    return ""


def _split(target: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(target))
    except ValueError as exc:
        raise click.BadParameter(f"{printable(target)}: {exc}", param_hint="--target") from None


def _begun(
    described: Command, seed: str, judge: str | None, out: Path, directory: Path | None
) -> tuple[State, Corpus]:
    """Begin a campaign in ``out``, where there may be none."""
    from migstream.fuzzing.corpus import load_corpus
    from migstream.fuzzing.state import STATE_FILE, State, StateError
    from migstream.fuzzing.worker import Plan

    described.check()
    if (out / STATE_FILE).exists():
        raise StateError(f"{out} holds a campaign; go on with it by --resume, or give another --out")
    corpus = load_corpus(directory)
    for name, reason in corpus.left_out[:LEFT_OUT_SHOWN]:
        click.echo(f"left out of the corpus: {printable(name)}: {printable(reason)}", err=True)
    if len(corpus.left_out) > LEFT_OUT_SHOWN:
        click.echo(f"and {len(corpus.left_out) - LEFT_OUT_SHOWN} more files", err=True)
    out.mkdir(parents=True, exist_ok=True)
    place = None if directory is None else str(directory.resolve())
    return State(Plan(described, seed, judge), place, corpus.digest), corpus


def _resumed(out: Path, directory: Path | None) -> tuple[State, Corpus]:
    """Take up the campaign in ``out``; its corpus may have moved to ``directory``, but not changed."""
    from migstream.fuzzing.corpus import load_corpus
    from migstream.fuzzing.state import StateError, load_state

    state = load_state(out)
    if directory is None and state.corpus_directory is not None:
        directory = Path(state.corpus_directory)
    corpus = load_corpus(directory)
    if corpus.digest != state.corpus_digest:
        raise StateError(
            f"the corpus is not the one that the campaign in {out} began with, so its executions would be "
            "others; put it back, or start a campaign with another --out"
        )
    return state, corpus


def _run(
    state: State,
    corpus: Corpus,
    out: Path,
    jobs: int | None,
    as_json: bool,
    time_s: float | None,
    executions: int | None,
    findings: int | None,
) -> None:
    from migstream.fuzzing.campaign import Campaign
    from migstream.fuzzing.display import show

    jobs = jobs or len(os.sched_getaffinity(0))
    if not as_json:
        click.echo(
            f"fuzzing {printable(shlex.join(state.plan.command.argv))} on {len(corpus.streams)} streams, "
            f"seed {printable(state.plan.seed)}, {jobs} at a time; findings go to {printable(str(out))}"
        )
    interrupted = False
    with show(sys.stdout, as_json=as_json) as display:
        campaign = Campaign(state, corpus, out, jobs, display)
        try:
            campaign.run(time_s=time_s, executions=executions, findings=findings)
        except KeyboardInterrupt:
            interrupted = True
    _tell(state, out, as_json=as_json, interrupted=interrupted)
    if interrupted:
        sys.exit(130)


def _tell(state: State, out: Path, *, as_json: bool, interrupted: bool) -> None:
    from migstream.fuzzing.display import status_line

    if as_json:
        print(json.dumps({"event": "result", "interrupted": interrupted, **state.to_json()}))
        return
    click.echo(f"{'interrupted: ' if interrupted else ''}{status_line(state)}")
    for known in state.findings.values():
        size = f"{known.octets} octets, {known.records} record{'s' * (known.records != 1)}"
        times = f"{known.hits} time{'s' * (known.hits != 1)}"
        click.echo(f"  {known.signature}\n    {times}; {size}; {printable(str(out / known.signature.name))}")
    if state.omitted:
        click.echo(f"  and {state.omitted} more, which were not kept")
    if state.unconfirmed:
        click.echo(f"{state.unconfirmed} hangs or wants of memory did not come again: was the machine busy?")
    if state.findings:
        first = next(iter(state.findings.values())).signature.name
        click.echo(f"replay one: migstream fuzz --replay {shlex.quote(str(out / first))}")
    click.echo(f"go on:      migstream fuzz --resume --out {shlex.quote(str(out))}")


def _replay(folder: Path, *, as_json: bool) -> None:
    """Run one finding again, and say whether it came again: exit code 1."""
    with reporting_errors(str(folder)):
        from migstream.fuzzing.replay import replay

        result = replay(folder)
        if as_json:
            print(json.dumps({"event": "replay", **result.to_json()}))
        else:
            click.echo(result.text())
    sys.exit(1 if result.again else 0)
