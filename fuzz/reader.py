"""The reader, inspect and verify on mutated streams: only the package's own errors may come out.

One execution takes a small stream, damages it in one to four places, and reads it. Everything follows from
the seed, so a finding is replayed by its number::

    python -m fuzz --seconds 60
    python -m fuzz --seed 7 --only 12345
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

from migstream.errors import StreamError
from migstream.inspection import Report, inspect
from migstream.io import reader
from migstream.verification import verify

__all__ = ["execute", "mutate", "seeds"]

INTERESTING = (0, 1, 7, 8, 9, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def _record(code: int, body: bytes = b"") -> bytes:
    return struct.pack("<II", code, len(body)) + body + bytes(-len(body) % 8)


def _image(guest: int, *records: bytes) -> bytes:
    headers = struct.pack(">QIIHHI", (1 << 64) - 1, 0x58454E46, 3, 0, 0, 0) + struct.pack(
        "<IHHII", guest, 12, 0, 4, 17
    )
    return headers + b"".join(records)


def seeds() -> list[bytes]:
    """Return small sound streams: HVM and PV images, a libxl stream in envelopes, a checkpointed one."""
    pages = _record(1, struct.pack("<II3Q", 3, 0, 0, 1, 0xF << 60 | 2) + bytes(2 * 4096))
    static = _record(0x11, struct.pack("<6I", 1, 2, 3, 4, 5, 6)) + _record(0x12, bytes(16)) + _record(0x10)
    params = _record(0x0A, struct.pack("<II4Q", 2, 0, 1, 5, 17, 6))
    tail = _record(8, bytes(24)) + params + _record(9, b"context")
    hvm = _image(2, static, pages, tail, _record(0))
    vcpu = b"".join(_record(code, struct.pack("<II", 0, 0) + bytes(16)) for code in (5, 6, 0x0C))
    pv_info = _record(2, struct.pack("<BB6x", 8, 4))
    p2m = _record(3, struct.pack("<II2Q", 0, 0x3FF, 1, 2))
    pv = _image(1, pv_info, static, p2m, pages, _record(8, bytes(24)), vcpu, _record(0))
    libxl_head = struct.pack(">QII", 0x4C6962786C466D74, 2, 0)
    emulator = _record(2, struct.pack("<II", 2, 0) + b"key\0value\0") + _record(
        3, struct.pack("<II", 2, 0) + b"QEVM"
    )
    libxl = libxl_head + _record(1) + hvm + emulator + _record(0)
    config = b'{"c_info": {"name": "guest"}}\0'
    data = struct.pack("<I", len(config)) + config
    xl = (
        b"Xen saved domain, xl format\n \0 \r"
        + struct.pack("<4I", 0x01020304, 3, 0, len(data))
        + data
        + libxl
    )
    checkpoint = _record(0x0E) + emulator + _record(4)
    remus = libxl_head + _record(1) + _image(2, static, pages, tail) + checkpoint + pages + tail + checkpoint
    libvirt = b"libvirt-xml\n \0 \r" + struct.pack("<II40x", 2, 10) + b"<domain/>\0" + libxl
    head, xenops = struct.Struct("<qq"), b"((time 0)(word_size 64))"
    xapi = b"XenSavedDomv2-\n" + head.pack(0x0F, len(xenops)) + xenops + head.pack(0xF0, 0) + hvm
    xapi += head.pack(0xF00, 4) + b"QEVM" + head.pack(0xFFFF, 0)
    legacy = struct.pack("<Qqq", 1024, -1, 0)
    xend = b"LinuxGuestRecord" + struct.pack(">i", 17) + b"(domain (name g))" + legacy
    return [hvm, pv, libxl, xl, remus, libvirt, xapi, xend]


def _flip(octets: bytearray, rng: random.Random) -> None:
    octets[rng.randrange(len(octets))] ^= 1 << rng.randrange(8)


def _number(octets: bytearray, rng: random.Random) -> None:
    """Put a boundary value where a header's or body's integer may lie, away from the pages as a rule."""
    at = rng.randrange(0, max(1, min(len(octets), 600) - 4), 4)
    octets[at : at + 4] = struct.pack("<I", rng.choice(INTERESTING))


def _cut(octets: bytearray, rng: random.Random) -> None:
    del octets[rng.randrange(len(octets)) :]


def _drop(octets: bytearray, rng: random.Random) -> None:
    at = rng.randrange(0, len(octets), 8)
    del octets[at : at + 8 * rng.randrange(1, 8)]


def _repeat(octets: bytearray, rng: random.Random) -> None:
    at, length = rng.randrange(0, len(octets), 8), 8 * rng.randrange(1, 16)
    octets[at:at] = octets[at : at + length]


def _noise(octets: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(octets))
    octets[at : at + 8] = rng.randbytes(8)


_MUTATIONS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _flip,
    _number,
    _number,
    _cut,
    _drop,
    _repeat,
    _noise,
)


def mutate(seed: int, number: int, corpus: list[bytes]) -> bytes:
    """Return execution ``number``'s stream."""
    rng = random.Random(f"{seed}/{number}")
    octets = bytearray(rng.choice(corpus))
    for _ in range(rng.randrange(1, 5)):
        if octets:
            rng.choice(_MUTATIONS)(octets, rng)
    return bytes(octets)


def execute(octets: bytes) -> bool:
    """Read ``octets`` in every way; return whether they verify sound.

    Raises whatever comes out that is not the package's own error, and `AssertionError` where inspect and
    verify disagree on whether the stream can be read to its end.
    """
    try:
        for frame in reader.open_memory(octets):
            frame.skip(min(frame.left or 0, 3))
    except StreamError:
        pass
    report = Report()
    for line in inspect(reader.open_memory(octets), report, count_zero=True):
        line.to_json()
        assert line.text is not None
    report.to_json()
    verdict = verify(reader.open_memory(octets))
    sound = verdict.sound()
    readable = report.error is None
    assert readable or not sound or "stream-ends-in-checkpoint" in verdict.counts, "sound, but not readable"
    return sound
