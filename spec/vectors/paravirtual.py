"""PV images: what holds a PV guest together, and its records at their boundaries."""

from __future__ import annotations

import struct
from collections.abc import Callable

from spec.vectors.case import Case, case
from spec.vectors.errata import ERRATA
from spec.vectors.words import (
    BROKEN,
    ENDED,
    L1TAB,
    L2TAB,
    L3TAB,
    L4TAB,
    PIN,
    PV,
    SHARED_INFO,
    STATIC,
    TSC,
    VCPU_BASIC,
    VCPU_MSRS,
    VCPU_XSAVE,
    XALLOC,
    XTAB,
    PvGuest,
    entries,
    entry,
    in_pv,
    p2m_frames,
    pv,
    pv_info,
    vcpu,
)
from tests.build import VCPU_EXTENDED, X86_PV_INFO, X86_PV_P2M_FRAMES, page, record

OUT_OF_RANGE, UNPOPULATED, TABLE = 0x270F, 20, 6  # PFNs above the guest's last, without memory, an L3 table


def refused(name: str, description: str, octets: bytes, rules: str = "", *, told: bool = True) -> Case:
    """Return a case that a restore refuses; verify finds it unsound where it breaks a rule."""
    return case(
        name,
        description,
        octets,
        "unsound" if rules else "sound",
        rules,
        "refuse",
        missing="" if told else "never",
        guest="pv",
    )


def taken(name: str, description: str, octets: bytes, rules: str = "", reference: str | None = None) -> Case:
    """Return a case that a restore takes."""
    return case(name, description, octets, "sound", rules, "accept", guest="pv", reference=reference)


def with_info(info: bytes) -> bytes:
    """Return an image with another X86_PV_INFO."""
    return pv(info, STATIC, PV.p2m_frames(), PV.memory(), PV.state(), ENDED)


def with_p2m(*records: bytes, guest: PvGuest = PV) -> bytes:
    """Return an image with other X86_PV_P2M_FRAMES."""
    return pv(guest.static(), *records, guest.memory(), guest.state(), ENDED)


def with_state(*records: bytes) -> bytes:
    """Return an image with another state."""
    return pv(PV.static(), PV.p2m_frames(), PV.memory(), *records, ENDED)


#: What refers to a PFN: part of the case's name, the guest that refers to ``pfn``, in words.
_REFERRED: tuple[tuple[str, Callable[[int], PvGuest], str], ...] = (
    ("start-info", lambda pfn: PvGuest(start_info=pfn), "vCPU 0's edx, the start info page"),
    ("store", lambda pfn: PvGuest(store=pfn), "the xenstore ring in the start info page"),
    ("console", lambda pfn: PvGuest(console=pfn), "the console ring in the start info page"),
    ("gdt", lambda pfn: PvGuest(gdt_frame=pfn), "the GDT's first frame"),
    ("cr3", lambda pfn: PvGuest(cr3=pfn), "cr3, the top page table"),
    ("cr1", lambda pfn: PvGuest(cr1=pfn), "cr1, the user's top page table"),
    ("p2m-frame", lambda pfn: PvGuest(p2m=(4, pfn)), "a frame of the guest's own list of frames"),
)

_REFERENCES = [
    *[
        refused(f"{part}-{slug}", f"{words}: {where}", of(pfn).image())
        for part, of, words in _REFERRED
        for slug, where, pfn in (
            ("out-of-range", "above the last PFN", OUT_OF_RANGE),
            ("unpopulated", "a PFN without memory", UNPOPULATED),
        )
    ],
    *[
        refused(f"{part}-is-a-page-table", f"{words}: an L3 page table", of(TABLE).image())
        for part, of, words in _REFERRED
        if part in {"start-info", "gdt", "p2m-frame"}
    ],
    refused("cr3-not-a-top-table", "cr3 is an L3 table of a 64-bit guest", PvGuest(cr3=TABLE).image()),
    refused("cr1-not-a-top-table", "cr1 is an L3 table of a 64-bit guest", PvGuest(cr1=TABLE).image()),
    refused("cr3-32-bit-not-a-top-table", "cr3 is an L2 table of a 32-bit guest", PvGuest(4, cr3=6).image()),
    taken("cr1-valid", "a user's top page table, the kernel's own", PvGuest(cr1=5).image()),
    refused(
        "gdt-too-long", "a GDT of 7169 entries, one more than Xen leaves", PvGuest(gdt_entries=7169).image()
    ),
    taken(
        "gdt-empty",
        "no GDT: the frame is not looked at",
        PvGuest(gdt_entries=0, gdt_frame=OUT_OF_RANGE).image(),
    ),
]

