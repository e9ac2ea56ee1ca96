"""``migstream migrate``: a guest into another, in this process or behind a network."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from migstream.cli.common import fail, reporting_errors
from migstream.cli.save import tell, telling_failure
from migstream.cli.save_options import SaveSettings, guest_and_policy_help, save_options
from migstream.cli.transport_options import chunk_options, tls_name_option, tls_options
from migstream.engines.common import CheckpointAction
from migstream.engines.progress import PassLog, show
from migstream.errors import UnsettledError
from migstream.guests.registry import names_guest
from migstream.text import printable
from migstream.transport.address import Address, parse_address
from migstream.transport.errors import AddressError
from migstream.transport.tls import Tls

if TYPE_CHECKING:
    from migstream.engines.restore import RestoreCallbacks, RestoreResult
    from migstream.engines.save import SaveResult
    from migstream.transport.send import SendResult

UNSETTLED = 3  # exit code: handed over, and no word that the guest runs


@click.command(
    epilog=f"""{guest_and_policy_help()}

\b
Examples:
  migstream migrate model:1G model:1G
  migstream migrate raw:memory.bin raw:copy.bin --stopped
  migstream migrate model:256M model:256M --type remus --checkpoints 5 --interval 50
  migstream migrate model:1G model:1G --tcp --bandwidth 125M --policy max-downtime=300ms --json
  migstream migrate model:1G 192.0.2.7:7000 --compress --checksum
  migstream migrate model:1G host.example:7000 --tls-cert me.pem --tls-key me.key --tls-ca ca.pem
  migstream migrate model:1G unix:/run/guest.sock
