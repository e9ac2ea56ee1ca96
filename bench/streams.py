"""Large streams for the benchmarks, made here, byte by byte from the specification."""

from __future__ import annotations

import os
import struct
from pathlib import Path

__all__ = ["write_hvm_image"]

BATCH = 1024
PAGE = 4096


def write_hvm_image(path: Path, octets: int) -> None:
    """Write an HVM image with about ``octets`` of pages (not zeros, not compressible) to ``path``."""
    headers = struct.pack(">QIIHHI", (1 << 64) - 1, 0x58454E46, 3, 0, 0, 0) + struct.pack(
        "<IHHII", 2, 12, 0, 4, 17
    )
    pages = os.urandom(PAGE) * BATCH
    with path.open("wb") as out:
        out.write(headers + struct.pack("<II", 0x10, 0))
        for first in range(0, octets // PAGE, BATCH):
            out.write(struct.pack("<IIII", 1, 8 + 8 * BATCH + len(pages), BATCH, 0))
            out.write(struct.pack(f"<{BATCH}Q", *range(first, first + BATCH)))
            out.write(pages)
        out.write(struct.pack("<II", 8, 24) + bytes(24))
        out.write(struct.pack("<IIIIQQ", 0x0A, 24, 1, 0, 1, 0xFEFFC))
        out.write(struct.pack("<II8s", 9, 8, b"context!") + struct.pack("<II", 0, 0))
