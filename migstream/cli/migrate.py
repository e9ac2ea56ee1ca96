"""``migstream migrate``: a guest into another, both ends in one process."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from migstream.cli.common import reporting_errors
from migstream.cli.save import tell, telling_failure
from migstream.cli.save_options import guest_and_policy_help, guest_type_option, save_callbacks, save_options
from migstream.engines.common import CheckpointAction, StreamType
from migstream.engines.policies import PrecopyPolicy
from migstream.engines.progress import show
from migstream.text import printable

if TYPE_CHECKING:
    from migstream.engines.restore import RestoreCallbacks, RestoreResult
    from migstream.engines.save import SaveResult


@click.command(
    epilog=f"""{guest_and_policy_help()}

\b
Examples:
  migstream migrate model:1G model:1G
  migstream migrate raw:memory.bin raw:copy.bin --stopped
  migstream migrate model:256M model:256M --type remus --checkpoints 5 --interval 50
  migstream migrate model:1G model:1G --tcp --bandwidth 125M --policy max-downtime=300ms --json
"""
)
@click.argument("source_name", metavar="SRC")
@click.argument("target_name", metavar="DST")
@click.option("--live/--stopped", default=True, help="Send memory while the guest runs, or not.")
@click.option("--tcp", "transport", flag_value="tcp", help="Connect the ends by TCP (loopback).")
@click.option("--socket", "transport", flag_value="socket", help="Connect them by a socket pair.")
@click.option(
    "--pipe", "transport", flag_value="pipe", default="pipe", help="Connect them by a pipe (default)."
)
@save_options
@guest_type_option
def command(
    source_name: str,
    target_name: str,
    live: bool,
    transport: str,
    stream_type: StreamType,
    policy: PrecopyPolicy | None,
    checkpoints: int | None,
    interval_ms: int,
    bandwidth_limit: float | None,
    batch_size: int,
    timeout_s: float | None,
    debug: bool,
    as_json: bool,
    guest_type: str,
) -> None:
    """Migrate SRC to DST, two guests such as model:64M or raw:FILE, live unless told otherwise.

    A checkpointed migration ends as if the source had died behind its last checkpoint: DST fails over to
    it. (The secondary of colo stands still here, so its dirty lists are empty.)

    Exit code: 0 migrated, 1 not, and then SRC runs on; 2 wrong usage.
    """
    if stream_type.checkpointed and checkpoints is None:
        raise click.UsageError(f"--type {stream_type.value} needs --checkpoints N here")
    tells = sys.stdout if as_json else sys.stderr
    with (
        reporting_errors(f"{source_name} to {target_name}"),
        telling_failure(tells if as_json else None),
    ):
        from migstream.engines.migrate import Transport, migrate
        from migstream.engines.restore import restore
        from migstream.engines.save import save
        from migstream.guests.registry import open_source, open_target
        from migstream.records.libxc import GuestType

        kind = GuestType[guest_type.upper()]
        with (
            open_source(source_name, kind) as source,
            open_target(target_name, kind) as target,
            show(tells, as_json=as_json) as progress,
        ):
            result = migrate(
                source,
                lambda fd, recv_fd: save(
                    source,
                    fd,
                    live=live,
                    stream_type=stream_type,
                    callbacks=save_callbacks(stream_type, policy, checkpoints, interval_ms),
                    recv_fd=recv_fd,
                    debug=debug,
                    batch_size=batch_size,
                    bandwidth_limit=bandwidth_limit,
                    timeout_s=timeout_s,
                    progress=progress,
                ),
                lambda fd, send_back_fd: restore(
                    target,
                    fd,
                    stream_type=stream_type,
                    callbacks=_restore_callbacks(),
                    send_back_fd=send_back_fd,
                    timeout_s=timeout_s,
                    verify_fails=debug,
                ),
                transport=Transport(transport),
            )
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
