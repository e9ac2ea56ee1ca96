"""``migstream conformance``: how well does a stream reader do on the conformance vectors?"""

from __future__ import annotations

import json
import sys
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

import click

from migstream.cli.common import reporting_errors
from migstream.text import printable

if TYPE_CHECKING:
    from migstream.conformance import Kind, Outcome, Vector


@click.command(
    epilog="""\b
Examples:
  migstream conformance
  migstream conformance --reader 'my-reader --check {}'
  migstream conformance --reader 'my-restore --type {type} --guest {guest} {}' --level restore
  migstream conformance --reader 'migstream verify -q {}' --only 'envelopes/*' --only '!*/packed-*'
"""
)
@click.option(
    "--reader",
    metavar="COMMAND",
    help="The reader, run once a vector: {} becomes a file with the stream (without {}, standard input has "
    "it), {type} plain, remus or colo, {guest} hvm or pv. It exits with 0 to accept, 1 to refuse.",
)
@click.option(
    "--level",
    type=click.Choice(["verify", "restore"]),
    help="What the reader answers: is it sound (verify, the default), or would libxenguest restore it?",
)
@click.option(
    "--vectors",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Another corpus than the one that comes with migstream.",
)
@click.option(
    "--only",
    multiple=True,
    metavar="PATTERN",
    help="Only vectors whose GROUP/NAME or NAME matches, such as 'hvm/*'; '!PATTERN' leaves out. Repeatable.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long the reader may take for one vector.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object: counts by group, and what differs.")
def command(
    reader: str | None,
    level: str | None,
    vectors: Path | None,
    only: tuple[str, ...],
    timeout_s: float,
    as_json: bool,
) -> None:
    """Run a stream reader on the conformance vectors, and score it.

    Each vector is a small stream with what a reader has to make of it (spec/vectors/README.md). Without
    --reader it is migstream itself, within this process: verdicts, rules, missing static data and the
    decoded JSON.

    Exit code: 0 the reader agrees on every vector, 1 it does not, 2 wrong usage.
    """
    if level is not None and reader is None:
        raise click.UsageError("--level says what a --reader is asked; migstream itself is asked everything")
    from migstream.conformance import ExternalReader, Kind, Level, load_vectors, run_own

    with reporting_errors(reader or "migstream"):
        chosen = [vector for vector in load_vectors(vectors) if _matches(vector, only)]
        if reader is None:
            outcomes = list(run_own(chosen))
        else:
            outcomes = list(ExternalReader(reader, Level(level or "verify"), timeout_s).run(chosen))
    if not outcomes:
        raise click.UsageError("no vector is left to ask about; --only takes patterns such as 'hvm/*'")
    wrong = [outcome for outcome in outcomes if outcome.kind is not Kind.AGREES]
    unasked = len(chosen) - len(outcomes)
    if as_json:
        click.echo(json.dumps(_json(outcomes, wrong, unasked), indent=2))
    else:
        _print(outcomes, wrong, unasked)
    if wrong:
        sys.exit(1)


def _matches(vector: Vector, only: tuple[str, ...]) -> bool:
    """Whether a vector is asked for; the last pattern that matches counts."""
    asked = not only or only[0].startswith("!")
    for pattern in only:
        bare = pattern.removeprefix("!")
        if fnmatch(f"{vector.group}/{vector.name}", bare) or fnmatch(vector.name, bare):
            asked = not pattern.startswith("!")
    return asked


def _json(outcomes: list[Outcome], wrong: list[Outcome], unasked: int) -> dict[str, object]:
    from migstream.conformance import score

    return {
        "schema": "migstream-conformance-1",
        "agrees": not wrong,
        "groups": {group: _counts(counts) for group, counts in score(outcomes).items()},
        "not_asked": unasked,
        "disagreements": [outcome.to_json() for outcome in wrong],
    }


def _counts(counts: Counter[Kind]) -> dict[str, int]:
    from migstream.conformance import Kind

    return {"vectors": counts.total()} | {str(kind): counts[kind] for kind in Kind}


def _print(outcomes: list[Outcome], wrong: list[Outcome], unasked: int) -> None:
    from migstream.conformance import score

    for outcome in wrong:
        vector = outcome.vector
        click.echo(f"{outcome.kind}: {vector.group}/{vector.name}: {vector.description}")
        for line in outcome.differences:
            click.echo(f"    {printable(line)}")
    if wrong:
        click.echo()
    groups = score(outcomes)
    rows = {group: _counts(counts) for group, counts in groups.items()}
    rows["all"] = _counts(sum(groups.values(), Counter()))
    click.echo(f"{'group':12}" + "".join(f"{column:>11}" for column in rows["all"]))
    for group, counts in rows.items():
        click.echo(f"{group:12}" + "".join(f"{count:11}" for count in counts.values()))
    if unasked:
        click.echo(
            f"{unasked} vectors not asked: they are no bare images, or need {{type}} or {{guest}} to be told"
        )
