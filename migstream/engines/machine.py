"""Saving machines: a guest with an emulator becomes a libxl stream, any other a bare libxc image.

    libxl header, LIBXC_CONTEXT
    the libxc image, as `save` writes it
    EMULATOR_XENSTORE_DATA, EMULATOR_CONTEXT    behind a plain image, and (Remus) behind each CHECKPOINT
    END                                         CHECKPOINT_END, behind which the image goes on

Source: Xen's tools/libs/light/libxl_stream_write.c. Restore needs no counterpart: it unwraps a libxl stream
by itself, and hands the records to a target that is a `TakesEmulator`.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TypedDict, Unpack

from migstream.engines.channel import SendingChannel
from migstream.engines.common import StreamType
from migstream.engines.progress import Progress
from migstream.engines.save import SaveCallbacks, SaveResult, owning, save
from migstream.errors import GuestError
from migstream.guests.protocols import HasEmulator, SaveSource
from migstream.records import libxl

__all__ = ["SaveOptions", "save_machine"]


class SaveOptions(TypedDict, total=False):
    """The keywords of `save`, which says what they mean."""

    live: bool
    stream_type: StreamType
    callbacks: SaveCallbacks | None
    recv_fd: int | None
    debug: bool
    batch_size: int
    bandwidth_limit: float | None
    timeout_s: float | None
    xen_version: tuple[int, int]
    xen_back_channel: bool
    progress: Progress | None


def save_machine(source: SaveSource, fd: int, **options: Unpack[SaveOptions]) -> SaveResult:
    """Write ``source`` to the descriptor ``fd``: as a libxl stream if it is a `HasEmulator`, else as `save`.

    The result counts the whole stream; its downtime ends when the emulator's state is written. On any
    failure a guest that this save suspended is resumed. Raises as `save` does, and `GuestError` for COLO,
    whose secondary would have to take an emulator over at each checkpoint.
    """
    if not isinstance(source, HasEmulator):
        return save(source, fd, **options)
    stream_type = options.get("stream_type", StreamType.PLAIN)
    if stream_type is StreamType.COLO:
        raise GuestError(
            "a machine with an emulator cannot be COLO's primary: choose plain or remus as the stream type"
        )
    callbacks = options.get("callbacks") or SaveCallbacks()

    def end_checkpoint() -> int:
        channel.records([*source.emulator_records(), libxl.CheckpointEnd()])
        if callbacks.postcopy is not None:
            return callbacks.postcopy()
        source.resume()
        return 1

    wrapped: SaveOptions = {**options, "callbacks": replace(callbacks, postcopy=end_checkpoint)}
    with owning(source), SendingChannel(fd, timeout_s=options.get("timeout_s")) as channel:
        channel.header(libxl.LibxlHeader())
        channel.records([libxl.LibxcContext()])
        result = save(source, fd, **wrapped)
        image_done = time.monotonic()
        if not stream_type.checkpointed:
            channel.records([*source.emulator_records(), libxl.LibxlEnd()])
            emulator_s = time.monotonic() - image_done
            result.downtime_s += emulator_s
            result.seconds += emulator_s
        result.octets += channel.written
        return result
