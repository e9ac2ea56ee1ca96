"""``migstream convert``: a stream in another envelope or version, flattened, with pages regrouped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from migstream.cli.common import (
    open_output,
    open_stream,
    refuse_same_file,
    reporting_errors,
    size_option,
    timeout_option,
)
from migstream.converting.options import MAX_BATCH, TARGETS, ConvertError, Options
from migstream.guests.registry import names_guest
from migstream.text import printable

if TYPE_CHECKING:
    from migstream.io.reader import Stream

MAX_CONFIG = 1 << 20  # octets; the reader takes no more either


@click.command(
    epilog="""\b
Examples:
  migstream convert old.libxc2 new.img --to libxc3
  migstream convert guest.xl guest.img --to libxc3
  migstream convert guest.img guest.xl --to xl --config guest.json
  migstream convert live.xl plain.xl --to xl --flatten --drop-zero
  migstream convert guest.xl guest.json --to json
  migstream convert guest.json guest.xl --to xl
  migstream convert raw:memory.bin guest.img --to libxc3
  migstream convert remus.xl.zst before.xl --to xl --checkpoint 7

Without --flatten every record passes as it is, in the order of the input, and what xl sent behind the
stream's end stays where the envelope does.
"""
)
@click.argument("source", metavar="IN")
@click.argument("out", metavar="OUT")
@click.option(
    "--to", "target", type=click.Choice(list(TARGETS)), required=True, help="The form of the output."
)
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="The domain's config for the envelope: JSON for xl, XML for libvirt. Default: the input's own.",
)
@click.option(
    "--flatten",
    is_flag=True,
    help="Write each page once, with its final content, in the order of PFNs. A live stream becomes a plain "
    "save, one with checkpoints the state at the last complete one.",
)
@click.option(
    "--checkpoint",
    type=click.IntRange(min=1),
    metavar="N",
    help="Write the state at the N-th checkpoint; implies --flatten.",
)
@click.option(
    "--drop-zero",
    is_flag=True,
    help="Turn ordinary pages without content into allocate-only entries: a restore gives zeroed memory for "
    "those. Page tables stay, and so does a page that replaces one sent before.",
)
@click.option(
    "--batch",
    type=click.IntRange(1, MAX_BATCH),
    metavar="N",
    help="Write PAGE_DATA records of N pages. Default: as in the input; with --flatten 1024.",
)
@click.option(
    "--inline",
    is_flag=True,
    help="Put pages into a JSON document as base64. Default: into OUT.pages beside it.",
)
@click.option("--lossy", is_flag=True, help="Leave out what the output's form cannot hold, and list it.")
@click.option(
    "--cpuid",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="A CPUID policy for a stream without one: JSON, with the fields that inspect --jsonl shows, or a "
    "stream to take it from.",
)
@click.option(
    "--msr",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="An MSR policy, likewise.",
)
@click.option(
    "--max-memory",
    metavar="SIZE",
    help="Refuse PFNs past this, such as 8G. Default: what the stream implies, else 64G.",
)
@timeout_option
def command(
    source: str,
    out: str,
    target: str,
    config: str | None,
    flatten: bool,
    checkpoint: int | None,
    drop_zero: bool,
    batch: int | None,
    inline: bool,
    lossy: bool,
    cpuid: str | None,
    msr: str | None,
    max_memory: str | None,
    timeout_s: float | None,
) -> None:
    """Write the stream IN (a file, '-' for standard input, or fd:N) to OUT in another form.

    IN may be a stream of any version in any envelope, JSON as this command writes it, or a memory image by
    its kind, such as raw:FILE or core:FILE ('migstream save --help' has all kinds).

    A file appears when it is complete; after an error or Ctrl-C there is none. The input is never changed.

    Exit code: 0 converted, 1 not, 2 wrong usage.
    """
    memory = size_option("--max-memory", max_memory)
    image = names_guest(source)
    file = source.partition(":")[2].partition(",")[0] if image else source
    refuse_same_file(file, out)
    beside = f"{out}.pages" if target == "json" and not inline else None
    if beside is not None:
        if out == "-" or out.startswith("fd:"):
            raise click.UsageError("a descriptor has no file beside it for JSON's pages: give --inline")
        refuse_same_file(file, beside)
    with reporting_errors(source):
        from migstream.converting import Bulk, convert
        from migstream.converting.static_data import read_policy
        from migstream.records import libxc

        options = Options(
            config=_read_config(config),
            flatten=flatten,
            checkpoint=checkpoint,
            drop_zero=drop_zero,
            batch=batch,
            lossy=lossy,
            cpuid=read_policy(cpuid, libxc.X86CpuidPolicy) if cpuid else None,
            msr=read_policy(msr, libxc.X86MsrPolicy) if msr else None,
            max_memory=memory,
        )
        with ExitStack() as stack:
            stream = stack.enter_context(_guest(source) if image else open_stream(source, timeout_s))
            fd = stack.enter_context(open_output(out))
            bulk = Bulk(stack.enter_context(open_output(beside)), Path(beside).name) if beside else None
            convert(stream, fd, TARGETS[target], options, bulk=bulk, beside=Path(source).parent, tell=_tell)


@contextmanager
def _guest(text: str) -> Iterator[Stream]:
    from migstream.converting.guest_source import from_guest
    from migstream.guests.kind import GuestSpecError

    try:
        with from_guest(text) as stream:
            yield stream
    except GuestSpecError as exc:
        raise click.UsageError(printable(str(exc))) from None


def _tell(note: str) -> None:
    click.echo(f"note: {printable(note)}", err=True)


def _read_config(path: str | None) -> bytes | None:
    if path is None:
        return None
    with Path(path).open("rb") as file:
        config = file.read(MAX_CONFIG + 1)
    if len(config) > MAX_CONFIG:
        raise ConvertError(f"{path} has more than {MAX_CONFIG} octets: it is no domain config")
    return config
