"""``migstream restore``: a stream into a guest."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from migstream.cli.common import fail, open_stream, reporting_errors, timeout_option
from migstream.engines.common import StreamType
from migstream.engines.progress import show
from migstream.errors import MigstreamError, StreamError
from migstream.text import printable

if TYPE_CHECKING:
    from migstream.engines.restore import RestoreCallbacks, RestoreResult


@click.command(
    epilog="""\b
Examples:
  migstream restore guest.img model:64M
  migstream restore save.xl.zst raw:memory.bin
  migstream save model:1G - --live | migstream restore - model:1G
  migstream restore fd:7 model:64M --type remus --json 7<&0
  migstream restore guest.img qemu:guest.qmp --paused

GUEST is made from what the stream holds: model:SIZE a machine in memory, which is gone afterwards;
raw:FILE a file with its memory; qemu:SOCKET a QEMU machine that waits for it, which then runs. IN may be
an xl save file, a libxl stream or a bare libxc image. Behind the stream's last record nothing is read from
a pipe.
"""
)
@click.argument("source", metavar="IN")
@click.argument("guest", metavar="GUEST")
@click.option(
    "--type",
    "stream_type",
    type=click.Choice([t.value for t in StreamType]),
    default="plain",
    show_default=True,
    help="remus and colo streams hold checkpoints; when the sender is gone, the last complete one counts.",
)
@click.option(
    "--guest-type",
    type=click.Choice(["hvm", "pv"]),
    help="What the guest has to be; a stream of the other type is refused. Default: what the stream is.",
)
@click.option(
    "--back-channel",
    type=click.IntRange(min=0),
    metavar="FD",
    help="Where COLO's lists of dirty pages go.",
)
@click.option(
    "--verify-fails", is_flag=True, help="Fail if pages that were sent again to verify them differ."
)
@click.option(
    "--reset-rings",
    is_flag=True,
    help="Empty the pages that the guest shares with its host, as Xen does. Default: memory as saved.",
)
@click.option("--paused", is_flag=True, help="Leave a guest that could run paused, instead of starting it.")
@timeout_option
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object a pass and checkpoint, the last with the result."
)
def command(
    source: str,
    guest: str,
    stream_type: str,
    guest_type: str | None,
    back_channel: int | None,
    verify_fails: bool,
    reset_rings: bool,
    paused: bool,
    timeout_s: float | None,
    as_json: bool,
) -> None:
    """Restore the stream IN (a file, '-' for standard input, or fd:N) into GUEST.

    Every check is Xen's own. A stream that breaks off is an error, unless it has checkpoints: then the
    guest is restored from the last one (result: failed_over).

    Exit code: 0 restored or failed over, 1 neither, 2 wrong usage.
    """
    kind = StreamType(stream_type)
    if kind is StreamType.COLO and back_channel is None:
        raise click.UsageError("--type colo needs --back-channel FD, where lists of dirty pages go")
    from migstream.engines.restore import RestoreResult, read_guest_type, restore
    from migstream.guests.kind import GuestSpecError
    from migstream.guests.protocols import Starts
    from migstream.guests.registry import open_target, parse
    from migstream.records.libxc import GuestType

    result = RestoreResult()
    with reporting_errors(source):
        try:
            parse(guest)  # a wrong name is told before anything is read
            with open_stream(source, timeout_s) as stream:
                of_type = GuestType[guest_type.upper()] if guest_type else read_guest_type(stream)
                with (
                    open_target(guest, of_type) as target,
                    show(sys.stdout if as_json else sys.stderr, as_json=as_json) as progress,
                ):
                    restore(
                        target,
                        stream,
                        stream_type=kind,
                        callbacks=_callbacks(result, as_json=as_json),
                        send_back_fd=back_channel,
                        timeout_s=timeout_s,
                        verify_fails=verify_fails,
                        reset_rings=reset_rings,
                        progress=progress,
                        result=result,
                    )
                    if isinstance(target, Starts) and not paused:
                        target.start()
        except GuestSpecError as exc:
            raise click.UsageError(printable(str(exc))) from None
        except (OSError, MigstreamError) as exc:
            if not as_json:
                raise
            print(json.dumps(_as_json(result, exc)), flush=True)
            fail(exc, source)
            sys.exit(1)
        if as_json:
            print(json.dumps(_as_json(result, None)))
        else:
            _tell(result)


def _callbacks(result: RestoreResult, *, as_json: bool) -> RestoreCallbacks:
    """Return callbacks that go on with everything; nobody runs the guest meanwhile."""
    from migstream.engines.restore import RestoreCallbacks

    def checkpoint() -> int:
        if as_json:
            print(json.dumps({"event": "checkpoint", "number": result.checkpoints + 1}), flush=True)
        return 1

    return RestoreCallbacks(
        checkpoint=checkpoint,
        postcopy=lambda: 1,
        wait_checkpoint=lambda: 1,
        suspend=lambda: 1,
        restore_results=lambda store, console: None,
    )


def _as_json(result: RestoreResult, error: OSError | MigstreamError | None) -> dict[str, object]:
    located = error if isinstance(error, StreamError) or error is None else StreamError(str(error))
    return {
        "event": "result",
        "result": result.result.value if error is None else "failed",
        "missing": [flag.name for flag in result.missing],
        "checkpoints": result.checkpoints,
        "pages": result.pages,
        "seconds": result.seconds,
        "store_pfn": result.store_pfn,
        "console_pfn": result.console_pfn,
        "verify_mismatches": result.verify_mismatch_count,
        "failover_reason": result.failover_reason,
        "warnings": result.warnings,
        "error": None if located is None else located.to_json(),
    }


def _tell(result: RestoreResult) -> None:
    from migstream.engines.restore import Outcome

    rate = result.pages * 4096 / 1e6 / result.seconds if result.seconds > 0 else 0.0
    checkpoints = f", {result.checkpoints} checkpoints" if result.checkpoints else ""
    click.echo(f"restored {result.pages} pages in {result.seconds:.2f} s, {rate:,.0f} MB/s{checkpoints}")
    if result.result is Outcome.FAILED_OVER:
        click.echo(
            f"failed over to checkpoint {result.checkpoints}: {printable(str(result.failover_reason))}"
        )
    if result.missing:
        missing = " and ".join(str(flag.name) for flag in result.missing)
        click.echo(f"the stream has no {missing} policy; the host has to make one up")
    if result.verify_mismatch_count:
        first = ", ".join(f"{pfn:#x}" for pfn in result.verify_mismatches[:8].tolist())
        click.echo(f"{result.verify_mismatch_count} pages differ from what was sent to verify them: {first}")
    for warning in result.warnings:
        click.echo(f"warning: {printable(warning)}", err=True)
