"""``process:PID``: the memory of a running process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from migstream.guests.kind import GuestKind, GuestSpec, GuestSpecError, Option
from migstream.guests.protocols import SaveSource
from migstream.records.libxc import GuestType

if TYPE_CHECKING:
    from migstream.guests.process.mappings import Selection

__all__ = ["KIND"]

BOUNDS = re.compile(r"(?:0x)?([0-9a-fA-F]{1,16})-(?:0x)?([0-9a-fA-F]{1,16})")


@contextmanager
def _source(spec: GuestSpec, guest_type: GuestType) -> Iterator[SaveSource]:
    from migstream.guests.process.handover import fetch
    from migstream.guests.process.source import ProcessSource

    if not (spec.what.isascii() and spec.what.isdigit() and 0 < int(spec.what) < 1 << 31):
        raise GuestSpecError(f"{spec.what!r} is no process number; write one, such as {KIND.example}")
    if guest_type is GuestType.PV:
        raise GuestSpecError("a process is no PV guest: its stream is an HVM image; leave --guest-type out")
    select = _selection(spec)
    uffd = fetch(spec.options["handover"]) if "handover" in spec.options else None
    with ProcessSource(int(spec.what), select, uffd=uffd) as source:
        yield source


def _selection(spec: GuestSpec) -> Selection:
    from migstream.guests.process.mappings import everything_writable, named, spans

    if "range" in spec.options and "mapping" in spec.options:
        raise GuestSpecError("give either range= or mapping=, not both")
    if "mapping" in spec.options:
        return named(spec.options["mapping"])
    if "range" in spec.options:
        return spans(_bounds(spec.options["range"]))
    return everything_writable


def _bounds(text: str) -> list[tuple[int, int]]:
    """Return the ranges that ``text`` lists, ascending. Raises `GuestSpecError`."""
    found = []
    for part in text.split("+"):
        match = BOUNDS.fullmatch(part)
        if match is None:
            raise GuestSpecError(
                f"range={text} names no memory; write hexadecimal bounds as in /proc/PID/maps, such as "
                f"range={RANGE_EXAMPLE}"
            )
        found.append((int(match[1], 16), int(match[2], 16)))
    found.sort()
    reached = 0
    for start, end in found:
        if start % 4096 or end % 4096 or not reached <= start < end:
            raise GuestSpecError(
                f"range={text}: each range has to be whole pages (bounds end in 000), its start before its "
                "end, and none may overlap another"
            )
        reached = end
    return found


RANGE_EXAMPLE = "7f1200000000-7f1240000000"

KIND = GuestKind(
    name="process",
    what="PID",
    example="process:4711",
    help="memory of a process, numbered from PFN 0 by address without gaps; to save from",
    source=_source,
    options=(
        Option("range", RANGE_EXAMPLE, "what of it, bounds as in /proc/PID/maps, more of them after '+'"),
        Option("mapping", "[heap]", "or the writable mappings of that name; default: all that is writable"),
        Option("handover", "/run/app.sock", "where the process hands its userfaultfd to whoever connects"),
    ),
)
