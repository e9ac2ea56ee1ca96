"""``migstream verify``: is this stream sound?"""

from __future__ import annotations

import sys

import click

from migstream.cli.common import open_stream, reporting_errors, timeout_option
from migstream.text import printable
from migstream.verification.findings import KEPT_PER_RULE, Verdict
from migstream.verification.rules import RULES, Severity


@click.command(
    epilog="""\b
Examples:
  migstream verify guest.xl
  xl save -p guest /dev/stdout | migstream verify -
  migstream verify --json guest.xl | jq '.findings[] | .rule'
  migstream verify --rules
"""
)
@click.argument("file", metavar="FILE|-", required=False)
@click.option("-q", "--quiet", is_flag=True, help="Print nothing; the exit code tells.")
@click.option("-v", "--verbose", is_flag=True, help="Print warnings and notes of a sound stream too.")
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as one JSON object.")
@click.option("--strict", is_flag=True, help="Count warnings as errors.")
@click.option("--rules", "list_rules", is_flag=True, help="List the rules and exit.")
@timeout_option
@click.pass_context
def command(
    ctx: click.Context,
    file: str | None,
    quiet: bool,
    verbose: bool,
    as_json: bool,
    strict: bool,
    list_rules: bool,
    timeout_s: float | None,
) -> None:
    """Check a stream against the specification.

    Prints one line if the stream is sound, else each finding: rule, place, what was found. An error means
    that a restore refuses the stream or loses something; a warning, that it is against the specification
    but Xen's own restore takes it; a note is only worth knowing.

    Exit code: 0 sound, 1 not sound or unreadable, 2 wrong usage.
    """
    if list_rules:
        for rule in RULES.values():
            click.echo(f"{rule.id:26} {rule.severity:8} {rule.title} [{rule.reference}]")
        return
    if file is None:
        raise click.UsageError("Missing argument 'FILE|-'.", ctx)
    from migstream.verification import verify

    with reporting_errors(file):
        with open_stream(file, timeout_s) as stream:
            verdict = verify(stream)
        sound = verdict.sound(strict=strict)
        if as_json:
            import json

            click.echo(json.dumps(_json(verdict, sound), indent=2))
        elif not quiet:
            _print(verdict, file, sound=sound, verbose=verbose)
    if not sound:
        sys.exit(1)


def _json(verdict: Verdict, sound: bool) -> dict[str, object]:
    return {
        "schema": "migstream-verify-1",
        "sound": sound,
        "counts": {str(severity): verdict.count(severity) for severity in Severity},
        "findings": [finding.to_json() for finding in verdict.findings],
        "omitted": verdict.omitted,
    }


def _print(verdict: Verdict, file: str, *, sound: bool, verbose: bool) -> None:
    if verbose or not sound:
        for finding in verdict.findings:
            click.echo(f"{printable(str(finding))} [{finding.rule.reference}]")
        if verdict.omitted:
            click.echo(f"{verdict.omitted} more; of each rule the first {KEPT_PER_RULE} are shown")
    said = [
        f"{count} {severity}{'s' * (count != 1)}"
        for severity in Severity
        if (count := verdict.count(severity))
    ]
    hint = "; --verbose shows them" if sound and said and not verbose else ""
    counted = f" ({', '.join(said)}{hint})" if said else ""
    click.echo(f"{printable(file)}: {'sound' if sound else 'not sound'}{counted}")
