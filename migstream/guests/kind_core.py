"""``core:FILE``: a core dump of Xen, to save from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from migstream.guests.kind import GuestKind, GuestSpec, Option
from migstream.guests.protocols import SaveSource
from migstream.records.libxc import GuestType

__all__ = ["KIND"]


@contextmanager
def _source(spec: GuestSpec, guest_type: GuestType) -> Iterator[SaveSource]:
    from migstream.guests.segments import SegmentSource
    from migstream.guests.xen_core import CoreFile

    with SegmentSource(
        spec.what, spec.guest_type(guest_type), lambda fd: CoreFile.open(fd).segments()
    ) as source:
        yield source


KIND = GuestKind(
    name="core",
    what="FILE",
    example="core:guest.core",
    help="a core dump of Xen, as xl dump-core writes it; PV page tables keep machine frames; to save from",
    source=_source,
    options=(Option("guest-type", "pv", "pv or hvm; default: as --guest-type says"),),
)
