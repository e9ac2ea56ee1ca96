"""Which record may stand where: each need, each repetition and each absence of ``spec/libxc.md``'s table.

A case moves, adds or leaves out one record of a whole image. What Xen's restore enforces is an error of
verify and refused; the rest is a warning and taken.
"""

from __future__ import annotations

from typing import Literal

from spec.vectors.case import Case, case
from spec.vectors.errata import ERRATA
from spec.vectors.words import (
    CONTEXT,
    CPUID,
    ENDED,
    MSR,
    PAGES,
    PARAMS,
    PV,
    SHARED,
    STATIC,
    STATIC_END,
    TAIL,
    TSC,
    VCPU_MSRS,
    VCPU_XSAVE,
    hvm,
    in_hvm,
    in_pv,
    pv,
    vcpu,
)
from tests.build import VCPU_EXTENDED, VERIFY, record

EXTENDED, XSAVE, MSRS = (
    vcpu(VCPU_EXTENDED, bytes(128)),
    vcpu(VCPU_XSAVE, bytes(32)),
    vcpu(VCPU_MSRS, bytes(16)),
)

#: The parts of a whole PV image in their order.
_PV = {
    "X86_PV_INFO": PV.info(),
    "X86_CPUID_POLICY": CPUID,
    "X86_MSR_POLICY": MSR,
    "STATIC_DATA_END": STATIC_END,
    "X86_PV_P2M_FRAMES": PV.p2m_frames(),
    "PAGE_DATA": PV.memory(),
    "X86_TSC_INFO": TSC,
    "SHARED_INFO": SHARED,
    "X86_PV_VCPU_BASIC": PV.basic(),
    "X86_PV_VCPU_EXTENDED": EXTENDED,
    "X86_PV_VCPU_XSAVE": XSAVE,
    "X86_PV_VCPU_MSRS": MSRS,
    "END": ENDED,
}
_HVM = {
    "X86_CPUID_POLICY": CPUID,
    "X86_MSR_POLICY": MSR,
    "STATIC_DATA_END": STATIC_END,
    "PAGE_DATA": PAGES,
    "X86_TSC_INFO": TSC,
    "HVM_PARAMS": PARAMS,
    "HVM_CONTEXT": CONTEXT,
    "END": ENDED,
}
_VCPU_RECORDS = ("X86_PV_VCPU_BASIC", "X86_PV_VCPU_EXTENDED", "X86_PV_VCPU_XSAVE", "X86_PV_VCPU_MSRS")


def _moved(image: dict[str, bytes], what: str, before: str) -> bytes:
    """Return the records of ``image`` with ``what`` directly before ``before``."""
    return b"".join(
        (image[what] if name == before else b"") + octets for name, octets in image.items() if name != what
    )


def _without(image: dict[str, bytes], *names: str) -> bytes:
    return b"".join(octets for name, octets in image.items() if name not in names)


def _slug(name: str) -> str:
    return name.lower().removeprefix("x86_").replace("_", "-")


_TOLERATED: tuple[tuple[Literal["hvm", "pv"], str], ...] = (
    ("hvm", "X86_TSC_INFO"),
    ("hvm", "HVM_PARAMS"),
    ("hvm", "HVM_CONTEXT"),
    ("pv", "X86_TSC_INFO"),
    ("pv", "SHARED_INFO"),
)

