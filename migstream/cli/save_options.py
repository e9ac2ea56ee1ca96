"""Options of the commands that save: ``save`` and ``migrate``."""

from __future__ import annotations

import functools
import itertools
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import click

from migstream.engines.common import StreamType
from migstream.engines.policies import POLICIES, PrecopyPolicy, parse_policies
from migstream.guests.registry import describe

if TYPE_CHECKING:
    from migstream.engines.progress import Progress
    from migstream.engines.save import SaveCallbacks, SaveResult
    from migstream.guests.protocols import SaveSource
    from migstream.records.libxc import GuestType

__all__ = ["SaveSettings", "guest_and_policy_help", "save_options"]

DEFAULT_INTERVAL_MS = 200  # between checkpoints, as xl remus has it


def _bandwidth(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Octets a second, with a suffix K, M or G (powers of 1024)."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)", value, re.ASCII)
    if match is None or not float(match[1]):
        raise click.BadParameter(f"expected octets a second such as 100M, found {value!r}")
    return float(match[1]) * 1024.0 ** " KMG".index(match[2] or " ")


def _policy(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> PrecopyPolicy | None:
    if not value:
        return None
    try:
        return parse_policies(value)
    except ValueError as exc:
        raise click.BadParameter(str(exc)) from None


def _stream_type(ctx: click.Context, param: click.Parameter, value: str) -> StreamType:
    return StreamType(value)


def guest_and_policy_help() -> str:
    """Return the kinds of guest and the policies as paragraphs of help."""
    lines = [
        f"  {name + ('=' + policy.value if policy.value else ''):22} {policy.help}"
        for name, policy in POLICIES.items()
    ]
    return (
        f"\b\nGuests:\n{describe()}\n\n"
        "\b\nPolicies (of several, the first that decides counts):\n" + "\n".join(lines)
    )


def _guest_type(ctx: click.Context, param: click.Parameter, value: str) -> GuestType:
    from migstream.records.libxc import GuestType

    return GuestType[value.upper()]


@dataclass(frozen=True)
class SaveSettings:
    """What the options of a save say; each field has its option's name."""

    stream_type: StreamType
    policy: PrecopyPolicy | None
    checkpoints: int | None
    interval_ms: int
    bandwidth_limit: float | None
    batch_size: int
    timeout_s: float | None
    debug: bool
    as_json: bool
    guest_type: GuestType

    def open_source(self, name: str) -> AbstractContextManager[SaveSource]:
        """Return the guest called ``name``, to save from."""
        from migstream.guests.registry import open_source

        return open_source(name, self.guest_type)

    def save(
        self,
        source: SaveSource,
        fd: int,
        *,
        live: bool,
        progress: Progress,
        suspend: Callable[[], int] | None = None,
        recv_fd: int | None = None,
        xen_back_channel: bool = False,
    ) -> SaveResult:
        """Save ``source`` to ``fd``; the keywords are those of `engines.save.save`."""
        from migstream.engines.machine import save_machine

        return save_machine(
            source,
            fd,
            live=live,
            stream_type=self.stream_type,
            callbacks=self._callbacks(suspend),
            recv_fd=recv_fd,
            xen_back_channel=xen_back_channel,
            debug=self.debug,
            batch_size=self.batch_size,
            bandwidth_limit=self.bandwidth_limit,
            timeout_s=self.timeout_s,
            progress=progress,
        )

    def _callbacks(self, suspend: Callable[[], int] | None) -> SaveCallbacks:
        """Return callbacks that wait for the interval between checkpoints and end behind ``checkpoints``."""
        from migstream.engines.save import SaveCallbacks

        left = itertools.count() if self.checkpoints is None else iter(range(self.checkpoints - 1))

        def next_checkpoint() -> int:
            if next(left, None) is None:
                return 0
            time.sleep(self.interval_ms / 1000)
            return 1

        return SaveCallbacks(
            suspend=suspend,
            precopy_policy=self.policy,
            checkpoint=(lambda: 1) if self.stream_type is StreamType.COLO else next_checkpoint,
            wait_checkpoint=next_checkpoint,
        )


_OPTIONS = (
    click.option(
        "--type",
        "stream_type",
        type=click.Choice([t.value for t in StreamType]),
        default="plain",
        show_default=True,
        callback=_stream_type,
        help="remus and colo go on with checkpoints.",
    ),
    click.option(
        "--policy",
        multiple=True,
        callback=_policy,
        metavar="NAME=VALUE",
        help="When precopy ends; may be given several times. See below.",
    ),
    click.option(
        "--checkpoints",
        type=click.IntRange(min=1),
        metavar="N",
        help="End after N checkpoints. Default: go on until the receiver is gone.",
    ),
    click.option(
        "--interval",
        "interval_ms",
        type=click.IntRange(min=0),
        default=DEFAULT_INTERVAL_MS,
        show_default=True,
        metavar="MS",
        help="Time between checkpoints.",
    ),
    click.option(
        "--bandwidth",
        "bandwidth_limit",
        callback=_bandwidth,
        metavar="RATE",
        help="Send no more octets a second than this: 500K, 100M, 1.5G.",
    ),
    click.option(
        "--batch",
        "batch_size",
        type=click.IntRange(min=1, max=32_704),
        default=1024,
        show_default=True,
        metavar="PFNS",
        help="Pages a record.",
    ),
    click.option(
        "--timeout",
        "timeout_s",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        help="Give up when the other end does nothing for so long. Default: wait for ever.",
    ),
    click.option("--debug", is_flag=True, help="Send all memory twice, for the receiver to compare."),
    click.option("--json", "as_json", is_flag=True, help="One JSON object a pass, the last with the result."),
    click.option(
        "--guest-type",
        type=click.Choice(["hvm", "pv"]),
        default="hvm",
        show_default=True,
        callback=_guest_type,
        help="What the guest is, where its kind does not say.",
    ),
)

P = ParamSpec("P")
R = TypeVar("R")


def save_options(command: Callable[Concatenate[SaveSettings, P], R]) -> Callable[P, R]:
    """Add the options of a save; ``command`` is given them together, as its first argument."""
    names = [field.name for field in fields(SaveSettings)]

    @functools.wraps(command)
    def with_settings(*args: P.args, **options: P.kwargs) -> R:
        given: dict[str, Any] = {name: options.pop(name) for name in names}
        return command(SaveSettings(**given), *args, **options)

    wrapped: Callable[P, R] = with_settings
    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped
