"""``lime:FILE``: a LiME memory image, to save from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from migstream.guests.kind import GuestKind, GuestSpec, Option
from migstream.guests.protocols import SaveSource
from migstream.records.libxc import GuestType

__all__ = ["KIND"]


@contextmanager
def _source(spec: GuestSpec, guest_type: GuestType) -> Iterator[SaveSource]:
    from migstream.guests.lime import ranges
    from migstream.guests.segments import SegmentSource

    with SegmentSource(spec.what, spec.guest_type(guest_type), ranges) as source:
        yield source


KIND = GuestKind(
    name="lime",
    what="FILE",
    example="lime:memory.lime",
    help="a LiME memory image; to save from",
    source=_source,
    options=(Option("guest-type", "pv", "pv or hvm; default: as --guest-type says"),),
)
