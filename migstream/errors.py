"""What goes wrong, and where: every error of the package.

An error about a stream carries its place (byte offset, layer, record, field) as attributes beside
the message, so that a program can act on it and a person can find it.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "DeadlineError",
    "FormatError",
    "GuestError",
    "MigstreamError",
    "RecordRef",
    "StreamError",
    "TruncatedError",
    "UnsettledError",
]


@dataclass(frozen=True)
class RecordRef:
    """Which record of a stream: its number over all layers, from 0, and its type's name."""

    index: int
    type: str

    def to_json(self) -> dict[str, int | str]:
        """Return ``{"index": ..., "type": ...}``."""
        return {"index": self.index, "type": self.type}


class MigstreamError(Exception):
    """Base of every error that the package raises on purpose."""


class StreamError(MigstreamError):
    """A stream is damaged, or is not what it has to be, at one place.

    ``offset`` is in bytes from the start of the input (of the unpacked data where the input is
    compressed); ``layer`` is an envelope's name, such as ``xl``, or ``libxl``, ``libxc``, ``legacy``;
    ``hint`` says what a user can do.
    """

    def __init__(
        self,
        message: str,
        *,
        offset: int | None = None,
        layer: str | None = None,
        record: RecordRef | None = None,
        field: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.offset = offset
        self.layer = layer
        self.record = record
        self.field = field
        self.hint = hint

    def located(
        self, *, base: int = 0, layer: str | None = None, record: RecordRef | None = None
    ) -> StreamError:
        """Fill in what the raiser could not know; ``base`` is where its offset 0 lies."""
        self.offset = base + (self.offset or 0)
        self.layer = self.layer or layer
        self.record = self.record or record
        return self

    def __str__(self) -> str:
        place = []
        if self.offset is not None:
            place.append(f"offset {self.offset} (0x{self.offset:x})")
        if self.layer is not None:
            place.append(f"layer {self.layer}")
        if self.record is not None:
            place.append(f"record {self.record.index} {self.record.type}")
        if self.field is not None:
            place.append(f"field {self.field}")
        text = f"{', '.join(place)}: {self.message}" if place else self.message
        return f"{text}; {self.hint}" if self.hint else text

    def to_json(self) -> dict[str, object]:
        """Return message, offset, layer, record, field and hint; absent ones are ``None``."""
        return {
            "message": self.message,
            "offset": self.offset,
            "layer": self.layer,
            "record": self.record.to_json() if self.record else None,
            "field": self.field,
            "hint": self.hint,
        }


class FormatError(StreamError):
    """The bytes are there, but do not have the form that this place needs."""


class TruncatedError(StreamError):
    """The input ends before what it announced; ``offset`` is where it ends."""


class GuestError(MigstreamError):
    """A guest could not do what an engine asked of it: no memory left, will not suspend, wrong type."""


class UnsettledError(MigstreamError):
    """Nobody knows whether a guest runs: it was told to start, and what became of that cannot be learned."""


class DeadlineError(MigstreamError):
    """A descriptor was neither readable nor writable within the time that the caller gave."""
