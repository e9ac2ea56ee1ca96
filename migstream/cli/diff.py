"""``migstream diff``: what tells two streams, or images, apart?"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from migstream.cli.common import fail, open_stream, size_option, timeout_option
from migstream.errors import MigstreamError
from migstream.text import printable

if TYPE_CHECKING:
    from migstream.diff import Guest, PageDifferences, Report

SHOWN = 12  # ranges of PFNs, of a kind, that are printed; --json has more


@click.command(
    epilog="""\b
A and B are streams, or memory images: raw:FILE, elf:FILE, core:FILE, lime:FILE.

\b
Examples:
  migstream diff before.xl after.xl
  migstream diff guest.xl raw:memory.img
  migstream diff --only-pages plain.xl core:guest.core
  migstream diff --json a.xl b.xl | jq .pages.changed.count
"""
)
@click.argument("a")
@click.argument("b")
@click.option("--no-pages", is_flag=True, help="Compare headers and records only.")
@click.option("--only-pages", is_flag=True, help="Compare memory only.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--max-memory", metavar="SIZE", help="Refuse pages past this. Default: as for extract.")
@timeout_option
def command(
    a: str,
    b: str,
    no_pages: bool,
    only_pages: bool,
    as_json: bool,
    max_memory: str | None,
    timeout_s: float | None,
) -> None:
    """Compare two streams or images: headers, records and their fields, then pages by PFN.

    Compared is what a restore would make of them: the last record of each kind and the last copy of each
    page. The same pages in other batches or more passes are no difference. Compressed streams are copied to
    TMPDIR first.

    Exit code: 0 equal, 1 different, 2 wrong usage or unreadable input.
    """
    if no_pages and only_pages:
        raise click.UsageError("--no-pages and --only-pages exclude each other")
    if a == b == "-":
        raise click.UsageError("only one of A and B can be standard input")
    limit = size_option("--max-memory", max_memory)
    with contextlib.ExitStack() as stack:
        sides = [stack.enter_context(_side(name, limit, timeout_s)) for name in (a, b)]
        if no_pages and not all(side.has_types for side in sides):
            raise click.UsageError("--no-pages: a memory image has nothing but pages")
        with _unreadable(f"{a}, {b}"):
            from migstream.diff import diff

            report = diff(*sides, records=not only_pages, pages=not no_pages)
    if as_json:
        click.echo(json.dumps(report.to_json()))
    else:
        for line in _lines(report):
            click.echo(line)
    sys.exit(0 if report.equal else 1)


@contextlib.contextmanager
def _unreadable(name: str) -> Iterator[None]:
    """Turn errors into a line and exit code 2."""
    try:
        yield
    except (OSError, MigstreamError) as exc:
        fail(exc, name)
        sys.exit(2)


@contextlib.contextmanager
def _side(name: str, max_memory: int | None, timeout_s: float | None) -> Iterator[Guest]:
    """Open a stream, or an image by its kind."""
    from migstream.guests.registry import MODULES, open_source

    with contextlib.ExitStack() as stack:
        with _unreadable(name):
            from migstream.diff import ImageSide, StreamSide
            from migstream.io.seekable import seekable

            side: Guest
            if name.partition(":")[0] in MODULES and not Path(name).exists():
                side = ImageSide(stack.enter_context(open_source(name)))
            else:
                stream = stack.enter_context(open_stream(name, timeout_s))
                side = StreamSide(stack.enter_context(seekable(stream)), max_memory=max_memory)
        yield side


def _lines(report: Report) -> Iterator[str]:
    for where, field, a, b in report.differences:
        what = printable(where if field is None else f"{where}, {field}")
        yield f"{what}: {_value(a)} | {_value(b)}"
    if report.memory:
        for part, what in (
            (report.changed, "changed"),
            (report.only_a, "only in A"),
            (report.only_b, "only in B"),
            (report.types, "of another type"),
        ):
            if part.count:
                yield f"pages {what}: {part.count}, PFN {_ranges(part)}"
        yield f"pages equal: {report.equal_pages}"
    yield "equal" if report.equal else "different"


def _value(text: str | None) -> str:
    return "absent" if text is None else printable(text)


def _ranges(part: PageDifferences) -> str:
    shown = [
        f"{first:#x}" if first == last else f"{first:#x}-{last:#x}" for first, last in part.ranges[:SHOWN]
    ]
    known = sum(last - first + 1 for first, last in part.ranges[:SHOWN])
    return " ".join(shown) + (f" and {part.count - known} more" if known < part.count else "")
