"""Legacy (version 1) streams as a source: made version 3 in a temporary file, then as any other."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from migstream.converting.envelope import holding_libxl
from migstream.converting.options import ConvertError, Options, Target
from migstream.io.inputs import FileInput, Input
from migstream.io.reader import Layer, Stream
from migstream.io.writer import StreamWriter
from migstream.legacy import convert_legacy
from migstream.records import envelopes
from migstream.sexpr import parse, to_xl_config

__all__ = ["from_legacy"]


@contextmanager
def from_legacy(
    met: Stream, target: Target, options: Options, tell: Callable[[str], None]
) -> Iterator[tuple[Stream, Options]]:
    """Give what the legacy stream that ``met`` came upon becomes, and the options that are left to apply.

    It is a libxl stream, in the input's own envelope where that can hold one, in a temporary file. xend's
    config becomes xl's. Raises `StreamError`, and `ConvertError` for losses.
    """
    with tempfile.TemporaryFile() as spool:
        options = _spooled(met, StreamWriter(spool.fileno()), target, options, tell)
        spool.seek(0)
        yield Stream(FileInput(spool.fileno(), owned=False)), options


def _spooled(
    met: Stream, writer: StreamWriter, target: Target, options: Options, tell: Callable[[str], None]
) -> Options:
    outer = met.layers[0] if met.layers else None
    if outer is not None and outer.name in ("xl", "libvirt"):
        writer.order = outer.order
        writer.header(*map(holding_libxl, outer.headers))
    segments = outer is not None and outer.name == "xapi"  # one of them is QEMU's
    report = convert_legacy(met.input, writer, static_records=options.policies, device_model=not segments)
    losses = list(report.losses)
    config = options.config
    if outer is not None and outer.name == "xend" and target.name == "xl" and config is None:
        config = _xl_config(outer, losses)
    losses += _behind(met.input, segments=segments)
    if losses and not options.lossy:
        listed = "; ".join(losses)
        raise ConvertError(
            f"{target.name} cannot hold {listed}. Nothing was written; --lossy leaves them out"
        )
    tell(f"the input is a legacy stream: {report.guest.name}, from a {8 * report.word_size}-bit toolstack")
    for loss in losses:
        tell(f"lost: {loss}")
    for warning in report.warnings:
        tell(warning)
    if report.missing:
        tell(f"the stream has no {' and no '.join(report.missing)} policy; --cpuid and --msr can give them")
    return replace(options, config=config, cpuid=None, msr=None)


def _xl_config(outer: Layer, losses: list[str]) -> bytes:
    """Return xend's config as xl's JSON; what has no place in it is added to ``losses``."""
    assert outer.config is not None
    lost: list[str] = []
    config = json.dumps(to_xl_config(parse(outer.config), lost), indent=4)
    losses += [f"{place} of xend's config" for place in lost]
    return config.encode()


def _behind(source: Input, *, segments: bool) -> Iterator[str]:
    """Yield a line if more follows the stream than the end of xapi's image."""
    head = source.peek(envelopes.SegmentHeader.head_size)
    if segments and len(head) == envelopes.SegmentHeader.head_size:
        code = envelopes.SegmentHeader.parse(head, "little").type
        if code == envelopes.EndOfImage.code:
            return
    if head:
        yield f"what follows the legacy stream, from offset {source.position} on"
