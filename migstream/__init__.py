"""migstream: Xen migration streams, read, checked, built and run.

::

    import migstream

    with migstream.open("guest.xl") as stream:
        for frame in stream:
            print(frame.offset, frame.layer.name, frame.type_name, frame.length)

The public names are below. They are imported when first used, so ``import migstream`` costs next to
nothing; what is not here is found in the modules, which are public too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from migstream._version import __version__

if TYPE_CHECKING:
    from migstream.engines.common import Missing, StreamType
    from migstream.engines.restore import RestoreCallbacks, RestoreResult, restore
    from migstream.engines.save import SaveCallbacks, SaveResult, save
    from migstream.errors import (
        DeadlineError,
        FormatError,
        GuestError,
        MigstreamError,
        StreamError,
        TruncatedError,
    )
    from migstream.guests.image import ImageSource, ImageTarget
    from migstream.guests.model import ModelGuest
    from migstream.guests.protocols import RestoreTarget, SaveSource
    from migstream.inspection import Report, inspect
    from migstream.io.envelopes import EnvelopeWriter
    from migstream.io.reader import Frame, Layer, Segment, Stream, Trailer, open, open_memory
    from migstream.io.writer import StreamWriter, copy_stream
    from migstream.records import Array, OpaqueRecord, PageData, Record, array_of
    from migstream.verification import Finding, Verdict, verify

#: Public name -> the module it lives in.
_HOMES = {
    **dict.fromkeys(("Missing", "StreamType"), "engines.common"),
    **dict.fromkeys(
        ("DeadlineError", "FormatError", "GuestError", "MigstreamError", "StreamError", "TruncatedError"),
        "errors",
    ),
    **dict.fromkeys(("ImageSource", "ImageTarget"), "guests.image"),
    "ModelGuest": "guests.model",
    **dict.fromkeys(("RestoreTarget", "SaveSource"), "guests.protocols"),
    **dict.fromkeys(("Report", "inspect"), "inspection"),
    "EnvelopeWriter": "io.envelopes",
    **dict.fromkeys(("Frame", "Layer", "Segment", "Stream", "Trailer", "open", "open_memory"), "io.reader"),
    **dict.fromkeys(("StreamWriter", "copy_stream"), "io.writer"),
    **dict.fromkeys(("Array", "OpaqueRecord", "PageData", "Record", "array_of"), "records"),
    **dict.fromkeys(("RestoreCallbacks", "RestoreResult", "restore"), "engines.restore"),
    **dict.fromkeys(("SaveCallbacks", "SaveResult", "save"), "engines.save"),
    **dict.fromkeys(("Finding", "Verdict", "verify"), "verification"),
}

__all__ = [
    "Array",
    "DeadlineError",
    "EnvelopeWriter",
    "Finding",
    "FormatError",
    "Frame",
    "GuestError",
    "ImageSource",
    "ImageTarget",
    "Layer",
    "MigstreamError",
    "Missing",
    "ModelGuest",
    "OpaqueRecord",
    "PageData",
    "Record",
    "Report",
    "RestoreCallbacks",
    "RestoreResult",
    "RestoreTarget",
    "SaveCallbacks",
    "SaveResult",
    "SaveSource",
    "Segment",
    "Stream",
    "StreamError",
    "StreamType",
    "StreamWriter",
    "Trailer",
    "TruncatedError",
    "Verdict",
    "__version__",
    "array_of",
    "copy_stream",
    "inspect",
    "open",
    "open_memory",
    "restore",
    "save",
    "verify",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for (PEP 562)."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'migstream' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"migstream.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
