"""``migstream receive``: the other end of ``migstream migrate SRC HOST:PORT``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING

import click

from migstream.cli.common import reporting_errors, timeout_option
from migstream.cli.save import telling_failure
from migstream.cli.transport_options import tls_options
from migstream.engines.progress import show
from migstream.errors import MigstreamError
from migstream.guests.kind import GuestSpecError
from migstream.guests.registry import describe, open_target, parse
from migstream.text import printable
from migstream.transport.address import listen, parse_address
from migstream.transport.errors import AddressError
from migstream.transport.tls import Tls

if TYPE_CHECKING:
    from migstream.engines.restore import RestoreResult
    from migstream.guests.protocols import RestoreTarget
    from migstream.records.libxc import GuestType
    from migstream.transport.receive import ReceiveResult


@click.command(
    epilog=f"""\b
Guests:
{describe()}

\b
Examples:
  migstream receive 7000 model:1G
  migstream receive 0.0.0.0:7000 raw:memory.bin --tls-cert me.pem --tls-key me.key --tls-ca ca.pem
  migstream receive unix:/run/guest.sock model:1G --timeout 30
  migstream receive 0 model:1G --json
"""
)
@click.argument("address", metavar="ADDRESS")
@click.argument("guest", metavar="GUEST")
@click.option("--paused", is_flag=True, help="Leave the guest paused, instead of letting it run.")
@timeout_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object an event, the last with the result.")
@tls_options
def command(
    tls: Tls | None,
    address: str,
    guest: str,
    paused: bool,
    timeout_s: float | None,
    as_json: bool,
) -> None:
    """Receive one migration at PORT, HOST:PORT or unix:PATH into GUEST.

    A PORT alone is one of this host's loopback address, which nobody else can reach; 0.0.0.0:PORT or
    [::]:PORT is open to all. Port 0 has the kernel choose one. Where it listens is written to standard
    error at once. Callers who bring no migration are ignored, and told of; the first one who brings one is
    taken, and nobody else. The guest runs when the sender has given it up.

    Exit code: 0 received, 1 not, and then nothing of it runs here; 2 wrong usage.
    """
    try:
        place = parse_address(address, listening=True)
        parse(guest)
    except (AddressError, GuestSpecError) as exc:
        raise click.UsageError(printable(str(exc))) from None
    with reporting_errors(address), telling_failure(sys.stdout if as_json else None):
        from migstream.engines.restore import restore
        from migstream.transport.receive import receive
        from migstream.transport.tls import load

        def tell(event: str, where: str, error: MigstreamError | None = None) -> None:
            reason = "" if error is None else f": {printable(str(error))}"
            click.echo(f"{event} {printable(where)}{reason}", err=True)
            if as_json:
                told = {"event": event, "address": where, "error": None if error is None else str(error)}
                print(json.dumps(told), flush=True)

        context = None if tls is None else load(tls, server=True)
        with (
            ExitStack() as opened,
            show(sys.stdout if as_json else sys.stderr, as_json=as_json) as progress,
        ):
            open_guest = _opener(guest, opened)
            listener, bound = opened.enter_context(listen(place))
            if tls is None and not bound.is_loopback:
                click.echo(
                    f"warning: whoever reaches {bound} can send a guest, unencrypted: consider --tls-cert, "
                    "--tls-key and --tls-ca",
                    err=True,
                )
            tell("listening", str(bound))

            def restore_into(target: RestoreTarget, fd: int) -> RestoreResult:
                return restore(target, fd, timeout_s=timeout_s, verify_fails=True, progress=progress)

            result = receive(
                listener,
                open_guest,
                restore_into,
                context=context,
                timeout_s=timeout_s,
                paused=paused,
                ignored=lambda peer, error: tell("ignored", peer, error),
                accepted=lambda peer: tell("accepted", peer),
            )
        _tell_result(result, as_json=as_json)


def _opener(guest: str, opened: ExitStack) -> Callable[[GuestType], AbstractContextManager[RestoreTarget]]:
    """Return what opens ``guest``, once the sender has said of which type it is.

    One whose type is known is opened at once: what is wrong with it is told now, and the sender waits less.
    """
    of_type = parse(guest).kind.guest_type
    if of_type is None:
        return lambda guest_type: open_target(guest, guest_type)
    target = opened.enter_context(open_target(guest, of_type))
    return lambda _: nullcontext(target)


def _tell_result(result: ReceiveResult, *, as_json: bool) -> None:
    from migstream.transport.messages import GuestState

    restored = result.restore
    if as_json:
        end = {
            "event": "result",
            "result": "received",
            "guest": result.state.name.lower(),
            "pages": restored.pages,
            "seconds": restored.seconds,
            "missing": [flag.name for flag in restored.missing],
            "warnings": restored.warnings + result.warnings,
            "error": None,
        }
        print(json.dumps(end))
        return
    state = {GuestState.COMPLETE: "is complete", GuestState.RUNNING: "runs", GuestState.PAUSED: "is paused"}
    click.echo(
        f"received {restored.pages} pages in {restored.seconds:.2f} s; the guest {state[result.state]}"
    )
    for warning in restored.warnings + result.warnings:
        click.echo(f"warning: {printable(warning)}", err=True)
