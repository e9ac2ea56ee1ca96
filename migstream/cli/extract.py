"""``migstream extract``: the memory of a stream as an image, and what else lies in it as files."""

from __future__ import annotations

import json
import sys
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
from migstream.text import printable, size

if TYPE_CHECKING:
    from migstream.extract import Extraction
    from migstream.page_index import PageIndex

FORMATS = ("raw", "elf", "xen-core", "lime")  # of extract.ImageFormat, which needs numpy
PAGE_TABLES = ("pfn", "omit")  # of extract.PageTables


@click.command(
    epilog="""\b
Formats:
  raw       page PFN at offset PFN * 4096 (with --pfn, from A on); what the guest lacks is a hole
  elf       a vmcore for crash, gdb and volatility3: program headers by PFN, registers as notes
  xen-core  what 'xl dump-core' writes; a PV guest's frames are its PFNs, as in its page tables
  lime      ranges of physical memory for volatility3 and others

\b
Examples:
  migstream extract guest.xl memory.raw
  migstream extract guest.xl vmcore --format elf
  migstream extract remus.xl.zst memory.lime --format lime --checkpoint 3
  migstream extract guest.xl pages.raw --pfn 0x100..0x1ff
  migstream extract guest.xl --device-model qemu.state --config guest.json
"""
)
@click.argument("source", metavar="IN")
@click.argument("out", metavar="[OUT]", required=False)
@click.option(
    "--format", "format_name", type=click.Choice(FORMATS), default="raw", show_default=True, help="See below."
)
@click.option("--pfn", "pfn_range", metavar="A..B", help="Only PFNs A to B, both included.")
@click.option(
    "--page-tables",
    type=click.Choice(PAGE_TABLES),
    default="pfn",
    show_default=True,
    help="A PV guest's page tables: with PFNs in them, as in the stream, or left out. (The machine frames "
    "that they had on the host are not in a stream.)",
)
@click.option(
    "--checkpoint",
    type=click.IntRange(min=1),
    metavar="N",
    help="The state at the N-th checkpoint. Default: at the end, or the last complete one.",
)
@click.option(
    "--max-memory",
    metavar="SIZE",
    help="Refuse pages past this, such as 128G. Default: what config or p2m say, else 64G.",
)
@click.option(
    "--partial", is_flag=True, help="Of a damaged stream, write what stands before the damage; exit code 1."
)
@click.option("--device-model", metavar="FILE", help="Write the device model's state (QEMU's) to FILE.")
@click.option(
    "--config", metavar="FILE", help="Write the config in the envelope (JSON, XML, S-expression) to FILE."
)
@click.option("--json", "as_json", is_flag=True, help="Say what was written as one JSON object.")
@timeout_option
def command(
    source: str,
    out: str | None,
    format_name: str,
    pfn_range: str | None,
    page_tables: str,
    checkpoint: int | None,
    max_memory: str | None,
    partial: bool,
    device_model: str | None,
    config: str | None,
    as_json: bool,
    timeout_s: float | None,
) -> None:
    """Write the memory in the stream IN to OUT as an image, and other contents to files.

    Of a live stream, each page as it was sent last; of one with checkpoints, as it was at the last complete
    one. Pages without content (ballooned, only allocated, broken) are left out and counted. IN may be '-',
    and compressed: then a copy of it is made in TMPDIR first. Files appear when they are complete.

    Exit code: 0 written, 1 not (or IN is damaged), 2 wrong usage.
    """
    if out is None and device_model is None and config is None:
        raise click.UsageError("nothing to write: give OUT, --device-model FILE or --config FILE")
    first, end = _pfns(pfn_range)
    limit = size_option("--max-memory", max_memory)
    for file in (out, device_model, config):
        if file is not None:
            refuse_same_file(source, file)
    tells = sys.stderr if out == "-" or not as_json else sys.stdout
    with reporting_errors(source):
        from migstream.extract import ImageFormat, PageTables, Selection, extract_memory
        from migstream.extract import device_model as device_model_of
        from migstream.io.seekable import seekable
        from migstream.page_index import PageIndex

        with open_stream(source, timeout_s) as stream, seekable(stream) as found:
            if found.spooled:
                click.echo("note: IN cannot be seeked; a copy of it was made first", err=True)
            index = PageIndex.of(found.stream, checkpoint=checkpoint, max_memory=limit, partial=partial)
            written = None
            if out is not None:
                chosen = Selection(first, end, PageTables(page_tables))
                with open_output(out) as fd:
                    written = extract_memory(found, index, fd, ImageFormat(format_name), chosen)
            if device_model is not None:
                _write(device_model, device_model_of(index))
            if config is not None:
                _write(config, _config(index))
            if as_json:
                print(json.dumps(_to_json(written, index)), file=tells)
            elif written is not None:
                _tell(written, index)
        if index.error is not None and partial:
            raise index.error


def _pfns(text: str | None) -> tuple[int, int | None]:
    """Return [first, end) of ``A..B``."""
    if text is None:
        return 0, None
    low, dots, high = text.partition("..")
    try:
        first, last = int(low, 0), int(high, 0)
    except ValueError:
        dots = ""
    if not dots or not 0 <= first <= last:
        raise click.BadParameter(
            f"{printable(text)}: expected A..B, two PFNs in ascending order, such as 0x100..0x1ff",
            param_hint="--pfn",
        )
    return first, last + 1


def _write(path: str, octets: bytes) -> None:
    from migstream.io.fd import write_vectors

    with open_output(path) as fd:
        write_vectors(fd, [octets])


def _config(index: PageIndex) -> bytes:
    from migstream.errors import FormatError
    from migstream.records import envelopes

    for layer in index.layers:
        if layer.config is not None:
            return layer.config.rstrip(b"\0")
    for record in index.around.values():
        if isinstance(record, envelopes.Xenops):
            return record.config
    raise FormatError("the input has no config: it is in no envelope, or in one without")


def _to_json(written: Extraction | None, index: PageIndex) -> dict[str, object]:
    memory = None if written is None else written.to_json()
    error = None if index.error is None else index.error.to_json()
    return {"memory": memory, "checkpoints": index.checkpoints, "void_octets": index.void, "error": error}


def _tell(written: Extraction, index: PageIndex) -> None:
    left_out = ", ".join(f"{count} {type.name}" for type, count in sorted(written.left_out.items()))
    lines = [f"{written.pages} pages ({size(written.pages * 4096)}); left out: {left_out or 'none'}"]
    if written.page_tables:
        lines.append(
            f"{written.page_tables} of them are page tables of a PV guest, with PFNs in their entries"
        )
    if written.vcpus:
        lines.append(f"registers of {written.vcpus} vCPU{'s' * (written.vcpus != 1)}")
    if index.checkpoints:
        lines.append(
            f"the state at checkpoint {index.checkpoints}; {index.void} octets behind it do not count"
        )
    for line in lines:
        click.echo(line, err=True)
