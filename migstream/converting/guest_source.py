"""Memory images as a source: ``raw:FILE``, ``core:FILE`` and the like, saved to a stream."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from migstream.engines.save import owning, save
from migstream.guests.registry import open_source
from migstream.io.inputs import FileInput
from migstream.io.reader import Stream

__all__ = ["from_guest"]


@contextmanager
def from_guest(text: str) -> Iterator[Stream]:
    """Give the stream that saving the guest ``text`` makes, a bare image in a temporary file.

    Raises `GuestSpecError` for options that are none, `GuestError`, `StreamError` and `OSError`.
    """
    with tempfile.TemporaryFile() as spool:
        with open_source(text) as source, owning(source):
            save(source, spool.fileno())
        spool.seek(0)
        yield Stream(FileInput(spool.fileno(), owned=False))