_EARLY = [
    *[
        case(
            f"{_slug(what)}-before-{_slug(before)}",
            f"{what} before {before} in a PV image: against the specification, but taken",
            pv(_moved(_PV, what, before)),
            "sound",
            "layout-order-tolerated",
            "accept",
            guest="pv",
        )
        for what in _VCPU_RECORDS
        for before in ("X86_PV_INFO", "STATIC_DATA_END", "X86_PV_P2M_FRAMES", "PAGE_DATA")
    ],
    *[
        case(
            f"{_slug(what)}-before-static-data-end{'-pv' if guest == 'pv' else ''}",
            f"{what} before STATIC_DATA_END in {guest.upper()} images: against the specification, but taken",
            (pv if guest == "pv" else hvm)(
                _moved(_PV if guest == "pv" else _HVM, what, "STATIC_DATA_END"),
            ),
            "sound",
            "layout-order-tolerated",
            "accept",
            guest=guest,
        )
        for guest, what in _TOLERATED
    ],
    case(
        "shared-info-before-pv-info",
        "SHARED_INFO before X86_PV_INFO, whose word size it needs",
        pv(_moved(_PV, "SHARED_INFO", "X86_PV_INFO")),
        "unsound",
        "layout-order layout-order-tolerated",
        "refuse",
        guest="pv",
    ),
    case(
        "p2m-frames-before-static-data-end",
        "X86_PV_P2M_FRAMES between X86_PV_INFO and the end of static data",
        pv(_moved(_PV, "X86_PV_P2M_FRAMES", "X86_CPUID_POLICY")),
        "unsound",
        "layout-order",
        "refuse",
        guest="pv",
    ),
    case(
        "p2m-frames-before-pv-info",
        "X86_PV_INFO behind X86_PV_P2M_FRAMES, and so behind the static data that it belongs to",
        pv(_moved(_PV, "X86_PV_INFO", "PAGE_DATA")),
        "unsound",
        "layout-order layout-static-late",
        "refuse",
        missing="",
        guest="pv",
    ),
    case(
        "page-data-before-static-data-end",
        "PAGE_DATA between X86_PV_INFO and the end of static data",
        pv(_moved(_PV, "PAGE_DATA", "X86_CPUID_POLICY")),
        "unsound",
        "layout-order",
        "refuse",
        guest="pv",
    ),
    case(
        "page-data-before-p2m-frames",
        "PAGE_DATA before X86_PV_P2M_FRAMES, which say how large the guest is; libxenguest crashes on PFN 0",
        pv(_moved(_PV, "PAGE_DATA", "X86_PV_P2M_FRAMES")),
        "unsound",
        "layout-order",
        "refuse",
        missing="",
        guest="pv",
        reference=ERRATA["pages before p2m"],
    ),
    case(
        "verify-before-static-data-end",
        "VERIFY in the static data; PAGE_DATA behind it are compared with nothing",
        hvm(CPUID, MSR, record(VERIFY), STATIC_END, PAGES, TAIL, ENDED),
        "sound",
        "layout-order-tolerated",
        "accept",
    ),
    case(
        "verify-before-page-data",
        "VERIFY before all pages",
        hvm(STATIC, record(VERIFY), PAGES, TAIL, ENDED),
        "sound",
        "layout-order-tolerated",
        "accept",
    ),
]

_REPEATED = [
    case(
        "second-pv-info",
        "a second X86_PV_INFO",
        pv(PV.info(), _without(_PV)),
        "unsound",
        "layout-repeated",
        "refuse",
        guest="pv",
    ),
    *[
        case(
            f"second-{_slug(name)}",
            f"a second {name} in one state; the last counts",
            in_pv(octets, octets),
            "sound",
            "layout-repeated-tolerated",
            "accept",
            guest="pv",
        )
        for name, octets in _PV.items()
        if name in {"SHARED_INFO", *_VCPU_RECORDS}
    ],
    *[
        case(
            f"second-{_slug(name)}",
            f"a second {name}; the last counts",
            in_hvm(octets),
            "sound",
            f"layout-repeated-tolerated{' layout-order-tolerated' if name == 'HVM_CONTEXT' else ''}",
            "accept",
        )
        for name, octets in (("HVM_PARAMS", PARAMS), ("HVM_CONTEXT", CONTEXT))
    ],
    case(
        "second-policies",
        "both policies twice in the static data; the last counts, and the specification does not mind",
        hvm(CPUID, MSR, CPUID, MSR, STATIC_END, PAGES, TAIL, ENDED),
        "sound",
        "",
        "accept",
    ),
    case(
        "p2m-frames-again",
        "X86_PV_P2M_FRAMES twice, as of a guest that grew",
        pv(PV.static(), PV.p2m_frames(), PV.p2m_frames(), PV.memory(), PV.state(), ENDED),
        "sound",
        "",
        "accept",
        guest="pv",
    ),
]

_LATE = [
    case(
        "msr-policy-late",
        "X86_MSR_POLICY behind STATIC_DATA_END is taken and never applied: MSR is missing",
        hvm(CPUID, STATIC_END, MSR, PAGES, TAIL, ENDED),
        "sound",
        "layout-static-late static-data-missing",
        "accept",
        missing="MSR",
        reference=ERRATA["late policies"],
    ),
    case(
        "pv-info-late",
        "X86_PV_INFO behind STATIC_DATA_END, before X86_PV_P2M_FRAMES: taken",
        pv(_moved(_PV, "X86_PV_INFO", "X86_PV_P2M_FRAMES")),
        "sound",
        "layout-static-late",
        "accept",
        guest="pv",
    ),
]

