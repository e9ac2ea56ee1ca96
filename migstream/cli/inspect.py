"""``migstream inspect``: what is in this stream?"""

from __future__ import annotations

import sys

import click

from migstream.cli.common import error_lines, input_argument, open_stream, reporting_errors, timeout_option


@click.command(
    epilog="""\b
Examples:
  migstream inspect guest.xl                  a summary
  migstream inspect --records guest.xl        every record with its offset and fields
  migstream inspect --json guest.xl | jq .static_data.missing
  ssh host xl save -p guest /dev/stdout | migstream inspect -
"""
)
@input_argument
@click.option("--records", "as_records", is_flag=True, help="One line for each record, with its offset.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object (its keys: spec/inspect.md).")
@click.option("--jsonl", "as_jsonl", is_flag=True, help="One JSON object for each record, then the summary.")
@click.option("--zero-pages", is_flag=True, help="Count the pages that are all zero; reads every page.")
@click.option("--config", "show_config", is_flag=True, help="Print the domain's config, and only that.")
@timeout_option
def command(
    file: str,
    as_records: bool,
    as_json: bool,
    as_jsonl: bool,
    zero_pages: bool,
    show_config: bool,
    timeout_s: float | None,
) -> None:
    """Show what is in a stream: layers, records, pages, passes, config.

    Nothing is judged here ('migstream verify' does that). Of a damaged stream everything up to the damage
    is shown, then the error. Files are seeked over, so a large one takes no longer than its records.

    Exit code: 0, or 1 if the stream is damaged or unreadable, 2 for wrong usage.
    """
    if as_records + as_json + as_jsonl + show_config > 1:
        raise click.UsageError("--records, --json, --jsonl and --config exclude each other")
    from migstream.inspection import Report, inspect

    report = Report()
    with reporting_errors(file):
        with open_stream(file, timeout_s) as stream:
            for line in inspect(stream, report, count_zero=zero_pages):
                if as_jsonl:
                    click.echo(_dumps(line.to_json()))
                elif as_records:
                    click.echo(
                        f"{line.index:6} {line.offset:12} {line.layer:5} {line.type:24} {line.length:9}  "
                        f"{line.text}".rstrip()
                    )
        if as_jsonl:
            click.echo(_dumps(report.to_json()))
        elif as_json:
            click.echo(_dumps(report.to_json(), indent=2))
        elif show_config:
            click.echo(_dumps(report.config, indent=2))
        elif not as_records:
            from migstream.cli.summary import summary

            for text in summary(report, file):
                click.echo(text)
        if report.error is not None:
            sys.stdout.flush()
            click.echo(f"migstream: {error_lines(report.error, file)}", err=True)
    if report.error is not None:
        sys.exit(1)


def _dumps(value: object, indent: int | None = None) -> str:
    import json

    return json.dumps(value, indent=indent)
