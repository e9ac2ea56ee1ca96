"""What mutation begins with: the conformance vectors, and a few streams that have more in them.

``python -m fuzz.corpus DIRECTORY`` writes them as files, for fuzzers that want a directory.
"""

from __future__ import annotations

import struct
import sys
from functools import cache
from pathlib import Path

from migstream.conformance import load_vectors
from migstream.fuzzing.tree import Record
from migstream.guests.machine_state import HvmPlaces, hvm_state
from migstream.io.detect import CODECS
from migstream.records import libxc
from migstream.records.legacy import is_legacy

__all__ = ["contexts", "legacy", "packed", "streams"]

LARGEST = 40 << 10  # octets of a stream to begin with: small ones are fast


@cache
def vectors() -> tuple[bytes, ...]:
    """Return the conformance vectors that are small, in order."""
    return tuple(vector.octets for vector in load_vectors() if 0 < len(vector.octets) <= LARGEST)


@cache
def packed() -> tuple[bytes, ...]:
    """Return those that are compressed."""
    return tuple(octets for octets in vectors() if octets.startswith(tuple(CODECS)))


@cache
def legacy() -> tuple[bytes, ...]:
    """Return bare legacy streams."""
    return tuple(octets for octets in vectors() if is_legacy(octets[:12]))


@cache
def streams() -> tuple[bytes, ...]:
    """Return all that are not compressed."""
    return tuple(octets for octets in vectors() if octets not in set(packed()))


@cache
def contexts() -> tuple[bytes, ...]:
    """Return images of nothing but an HVM context: a whole one of two processors, and a short one."""
    head = libxc.ImageHeader().build("big") + libxc.DomainHeader(type=2, xen_major=4, xen_minor=17).build()
    state = hvm_state(HvmPlaces(1, 2, 3, 4, 5), vcpus=2, seed=0, ticks=1)
    whole = next(record.build() for record in state if isinstance(record, libxc.HvmContext))
    short = struct.pack("<HHI", 2, 0, 952) + bytes(952) + struct.pack("<HHI", 0, 0, 0)
    code = libxc.HvmContext.code
    return tuple(head + Record.of("libxc", code, body).build() for body in (whole, short))


def main(directory: Path) -> None:
    """Write every stream of the corpus into ``directory``, by its number."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, octets in enumerate((*vectors(), *contexts())):
        (directory / f"{number:04}.stream").write_bytes(octets)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
