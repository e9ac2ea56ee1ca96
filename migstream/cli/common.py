"""What the commands share: opening the input, printing errors, exit codes.

Exit codes: 0 fine, 1 the stream is at fault (or could not be read), 2 wrong usage (click's own),
130 interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from migstream.errors import MigstreamError
from migstream.text import printable

if TYPE_CHECKING:
    from migstream.io.reader import Stream

__all__ = [
    "error_lines",
    "fail",
    "input_argument",
    "open_output",
    "open_stream",
    "refuse_same_file",
    "reporting_errors",
    "size_option",
    "timeout_option",
]

STDIN, STDOUT = 0, 1
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

input_argument = click.argument("file", metavar="FILE|-")
timeout_option = click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Give up when a pipe or socket brings nothing for so long. Default: wait for ever.",
)


def open_stream(file: str, timeout_s: float | None = None) -> Stream:
    """Open FILE, ``-`` for standard input or ``fd:N``; `OSError` as it comes."""
    from migstream.io import reader

    if file == "-":
        if os.isatty(STDIN):
            raise click.UsageError("standard input is a terminal; give a FILE, or pipe a stream into '-'")
        return reader.open(STDIN, timeout_s=timeout_s)
    if file.startswith("fd:"):
        if not file[3:].isdigit():
            raise click.UsageError(
                f"{printable(file)}: expected fd:N with a descriptor's number, such as fd:3"
            )
        return reader.open(int(file[3:]), timeout_s=timeout_s)
    return reader.open(file, timeout_s=timeout_s)


@contextlib.contextmanager
def open_output(out: str, *, durable: bool = False) -> Iterator[int]:
    """Open what a stream is written to: ``-`` for standard output, ``fd:N``, or a new file.

    A file appears when the block ends without an error, ``durable`` on the disk. Where there is no room
    for it, the `OSError` names it.
    """
    if out == "-" and sys.stdout.isatty():
        raise click.UsageError(
            "standard output is a terminal; give a file, or pipe the stream into something"
        )
    if out == "-":
        yield STDOUT
    elif out.startswith("fd:"):
        if not out[3:].isdigit():
            raise click.UsageError(
                f"{printable(out)}: expected fd:N with a descriptor's number, such as fd:3"
            )
        yield int(out[3:])
    else:
        from migstream.io.outputs import new_file

        try:
            with new_file(out, durable=durable) as fd:
                yield fd
        except OSError as exc:
            if exc.errno in NO_ROOM and exc.filename is None:
                exc.filename = out
            raise


def refuse_same_file(source: str, out: str) -> None:
    """End with exit code 1 where input and output are one file: it would be read while it is written."""
    one, other = _identity(source, STDIN), _identity(out, STDOUT)
    if one is not None and one == other:
        fail(MigstreamError("input and output are the same file"), source)
        sys.exit(1)


def _identity(name: str, standard: int) -> tuple[int, int] | None:
    """Return device and inode of a regular file or block device, ``None`` for anything else."""
    try:
        if name == "-":
            found = os.fstat(standard)
        elif name.startswith("fd:") and name[3:].isdigit():
            found = os.fstat(int(name[3:]))
        else:
            found = os.stat(name)
    except OSError:
        return None
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISBLK(found.st_mode)):
        return None
    return found.st_dev, found.st_ino


def size_option(name: str, text: str | None, example: str = "8G") -> int | None:
    """Return the octets that the value of option ``name`` says, such as 8G; usage error where it is none."""
    from migstream.guests.kind import GuestSpecError, parse_size

    try:
        return None if text is None else parse_size(text, example)
    except GuestSpecError as exc:
        raise click.BadParameter(printable(str(exc)), param_hint=name) from None


def error_lines(error: BaseException, file: str) -> str:
    """Return an error as it is shown: where, what, and what to do."""
    if isinstance(error, OSError):
        if isinstance(error.filename, str):
            file = error.filename  # which may be the output, or a config, not what the caller names
        return f"{printable(file)}: {error.strerror or error}"
    return f"{printable(file)}: {printable(str(error))}"


def fail(error: BaseException, file: str) -> None:
    """Print an error to standard error."""
    click.echo(f"migstream: {error_lines(error, file)}", err=True)


@contextlib.contextmanager
def reporting_errors(file: str) -> Iterator[None]:
    """Turn errors into one line and exit code 1; a closed output pipe ends quietly."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has seen enough; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (OSError, MigstreamError) as exc:
        fail(exc, file)
        sys.exit(1)
