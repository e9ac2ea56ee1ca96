"""``elf:FILE``: an ELF core, such as a vmcore, to save from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from migstream.guests.kind import GuestKind, GuestSpec, Option
from migstream.guests.protocols import SaveSource
from migstream.records.libxc import GuestType

__all__ = ["KIND"]


@contextmanager
def _source(spec: GuestSpec, guest_type: GuestType) -> Iterator[SaveSource]:
    from migstream.guests.elf import ElfFile
    from migstream.guests.segments import SegmentSource

    with SegmentSource(
        spec.what, spec.guest_type(guest_type), lambda fd: ElfFile.open(fd).load_segments()
    ) as source:
        yield source


KIND = GuestKind(
    name="elf",
    what="FILE",
    example="elf:vmcore",
    help="an ELF core with program headers (a vmcore): page PFN at physical address PFN * 4096; to save from",
    source=_source,
    options=(Option("guest-type", "pv", "pv or hvm; default: as --guest-type says"),),
)
