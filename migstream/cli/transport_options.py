"""Options of the commands that reach over a network: ``migrate`` and ``receive``."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import click

from migstream.text import printable
from migstream.transport.framing import DEFAULT_LEVEL, MAX_LEVEL
from migstream.transport.tls import Tls

__all__ = ["chunk_options", "tls_name_option", "tls_options"]

P = ParamSpec("P")
R = TypeVar("R")


def _level(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Take ``zstd`` or ``zstd:LEVEL``; return the level."""
    if value is None:
        return None
    match = re.fullmatch(r"zstd(?::(\d{1,2}))?", value, re.ASCII)
    level = int(match[1] or DEFAULT_LEVEL) if match else 0
    if not 1 <= level <= MAX_LEVEL:
        raise click.BadParameter(
            f"expected zstd, or zstd:LEVEL with 1 to {MAX_LEVEL}, found {printable(value)!r}; "
            "write --compress=zstd"
        )
    return level


def chunk_options(command: Callable[P, R]) -> Callable[P, R]:
    """Add ``--compress`` (as ``level``) and ``--checksum``."""
    compress = click.option(
        "--compress",
        "level",
        is_flag=False,
        flag_value="zstd",
        callback=_level,
        metavar="zstd[:LEVEL]",
        help="Compress on the way; a higher level is slower and smaller.",
    )
    checksum = click.option("--checksum", is_flag=True, help="Guard what is sent by CRC-32C.")
    return compress(checksum(command))


tls_name_option = click.option(
    "--tls-name",
    metavar="NAME",
    help="What the destination's certificate has to name. Default: the host in DST.",
)


def tls_options(command: Callable[Concatenate[Tls | None, P], R]) -> Callable[P, R]:
    """Add the options of TLS; ``command`` is given what they say as its first argument."""

    @functools.wraps(command)
    def with_tls(*args: P.args, **options: P.kwargs) -> R:
        files = {f"--tls-{name}": options.pop(f"tls_{name}") for name in ("cert", "key", "ca")}
        name = options.pop("tls_name", None)
        absent = [option for option, file in files.items() if file is None]
        if len(absent) == len(files):
            if name is not None:
                raise click.UsageError("--tls-name needs --tls-cert, --tls-key and --tls-ca")
            return command(None, *args, **options)
        if absent:
            raise click.UsageError(f"TLS needs {' and '.join(absent)} too: each end shows a certificate")
        certificate, key, authority = map(str, files.values())
        tls = Tls(certificate, key, authority, None if name is None else str(name))
        return command(tls, *args, **options)

    wrapped: Callable[P, R] = with_tls
    for option, help in (
        ("--tls-ca", "Encrypt; the other end's certificate has to come from this authority (PEM)."),
        ("--tls-key", "The key of --tls-cert (PEM, no password)."),
        ("--tls-cert", "This end's certificate, with the chain up to the authority (PEM)."),
    ):
        wrapped = click.option(option, metavar="FILE", help=help)(wrapped)
    return wrapped
