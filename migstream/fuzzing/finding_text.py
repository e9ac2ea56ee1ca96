"""A finding in words, and as a shell script that replays it."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from migstream.fuzzing.tree import Record, Tree
from migstream.inspection import Report, inspect
from migstream.io import reader
from migstream.text import printable

if TYPE_CHECKING:
    from migstream.fuzzing.findings import Finding

__all__ = ["describe", "record_count", "replay_script"]

OUTPUT_LINES = 40  # of the target's output that are shown, from the end
LINE_LENGTH = 200
RECORDS_SHOWN = 100


def record_count(octets: bytes) -> int:
    """Return how many records, or segments, can be framed in a stream."""
    return sum(isinstance(node, Record) for node in Tree.parse(octets).nodes)


def replay_script(finding: Finding) -> str:
    """Return a shell script that runs the target on the stream beside it, under the limits it had."""
    command = finding.command
    argv = [_quoted(argument, stdin=command.stdin) for argument in command.argv]
    fed = '"$here/stream"' if command.stdin else "/dev/null"
    lines = [
        "#!/bin/sh",
        f"# {finding.signature}"[:LINE_LENGTH],
        "# Runs the target on the stream beside this script, under the limits that it had.",
        'here=$(cd "$(dirname "$0")" && pwd) || exit',
        f"cd {shlex.quote(finding.directory)} || exit",
        "ulimit -c 0",
        *([f"ulimit -v {command.memory // 1024}"] if command.memory is not None else []),
        f"exec timeout -s KILL {command.timeout_s:g} {' '.join(argv)} <{fed}",
    ]
    return "\n".join(lines) + "\n"


def _quoted(argument: str, *, stdin: bool) -> str:
    if stdin:
        return shlex.quote(argument)
    return '"$here/stream"'.join(shlex.quote(part) if part else "" for part in argument.split("{}")) or "''"


def describe(finding: Finding) -> str:
    """Return a finding in words, with nothing in it that could drive a terminal."""
    signature = finding.signature
    shown = [f"{signature.kind}: {signature.title}"]
    shown += [f"  at {where}" for where in signature.where]
    shown += ["", "Target"]
    fed = "stream on standard input" if finding.command.stdin else "{} is the stream"
    shown.append(f"  {printable(shlex.join(finding.command.argv))}   ({fed})")
    shown.append(f"  ended with: {finding.ending}")
    if finding.verdict is not None:
        shown.append(f"  {printable(finding.verdict)}")
    if not finding.reproduced:
        shown.append("  It did not come again when it was run a second time: it may depend on chance.")
    shown += ["", f"How it came about: execution {finding.number} of seed {finding.seed}"]
    shown += [f"  {_line(step)}" for step in finding.steps]
    shown += ["", _sizes(finding)]
    shown += [f"  {line}" for line in _inspected(finding.stream)]
    shown += ["", "What the target wrote" + ("" if finding.output else ": nothing")]
    lines = finding.output.splitlines()
    if len(lines) > OUTPUT_LINES:
        shown.append(f"  [{len(lines) - OUTPUT_LINES} lines left out]")
    shown += [f"  {_line(line)}" for line in lines[-OUTPUT_LINES:]]
    shown += ["", "Replay", "  sh replay.sh", "  migstream fuzz --replay FOLDER"]
    return "\n".join(shown) + "\n"


def _sizes(finding: Finding) -> str:
    def measured(octets: bytes) -> str:
        count = record_count(octets)
        return f"{len(octets)} octets, {count} record{'s' * (count != 1)}"

    if finding.minimised_by is None:
        return f"Stream: {measured(finding.stream)}, not minimised"
    return (
        f"Stream: {measured(finding.stream)}, minimised by {finding.minimised_by} executions "
        f"from {measured(finding.original)}"
    )


def _line(text: str | bytes) -> str:
    shown = printable(text.expandtabs())
    return shown if len(shown) <= LINE_LENGTH else f"{shown[:LINE_LENGTH]}..."


def _inspected(octets: bytes) -> list[str]:
    """Return a line for each record, as ``inspect --records`` has them, and what ends the stream."""
    report = Report()
    lines: list[str] = []
    for line in inspect(reader.open_memory(octets), report):
        if len(lines) < RECORDS_SHOWN:
            place = f"{line.index:4} {line.offset:8} {line.layer:6}"
            lines.append(f"{place} {line.type:22} {line.length:9}  {line.text}")
    headers = [f"{layer.name} headers at {layer.offset}" for layer in report.layers]
    error = [f"then: {report.error}"] if report.error is not None else []
    return [_line(line) for line in headers + lines + error]
