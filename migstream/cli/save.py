"""``migstream save``: a guest into a stream."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from migstream.cli.common import open_output, reporting_errors
from migstream.cli.save_options import SaveSettings, guest_and_policy_help, save_options
from migstream.engines.common import StreamType
from migstream.engines.progress import show
from migstream.errors import MigstreamError, StreamError
from migstream.text import printable

if TYPE_CHECKING:
    from migstream.engines.save import SaveResult


@click.command(
    epilog=f"""{guest_and_policy_help()}

\b
Examples:
  migstream save model:64M guest.img
  migstream save model:1G - --live --policy max-downtime=300ms,converge | migstream restore - model:1G
  migstream save raw:memory.bin guest.img
  migstream save model:64M fd:7 --type remus --checkpoints 10 7>&1 | migstream inspect -
"""
)
@click.argument("guest", metavar="GUEST")
@click.argument("out", metavar="OUT")
@click.option("--live", is_flag=True, help="Send memory while the guest runs; remus and colo always do.")
@save_options
@click.option("--back-channel", type=click.IntRange(min=0), metavar="FD", help="COLO's back channel.")
@click.option(
    "--xen-back-channel",
    is_flag=True,
    help="The secondary is Xen's own restore, whose dirty lists have 8 octets more than specified.",
)
def command(
    settings: SaveSettings,
    guest: str,
    out: str,
    live: bool,
    back_channel: int | None,
    xen_back_channel: bool,
) -> None:
    """Save GUEST as a migration stream to OUT: a file, '-' for standard output, or fd:N.

    The stream is a libxl stream if the guest has an emulator, as a QEMU machine has, else a libxc image. A
    file appears when it is complete; after an error or Ctrl-C there is none, and the guest runs on.
    Passes and the result go to standard output with --json, or to standard error where the stream
    takes the former.

    Exit code: 0 saved, 1 not, 2 wrong usage.
    """
    stream_type = settings.stream_type
    if stream_type is StreamType.COLO and back_channel is None:
        raise click.UsageError(
            "--type colo needs --back-channel FD, where the secondary's dirty lists come in"
        )
    if stream_type.checkpointed and settings.checkpoints is None and _is_file(out):
        raise click.UsageError(f"--type {stream_type.value} into a file needs --checkpoints N")
    as_json = settings.as_json
    tells = sys.stderr if out == "-" or not as_json else sys.stdout
    with reporting_errors(guest), telling_failure(tells if as_json else None):
        from migstream.engines.save import owning

        with (
            settings.open_source(guest) as source,
            owning(source),
            open_output(out, durable=True) as fd,
            show(tells, as_json=as_json) as progress,
        ):
            result = settings.save(
                source,
                fd,
                live=live,
                progress=progress,
                recv_fd=back_channel,
                xen_back_channel=xen_back_channel,
            )
        if as_json:
            end = {"event": "result", "result": "saved", **result.to_json(), "error": None}
            print(json.dumps(end), file=tells, flush=True)
        else:
            tell(result, err=True)


def tell(result: SaveResult, *, err: bool) -> None:
    """Print what a save did; ``err``: to standard error, because the stream may be on standard output."""
    done = f"saved {result.pages} pages, {result.octets / 1e6:,.1f} MB in {result.seconds:.2f} s"
    counts = {"precopy rounds": result.iterations, "checkpoints": result.checkpoints}
    done += "".join(f", {what}: {count}" for what, count in counts.items() if count)
    click.echo(f"{done}; the guest stood still for {1000 * result.downtime_s:,.0f} ms", err=err)
    for note in result.notes:
        click.echo(f"note: {printable(note)}", err=True)
    for warning in result.warnings:
        click.echo(f"warning: {printable(warning)}", err=True)


def _is_file(out: str) -> bool:
    return out != "-" and not out.startswith("fd:") and (not Path(out).exists() or Path(out).is_file())


@contextlib.contextmanager
def telling_failure(out: TextIO | None) -> Iterator[None]:
    """Write the last line of JSON when there is no result."""
    try:
        yield
    except (OSError, MigstreamError) as exc:
        if out is not None:
            located = exc if isinstance(exc, StreamError) else StreamError(str(exc))
            end = {"event": "result", "result": "failed", "error": located.to_json()}
            print(json.dumps(end), file=out, flush=True)
        raise
