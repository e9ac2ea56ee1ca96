"""Streams by the specification: no finding but notes, and a restore takes them."""

from __future__ import annotations

from spec.vectors.case import Case, case
from spec.vectors.words import (
    CHECKPOINT_COMPLETE,
    CHECKPOINTED,
    ENDED,
    FIRST_CHECKPOINT,
    LIBXC_SEGMENT,
    NESTED,
    PAGES,
    PV_WHOLE,
    REMUS,
    STATIC,
    TAIL,
    VCPU_MSRS,
    WHOLE,
    XL_FILE,
    PvGuest,
    colo_state,
    entries,
    hvm,
    vcpu,
)
from tests.build import VERIFY, libvirt, page, record, segment, xapi

AGAIN = entries(1, pages=page(9))

CASES: list[Case] = [
    case("hvm-image", "an HVM image", WHOLE, "sound", "", "accept"),
    case("pv-image", "a 64-bit PV image", PV_WHOLE, "sound", "", "accept", guest="pv"),
    case(
        "pv-image-32-bit",
        "a 32-bit PV image, with a vCPU's MSRS",
        PvGuest(width=4).image(vcpu(VCPU_MSRS, bytes(32))),
        "sound",
        "",
        "accept",
        guest="pv",
    ),
    case("libxl-stream", "an HVM image and QEMU's state in a libxl stream", NESTED, "sound"),
    case("xl-file", "an xl file", XL_FILE, "sound"),
    case("libvirt-image", "a save image of libvirt's libxl driver", libvirt(NESTED), "sound"),
    case(
        "xapi-image",
        "a suspend image of xapi with UEFI variables and QEMU's state",
        xapi(LIBXC_SEGMENT, segment(0xF11, b"efivars"), segment(0xF00, b"QEVM")),
        "sound",
    ),
    case(
        "remus-image",
        "a bare Remus image: two checkpoints, and END",
        FIRST_CHECKPOINT + AGAIN + TAIL + CHECKPOINTED + ENDED,
        "sound",
        "",
        "accept",
        stream_type="remus",
    ),
    case(
        "remus-in-libxl",
        "Remus in libxl: two checkpoints, and the sender is gone",
        REMUS + AGAIN + TAIL + CHECKPOINTED + CHECKPOINT_COMPLETE,
        "sound",
        "stream-ends-at-checkpoint",
        stream_type="remus",
    ),
    case(
        "colo-in-libxl",
        "COLO in libxl: CHECKPOINT_STATE behind a checkpoint, then half of the next state",
        REMUS + colo_state(0) + AGAIN + TAIL,
        "sound",
        "stream-ends-at-checkpoint",
        stream_type="colo",
    ),
    case(
        "verify-pass",
        "pages sent again behind VERIFY, to be compared",
        hvm(STATIC, PAGES, record(VERIFY), PAGES, TAIL, ENDED),
        "sound",
        "",
        "accept",
    ),
]