_MEMORY = [
    taken(
        "tables-filled",
        "page tables that name PFNs with memory",
        PvGuest(tables={5: [6], 6: [7], 7: [8], 8: [0, 1, 2]}).image(),
    ),
    taken(
        "table-to-unpopulated",
        "a page table that names a PFN without memory, which gets some",
        PvGuest(tables={8: [UNPOPULATED]}).image(),
    ),
    case(
        "table-entry-too-high",
        "a page table that names the PFN behind the last",
        PvGuest(tables={8: [0x400]}).image(),
        "sound",
        "",
        "refuse",
        missing="",
        guest="pv",
        reference=ERRATA["table entry too high"],
    ),
    taken(
        "all-page-types",
        "every page type of a PV guest",
        PvGuest(
            types={
                10: L1TAB,
                11: PIN | L1TAB,
                12: L2TAB,
                13: PIN | L2TAB,
                14: L3TAB,
                15: PIN | L3TAB,
                16: L4TAB,
                17: PIN | L4TAB,
                18: BROKEN,
                19: XALLOC,
                20: XTAB,
            },
        ).image(),
    ),
    refused(
        "page-type-7-pv",
        "PAGE_DATA of a PV guest with page type 7",
        PvGuest(types={10: 7}).image(),
        "page-type page-data-length",
    ),
    taken("highest-pfn", "the last PFN of the guest", with_state(entries(0x3FF, pages=page(3)), PV.state())),
    refused(
        "hole-beyond-p2m",
        "a hole behind the last PFN, which a PV guest cannot have",
        with_state(entries(entry(XTAB, 0x400)), PV.state()),
        "page-beyond-p2m",
    ),
]

_INFO = [
    refused(
        "pv-info-short",
        "X86_PV_INFO of 7 octets",
        with_info(record(X86_PV_INFO, bytes([8, 4, 0, 0, 0, 0, 0]))),
        "body-malformed",
        told=False,
    ),
    taken(
        "pv-info-long",
        "X86_PV_INFO of 16 octets",
        with_info(record(X86_PV_INFO, bytes([8, 4]) + bytes(14))),
        "body-surplus",
    ),
    taken(
        "pv-info-reserved",
        "X86_PV_INFO whose reserved octets are set",
        with_info(pv_info(8, 4, b"\xff" * 6)),
        "reserved-field",
    ),
    *[
        refused(
            f"pv-info-{width}-{levels}",
            f"X86_PV_INFO of width {width} and {levels} levels",
            with_info(pv_info(width, levels)),
            "pv-info",
            told=False,
        )
        for width, levels in ((5, 3), (0, 0), (8, 5))
    ],
    refused(
        "pv-info-4-4",
        "X86_PV_INFO of a 32-bit guest with 4 levels; what follows is a 64-bit guest's, and does not fit",
        with_info(pv_info(4, 4)),
        "pv-info p2m-length vcpu-context-size",
        told=False,
    ),
]

_P2M = [
    case(
        "p2m-ends-at-0",
        "X86_PV_P2M_FRAMES of a guest of one page",
        with_p2m(p2m_frames(0, 0, [0])),
        "unsound",
        "p2m-range page-beyond-p2m",
        "refuse",
        missing="",
        guest="pv",
        reference=ERRATA["p2m ends at 0"],
    ),
    refused(
        "p2m-no-head",
        "X86_PV_P2M_FRAMES of 4 octets",
        with_p2m(record(X86_PV_P2M_FRAMES, bytes(4))),
        "body-malformed",
    ),
    refused(
        "p2m-too-many",
        "X86_PV_P2M_FRAMES with a frame too many",
        with_p2m(p2m_frames(0, 0x3FF, [4, 4, 4])),
        "p2m-length",
    ),
    refused(
        "p2m-uneven",
        "X86_PV_P2M_FRAMES with half a frame too many",
        with_p2m(record(X86_PV_P2M_FRAMES, struct.pack("<IIQQ", 0, 0x3FF, 4, 4) + bytes(4))),
        "p2m-length",
    ),
    refused(
        "p2m-32-bit-too-many",
        "X86_PV_P2M_FRAMES of a 32-bit guest with the frames of a 64-bit one",
        with_p2m(PV.p2m_frames(), guest=PvGuest(4)),
        "p2m-length",
    ),
    refused(
        "p2m-starts-late",
        "X86_PV_P2M_FRAMES from PFN 512 on: nothing tells of the first frame",
        with_p2m(p2m_frames(512, 0x3FF, [4])),
    ),
    taken(
        "p2m-in-two",
        "X86_PV_P2M_FRAMES in two records, the first half and the second",
        with_p2m(p2m_frames(0, 511, [4]), p2m_frames(512, 0x3FF, [4])),
    ),
]

