"""Streams in other envelopes and versions, flattened, with pages regrouped: `convert`.

::

    JSON, legacy stream --> a stream in a temporary file --+
    stream ------------------------------------------------+--> pass_through   as it comes
                                                           +--> flatten        one state, by PFN
                                                           +--> write_json     what is in it

The first two write through an `Envelope`, which makes the layers of the target around the records, and count
what the target cannot hold (`Losses`). Pages are moved within the kernel from where they lie.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from migstream.converting.json_source import from_json, is_json
from migstream.converting.json_target import Bulk, write_json
from migstream.converting.losses import Losses
from migstream.converting.options import TARGETS, ConvertError, Options, Target
from migstream.errors import FormatError, StreamError
from migstream.io.detect import layer_at
from migstream.io.inputs import FileInput
from migstream.io.reader import Frame, Stream
from migstream.io.seekable import seekable
from migstream.io.writer import StreamWriter
from migstream.records.legacy import SHAPE_LENGTH, is_legacy

__all__ = ["TARGETS", "Bulk", "ConvertError", "Options", "Target", "convert"]


def convert(
    stream: Stream,
    fd: int,
    target: Target,
    options: Options | None = None,
    *,
    bulk: Bulk | None = None,
    beside: Path | None = None,
    tell: Callable[[str], None] = lambda note: None,
) -> None:
    """Write ``stream``, of which nothing was read yet, to the descriptor ``fd`` in the form ``target``.

    An input that cannot be seeked, or is compressed, is copied to a temporary file first where pages are
    regrouped, or where it has to be known beforehand whether something would be lost; so is what a legacy
    stream or a JSON document becomes. Of JSON, ``bulk`` is where the output's pages go (``None``: into the
    document), and ``beside`` the directory where the input's pages lie (``None``: the working directory).
    ``tell`` is given notes for a person, one line each: what was left out and why.

    Raises `StreamError` with the place for a damaged input, `ConvertError` where the target cannot hold
    what the input has, and `OSError` of the descriptors. What was written by then is of no use.
    """
    options = options or Options()
    _check(target, options)
    with ExitStack() as stack:
        if is_json(stream.input):
            stream = stack.enter_context(from_json(stream.input, beside or Path()))
        if not target.layers:
            outermost = _outermost(stream)
            if options != Options() or outermost in _OLD:
                form = TARGETS.get(outermost) or _OLD.get(outermost, _IMAGE)
                stream = stack.enter_context(_changed(stream, form, options, tell))
            write_json(stream, fd, bulk)
            return
        conversion = _Conversion(fd, target, options, tell, stack)
        try:
            conversion.run(stream)
        except FormatError:
            if not conversion.walked or not conversion.walked.legacy:
                raise
            # Nothing was written yet: that starts with the first layer inside the envelope.
            from migstream.converting.legacy import from_legacy

            modern, options = stack.enter_context(from_legacy(conversion.walked, target, options, tell))
            _Conversion(fd, target, options, tell, stack).run(modern)


def _check(target: Target, options: Options) -> None:
    if options.policies and target.version == 2:
        raise ConvertError(f"{target.name} has no policy records: version 2 cannot hold what was given")
    if options.config is not None and target.layers[0] in ("libxl", "libxc"):
        raise ConvertError(f"{target.name} has no place for a config")


#: A bare image that keeps its version.
_IMAGE = Target("libxc", ("libxc",))
#: What holds a legacy stream, and the form that is made of it.
_OLD = {"legacy": TARGETS["libxl"], "xend": TARGETS["xl"], "xapi1": TARGETS["libxl"]}


def _outermost(stream: Stream) -> str:
    """Return the name of a stream's outermost layer, ``legacy``, or nothing for what is no stream."""
    try:
        return layer_at(stream.input)
    except StreamError:
        return "legacy" if is_legacy(stream.input.peek(SHAPE_LENGTH)) else ""


@contextmanager
def _changed(
    stream: Stream, target: Target, options: Options, tell: Callable[[str], None]
) -> Iterator[Stream]:
    """Give what ``options`` make of a stream, in the form ``target`` and a temporary file."""
    with tempfile.TemporaryFile() as spool:
        convert(stream, spool.fileno(), target, options, tell=tell)
        spool.seek(0)
        yield Stream(FileInput(spool.fileno(), owned=False))


class _Conversion:
    """One way through a conversion; ``walked`` is the stream that was read last."""

    def __init__(
        self, fd: int, target: Target, options: Options, tell: Callable[[str], None], stack: ExitStack
    ) -> None:
        self._writer = StreamWriter(fd)
        self._target = target
        self._options = options
        self._tell = tell
        self._stack = stack
        self.walked: Stream | None = None

    def run(self, stream: Stream) -> None:
        self.walked = stream
        asks_first = not self._options.lossy and self._may_lose(stream)
        if not (self._options.seeks or asks_first):
            self._pass_through(stream)
            return
        found = self._stack.enter_context(seekable(stream))
        if found.spooled:
            self._tell("the input was copied to a temporary file, as it is not read in sequence")
        self.walked = found.stream
        if self._options.flattens:
            from migstream.converting.flatten import flatten

            flatten(found.stream, self._writer, self._target, self._options, self._tell)
            return
        if asks_first:
            self._refuse_losses(found.stream)
            found.input.rewind()
        self._pass_through(Stream(found.input))

    def _pass_through(self, stream: Stream) -> None:
        from migstream.converting.passthrough import pass_through

        self.walked = stream
        pass_through(stream, self._writer, self._target, self._options, self._tell)

    def _may_lose(self, stream: Stream) -> bool:
        outermost = _outermost(stream)
        if outermost in ("", "legacy"):
            return False  # the walk says what is wrong; a legacy stream is made a new one first
        if outermost == "xapi" or self._target.version == 2:
            return True
        return "libxl" not in self._target.layers and outermost != "libxc"

    def _refuse_losses(self, stream: Stream) -> None:
        losses = Losses(self._target)
        for item in stream.items():
            if isinstance(item, Frame):
                losses.note_frame(item)
        losses.refuse()
