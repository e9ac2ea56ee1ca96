"""ORIGIN, migstream's own optional record: who does not know it passes over it."""

from __future__ import annotations

import struct

from spec.vectors.case import Case, case
from spec.vectors.words import CPUID, ENDED, MSR, PAGES, PV, STATIC, STATIC_END, TAIL, hvm, in_hvm, pv
from tests.build import record

ORIGIN = 0xCD53_0001


def origin(data: bytes = b"version\0007.2.0\0") -> bytes:
    """Return an ORIGIN: QEMU, one vCPU, 16 MiB of memory, all of it below 4 GiB; names and values."""
    return record(ORIGIN, struct.pack("<IIQQQ", 1, 1, 16 << 20, 16 << 20, 0) + data)


CASES: list[Case] = [
    case(
        "origin-hvm",
        "ORIGIN in the static data of an HVM image",
        hvm(origin(), CPUID, MSR, STATIC_END, PAGES, TAIL, ENDED),
        "sound",
        "",
        "accept",
    ),
    case(
        "origin-pv",
        "ORIGIN in the static data of a PV image",
        pv(origin(), PV.static(), PV.p2m_frames(), PV.memory(), PV.state(), ENDED),
        "sound",
        "",
        "accept",
        guest="pv",
    ),
    case(
        "origin-no-state",
        "ORIGIN, and no HVM_CONTEXT or HVM_PARAMS: the processors are in the emulator's state",
        hvm(origin(), STATIC, PAGES, ENDED),
        "sound",
        "",
        "accept",
    ),
    case(
        "origin-no-policies",
        "ORIGIN, and no CPUID or MSR policy: they are Xen's, so the restore does not ask for them",
        hvm(origin(), STATIC_END, PAGES, TAIL, ENDED),
        "sound",
        "static-data-missing",
        "accept",
    ),
    case(
        "origin-late",
        "ORIGIN behind STATIC_DATA_END",
        in_hvm(origin()),
        "sound",
        "layout-static-late",
        "accept",
    ),
    case(
        "origin-no-data",
        "ORIGIN without a name and value",
        hvm(origin(b""), STATIC, PAGES, TAIL, ENDED),
        "sound",
        "",
        "accept",
    ),
    case(
        "origin-short",
        "ORIGIN of 8 octets; libxenguest does not look, who knows the record refuses it",
        hvm(record(ORIGIN, bytes(8)), STATIC, PAGES, TAIL, ENDED),
        "unsound",
        "body-malformed",
        missing="never",
    ),
    case(
        "origin-no-pairs",
        "ORIGIN with a name and no value",
        hvm(origin(b"version\0"), STATIC, PAGES, TAIL, ENDED),
        "unsound",
        "body-malformed",
    ),
]