_MISSING = [
    case(
        "no-pv-info",
        "a PV image without X86_PV_INFO",
        pv(_without(_PV, "X86_PV_INFO")),
        "unsound",
        "layout-missing layout-order layout-order-tolerated",
        "refuse",
        missing="",
        guest="pv",
    ),
    case(
        "no-p2m-frames",
        "a PV image without X86_PV_P2M_FRAMES",
        pv(_without(_PV, "X86_PV_P2M_FRAMES")),
        "unsound",
        "layout-missing layout-order layout-order-tolerated",
        "refuse",
        missing="",
        guest="pv",
        reference=ERRATA["pages before p2m"],
    ),
    case(
        "no-page-data-pv",
        "a PV image without a page: its start info page is not there",
        pv(_without(_PV, "PAGE_DATA")),
        "unsound",
        "layout-missing layout-order-tolerated",
        "refuse",
        missing="",
        guest="pv",
    ),
    case(
        "no-vcpu-basic",
        "a PV image without X86_PV_VCPU_BASIC",
        pv(_without(_PV, "X86_PV_VCPU_BASIC")),
        "unsound",
        "layout-missing",
        "refuse",
        missing="",
        guest="pv",
    ),
    case(
        "no-shared-info",
        "a PV image without SHARED_INFO, which the specification does not ask for",
        pv(_without(_PV, "SHARED_INFO")),
        "sound",
        "layout-missing-usual",
        "accept",
        guest="pv",
    ),
    case(
        "no-static-data-end",
        "a version 3 image without STATIC_DATA_END",
        hvm(_without(_HVM, "STATIC_DATA_END")),
        "unsound",
        "layout-missing layout-order layout-order-tolerated",
        "refuse",
    ),
    case(
        "no-static-data-end-no-page-data",
        "a version 3 image with neither STATIC_DATA_END nor PAGE_DATA; libxenguest never asks for what is "
        "missing, a better restore does at the end",
        hvm(_without(_HVM, "STATIC_DATA_END", "PAGE_DATA")),
        "unsound",
        "layout-missing layout-order-tolerated",
        "accept",
        reference=ERRATA["static data never told"],
    ),
    case(
        "no-hvm-params",
        "an HVM image without HVM_PARAMS",
        hvm(_without(_HVM, "HVM_PARAMS")),
        "sound",
        "layout-missing-usual layout-order-tolerated",
        "accept",
    ),
    case(
        "no-hvm-context",
        "an HVM image without HVM_CONTEXT; a hypervisor may refuse to run it",
        hvm(_without(_HVM, "HVM_CONTEXT")),
        "sound",
        "layout-missing-usual",
        "accept",
    ),
    case(
        "no-tsc-info",
        "an HVM image without X86_TSC_INFO, which is not asked for",
        hvm(_without(_HVM, "X86_TSC_INFO")),
        "sound",
        "",
        "accept",
    ),
    case(
        "nothing-but-end",
        "an HVM image of headers and END",
        hvm(ENDED),
        "unsound",
        "layout-missing layout-missing-usual",
        "accept",
        missing="CPUID MSR",
        reference=ERRATA["static data never told"],
    ),
]

_FOREIGN = [
    *[
        case(
            f"{_slug(name)}-in-hvm",
            f"{name} in an HVM image",
            in_hvm(octets),
            "unsound",
            "layout-foreign",
            "refuse",
            missing="",
        )
        for name, octets in _PV.items()
        if name in {"X86_PV_P2M_FRAMES", "SHARED_INFO", *_VCPU_RECORDS}
    ],
    *[
        case(
            f"{_slug(name)}-in-pv",
            f"{name} in a PV image",
            in_pv(octets),
            "unsound",
            "layout-foreign",
            "refuse",
            missing="",
            guest="pv",
        )
        for name, octets in (("HVM_PARAMS", PARAMS), ("HVM_CONTEXT", CONTEXT))
    ],
]

_VERSION_2 = [
    case(
        "v2-pv",
        "a version 2 PV image: static data end before the first X86_PV_P2M_FRAMES",
        pv(_without(_PV, "X86_CPUID_POLICY", "X86_MSR_POLICY", "STATIC_DATA_END"), version=2),
        "sound",
        "static-data-inferred static-data-missing",
        "accept",
        missing="CPUID MSR",
        guest="pv",
    ),
    case(
        "v2-pv-page-data-first",
        "a version 2 PV image: the end is inferred from PAGE_DATA too, which are then refused",
        pv(PV.info(), PV.memory(), PV.p2m_frames(), PV.state(), ENDED, version=2),
        "unsound",
        "static-data-inferred static-data-missing layout-order",
        "refuse",
        missing="CPUID MSR",
        guest="pv",
        reference=ERRATA["pages before p2m"],
    ),
    case(
        "v2-static-data-end",
        "a version 2 image with version 3's static data, and their end: taken",
        hvm(STATIC, PAGES, TAIL, ENDED, version=2),
        "sound",
        "static-data-in-v2",
        "accept",
    ),
    case(
        "v2-static-data-end-late",
        "a version 2 image with STATIC_DATA_END behind PAGE_DATA, where it was inferred already",
        hvm(PAGES, STATIC_END, TAIL, ENDED, version=2),
        "unsound",
        "static-data-inferred static-data-missing static-data-in-v2 layout-repeated",
        "refuse",
        missing="CPUID MSR",
    ),
    case(
        "v2-state-first",
        "a version 2 image with its state before the pages: nothing says that static data ended by then",
        hvm(TAIL, PAGES, ENDED, version=2),
        "sound",
        "static-data-inferred static-data-missing",
        "accept",
        missing="CPUID MSR",
    ),
]

CASES: list[Case] = [*_EARLY, *_REPEATED, *_LATE, *_MISSING, *_FOREIGN, *_VERSION_2]
