"""Streams in other envelopes and versions, flattened, with pages regrouped: `convert`.

    stream --> pass_through   record by record, in the input's order
          +--> flatten        one consistent state, each page once, in the order of PFNs

Both write through an `Envelope`, which makes the layers of the target around the records, and count
what the target cannot hold (`Losses`). Pages are moved within the kernel from where they lie.
"""

from __future__ import annotations

from collections.abc import Callable

from migstream.converting.losses import Losses
from migstream.converting.options import TARGETS, ConvertError, Options, Target
from migstream.converting.passthrough import pass_through
from migstream.io.detect import layer_at
from migstream.io.reader import Frame, Stream
from migstream.io.seekable import seekable
from migstream.io.writer import StreamWriter

__all__ = ["TARGETS", "ConvertError", "Options", "Target", "convert"]


def convert(
    stream: Stream,
    fd: int,
    target: Target,
    options: Options | None = None,
    *,
    tell: Callable[[str], None] = lambda note: None,
) -> None:
    """Write ``stream``, of which nothing was read yet, to the descriptor ``fd`` in the form ``target``.

    An input that cannot be seeked, or is compressed, is copied to a temporary file first where pages are
    regrouped, or where it has to be known beforehand whether something would be lost. ``tell`` is given
    notes for a person, one line each: what was left out and why.

    Raises `StreamError` with the place for a damaged input, `ConvertError` where the target cannot hold
    what the input has, and `OSError` of the descriptors. What was written by then is of no use.
    """
    options = options or Options()
    _check(target, options)
    asks_first = not options.lossy and _may_lose(stream, target)
    if not (options.seeks or asks_first):
        pass_through(stream, StreamWriter(fd), target, options, tell)
        return
    with seekable(stream) as found:
        if found.spooled:
            tell("the input was copied to a temporary file, as its pages are not read in sequence")
        if options.flattens:
            from migstream.converting.flatten import flatten

            flatten(found.stream, StreamWriter(fd), target, options, tell)
            return
        if asks_first:
            _refuse_losses(found.stream, target)
            found.input.rewind()
        pass_through(Stream(found.input), StreamWriter(fd), target, options, tell)


def _check(target: Target, options: Options) -> None:
    if options.policies and target.version == 2:
        raise ConvertError(f"{target.name} has no policy records: version 2 cannot hold what was given")
    if options.config is not None and target.layers[0] in ("libxl", "libxc"):
        raise ConvertError(f"{target.name} has no place for a config")


def _may_lose(stream: Stream, target: Target) -> bool:
    if target.version == 2:
        return True
    return "libxl" not in target.layers and layer_at(stream.input) != "libxc"


def _refuse_losses(stream: Stream, target: Target) -> None:
    losses = Losses(target)
    for item in stream.items():
        if isinstance(item, Frame):
            losses.note_frame(item)
    losses.refuse()
