"""``raw:FILE``: a raw memory image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from migstream.guests.kind import GuestKind, GuestSpec, Option
from migstream.guests.protocols import PAGE_SIZE, RestoreTarget, SaveSource
from migstream.records.libxc import GuestType

__all__ = ["KIND"]

MAX_SIZE = 64 << 30  # octets that an image may grow to unless the user says otherwise


@contextmanager
def _source(spec: GuestSpec, guest_type: GuestType) -> Iterator[SaveSource]:
    from migstream.guests.image import Holes, ImageSource

    holes = spec.choice("holes", Holes.KEEP)
    with ImageSource(spec.what, spec.guest_type(guest_type), holes=holes) as source:
        yield source


@contextmanager
def _target(spec: GuestSpec, guest_type: GuestType) -> Iterator[RestoreTarget]:
    from migstream.guests.image import ImageTarget

    max_pages = spec.size("max", MAX_SIZE) // PAGE_SIZE
    with ImageTarget(spec.what, spec.guest_type(guest_type), max_pages=max_pages) as target:
        yield target


KIND = GuestKind(
    name="raw",
    what="FILE",
    example="raw:memory.img",
    help="a memory image: page PFN at offset PFN * 4096; a new one appears when it is complete",
    source=_source,
    target=_target,
    options=(
        Option("guest-type", "pv", "pv or hvm; default: as --guest-type says"),
        Option(
            "holes",
            "zero",
            "what a save leaves out: keep (nothing), file (holes of the file) or zero (zero pages)",
        ),
        Option("max", "8G", "size that a restored image may grow to; default 64G"),
    ),
)