_VCPUS = [
    *[
        taken(
            f"{name.lower()}-empty",
            f"X86_PV_VCPU_{name} without context",
            in_pv(vcpu(code, b"")),
            "vcpu-empty",
            ERRATA.get(f"empty VCPU_{name}"),
        )
        for name, code in (("EXTENDED", VCPU_EXTENDED), ("MSRS", VCPU_MSRS))
    ],
    taken(
        "vcpu-empty-of-none",
        "X86_PV_VCPU_EXTENDED without context, of a vCPU that no guest has",
        in_pv(vcpu(VCPU_EXTENDED, b"", 0xFFFF_FFFF)),
        "vcpu-empty",
        ERRATA["empty VCPU_EXTENDED"],
    ),
    taken(
        "vcpu-all-records",
        "all four records of vCPU 0 at their usual sizes",
        in_pv(vcpu(VCPU_EXTENDED, bytes(128)), vcpu(VCPU_XSAVE, bytes(16)), vcpu(VCPU_MSRS, bytes(48))),
    ),
    taken("vcpu-two", "two vCPUs", in_pv(PV.basic(1))),
    taken(
        "vcpu-second-without-basic",
        "X86_PV_VCPU_XSAVE of vCPU 1, which has no X86_PV_VCPU_BASIC: only vCPU 0 has to",
        in_pv(vcpu(VCPU_XSAVE, bytes(16), 1)),
    ),
    taken(
        "vcpu-reserved",
        "a VCPU record whose reserved field is set",
        in_pv(vcpu(VCPU_XSAVE, bytes(16), reserved=1)),
        "reserved-field",
    ),
    refused(
        "vcpu-too-high",
        "X86_PV_VCPU_EXTENDED of vCPU 2^32 - 1",
        in_pv(vcpu(VCPU_EXTENDED, bytes(8), 0xFFFF_FFFF)),
    ),
    refused(
        "vcpu-only-the-second",
        "X86_PV_VCPU_BASIC of vCPU 1 and not of 0",
        with_state(TSC, record(SHARED_INFO, bytes(4096)), PV.basic(1)),
    ),
    case(
        "basic-empty",
        "X86_PV_VCPU_BASIC without context is ignored, so that vCPU 0 has none",
        with_state(TSC, record(SHARED_INFO, bytes(4096)), vcpu(VCPU_BASIC, b"")),
        "sound",
        "vcpu-empty",
        "refuse",
        missing="",
        guest="pv",
    ),
    refused(
        "basic-of-32-bit",
        "X86_PV_VCPU_BASIC of a 32-bit guest in a 64-bit one",
        with_state(TSC, record(SHARED_INFO, bytes(4096)), PvGuest(4).basic()),
        "vcpu-context-size",
    ),
    refused(
        "basic-no-head",
        "X86_PV_VCPU_BASIC of 7 octets",
        with_state(TSC, record(SHARED_INFO, bytes(4096)), record(VCPU_BASIC, bytes(7))),
        "body-malformed",
    ),
    refused(
        "xsave-15", "X86_PV_VCPU_XSAVE of 15 octets", in_pv(vcpu(VCPU_XSAVE, bytes(15))), "vcpu-context-size"
    ),
    refused(
        "msrs-17", "X86_PV_VCPU_MSRS of 17 octets", in_pv(vcpu(VCPU_MSRS, bytes(17))), "vcpu-context-size"
    ),
    *[
        refused(
            f"{name}-no-head",
            f"X86_PV_VCPU_{name.upper()} of 7 octets",
            in_pv(record(code, bytes(7))),
            "body-malformed",
        )
        for name, code in (
            ("extended", VCPU_EXTENDED),
            ("xsave", VCPU_XSAVE),
            ("msrs", VCPU_MSRS),
        )
    ],
    *[
        refused(
            f"shared-info-{size}",
            f"SHARED_INFO of {size} octets",
            with_state(TSC, record(SHARED_INFO, bytes(size)), PV.basic()),
            "body-length",
        )
        for size in (0, 8, 4095, 4104)
    ],
]

CASES: list[Case] = [*_REFERENCES, *_MEMORY, *_INFO, *_P2M, *_VCPUS]