"""
)
@click.argument("source_name", metavar="SRC")
@click.argument("target_name", metavar="DST")
@click.option("--live/--stopped", default=True, help="Send memory while the guest runs, or not.")
@click.option("--tcp", "transport", flag_value="tcp", help="Between two guests here: by TCP (loopback).")
@click.option("--socket", "transport", flag_value="socket", help="Between two guests here: by a socket pair.")
@click.option("--pipe", "transport", flag_value="pipe", help="Between two guests here: by a pipe (default).")
@save_options
@chunk_options
@tls_options
@tls_name_option
def command(
    tls: Tls | None,
    settings: SaveSettings,
    source_name: str,
    target_name: str,
    live: bool,
    transport: str | None,
    level: int | None,
    checksum: bool,
) -> None:
    """Migrate SRC to DST: another guest, or 'migstream receive' at HOST:PORT or unix:PATH.

    SRC is a guest such as model:64M or raw:FILE; it runs meanwhile, unless told otherwise. Over a network
    it is given up only when it is complete at the destination. Between two guests here, a checkpointed
    migration ends as if the source had died behind its last checkpoint: DST fails over to it. (The
    secondary of colo stands still here, so its dirty lists are empty.)

    Exit code: 0 migrated; 1 not, and then SRC runs on; 2 wrong usage; 3 handed over, but it is not
    known whether the guest runs at the destination: SRC stays suspended.
    """
    if names_guest(target_name):
        if level is not None or checksum or tls is not None:
            raise click.UsageError("--compress, --checksum and --tls-... are for a DST behind a network")
        _migrate_here(settings, source_name, target_name, live=live, transport=transport or "pipe")
        return
    try:
        address = parse_address(target_name)
    except AddressError as exc:
        raise click.UsageError(f"DST: {printable(str(exc))}; or name a guest, such as model:64M") from None
    if transport is not None:
        raise click.UsageError(f"--{transport} is for two guests here; DST is a receiver")
    if settings.stream_type.checkpointed:
        raise click.UsageError(f"--type {settings.stream_type.value} needs a guest as DST, not a receiver")
    _migrate_there(settings, source_name, address, live=live, tls=tls, level=level, checksum=checksum)


@contextlib.contextmanager
def _telling_unsettled(what: str, *, as_json: bool) -> Iterator[None]:
    """End with an exit code of its own where the guest may run at the destination."""
    try:
        yield
    except UnsettledError as exc:
        if as_json:
            print(json.dumps({"event": "result", "result": "unsettled", "error": {"message": str(exc)}}))
        fail(exc, what)
        sys.exit(UNSETTLED)


# Between two hosts


def _migrate_there(
    settings: SaveSettings,
    source_name: str,
    address: Address,
    *,
    live: bool,
    tls: Tls | None,
    level: int | None,
    checksum: bool,
) -> None:
    as_json = settings.as_json
    tells = sys.stdout if as_json else sys.stderr
    what = f"{source_name} to {address}"
    with (
        reporting_errors(what),
        telling_failure(tells if as_json else None),
        _telling_unsettled(what, as_json=as_json),
    ):
        from migstream.transport.send import send

        with settings.open_source(source_name) as source, show(tells, as_json=as_json) as shown:
            progress = PassLog(shown)
            result = send(
                source,
                address,
                lambda fd, suspend: settings.save(source, fd, live=live, progress=progress, suspend=suspend),
                level=level,
                checksum=checksum,
                tls=tls,
                timeout_s=settings.timeout_s,
            )
        if as_json:
            passes = [report.to_json() for report in progress.reports]
            end = {"event": "result", "result": "migrated", "passes": passes, **_rates(progress)}
            print(json.dumps({**end, **result.to_json(), "error": None}))
        else:
            _tell_migration(result, progress, address)


def _rates(progress: PassLog) -> dict[str, float | None]:
    """Return octets a second: what all passes together sent, and what the guest dirtied last."""
    octets = sum(report.octets for report in progress.reports)
    seconds = sum(report.seconds for report in progress.reports)
    dirtied = [report.dirty_rate for report in progress.reports if report.dirty_rate is not None]
    return {
        "bandwidth": octets / seconds if seconds > 0 else None,
        "dirty_rate": dirtied[-1] if dirtied else None,
    }


def _tell_migration(result: SendResult, progress: PassLog, address: Address) -> None:
    click.echo(
        f"migrated {result.save.pages} pages in {len(progress.reports)} passes and {result.seconds:.2f} s: "
        f"{result.save.octets / 1e6:,.1f} MB of stream, {result.wire_octets / 1e6:,.1f} MB on the wire"
    )
    for report in progress.reports:
        rate = f", {report.bandwidth / 1e6:,.0f} MB/s" if report.bandwidth else ""
        dirtied = f", dirtied {report.dirty_rate / 1e6:,.1f} MB/s" if report.dirty_rate is not None else ""
        click.echo(
            f"  {report.kind} {report.number}: {report.pages} pages in {1000 * report.seconds:,.0f} ms"
            f"{rate}{dirtied}"
        )
    state = {"complete": "is complete", "running": "runs", "paused": "is paused"}[result.state.name.lower()]
    click.echo(
        f"the guest {state} at {printable(str(address))}; it stood still for "
        f"{1000 * result.downtime_s:,.0f} ms, and stays suspended here"
    )
    for note in result.save.notes:
        click.echo(f"note: {printable(note)}", err=True)
    for warning in result.warnings:
        click.echo(f"warning: {printable(warning)}", err=True)


# Between two guests here


def _migrate_here(
    settings: SaveSettings, source_name: str, target_name: str, *, live: bool, transport: str
) -> None:
    if settings.stream_type.checkpointed and settings.checkpoints is None:
        raise click.UsageError(f"--type {settings.stream_type.value} needs --checkpoints N here")
    as_json = settings.as_json
    tells = sys.stdout if as_json else sys.stderr
    what = f"{source_name} to {target_name}"
    with (
        reporting_errors(what),
        telling_failure(tells if as_json else None),
        _telling_unsettled(what, as_json=as_json),
    ):
        from migstream.engines.migrate import Transport, migrate
        from migstream.engines.restore import restore
        from migstream.engines.save import owning
        from migstream.guests.protocols import Starts
        from migstream.guests.registry import open_target

        with (
            settings.open_source(source_name) as source,
            owning(source),
            open_target(target_name, settings.guest_type) as target,
            show(tells, as_json=as_json) as progress,
        ):
            result = migrate(
                source,
                lambda fd, recv_fd: settings.save(source, fd, live=live, progress=progress, recv_fd=recv_fd),
                lambda fd, send_back_fd: restore(
                    target,
                    fd,
                    stream_type=settings.stream_type,
                    callbacks=_restore_callbacks(),
                    send_back_fd=send_back_fd,
                    timeout_s=settings.timeout_s,
                    verify_fails=settings.debug,
                ),
                transport=Transport(transport),
            )
            if isinstance(target, Starts):
                target.start()
        if as_json:
            _print_json(result.save, result.restore)
        else:
            _tell(result.save, result.restore)


def _restore_callbacks() -> RestoreCallbacks:
    from migstream.engines.restore import RestoreCallbacks

    def go_on() -> int:
        return CheckpointAction.CONTINUE

    return RestoreCallbacks(
        checkpoint=go_on,
        postcopy=go_on,
        wait_checkpoint=go_on,
        suspend=go_on,
        restore_results=lambda store_pfn, console_pfn: None,
    )


def _print_json(save: SaveResult, restore: RestoreResult) -> None:
    print(
        json.dumps(
            {
                "event": "result",
                "result": restore.result.value,
                "missing": [flag.name for flag in restore.missing],
                **save.to_json(),
                "pages": restore.pages,
                "warnings": save.warnings + restore.warnings,
                "error": None,
            }
        )
    )


def _tell(save: SaveResult, restore: RestoreResult) -> None:
    tell(save, err=False)
    click.echo(f"{restore.result.value.replace('_', ' ')}: {restore.pages} pages received")
    for warning in restore.warnings:
        click.echo(f"warning: {printable(warning)}", err=True)
