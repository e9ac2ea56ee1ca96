"""Large streams for the benchmarks, made here, byte by byte from the specification."""

from __future__ import annotations

import os
import struct
from pathlib import Path

__all__ = ["write_hvm_image"]

BATCH = 1024
PAGE = 4096


def write_hvm_image(path: Path, octets: int, *, passes: int = 1, sparse: bool = False) -> None:
    """Write an HVM image of ``octets`` of memory to ``path``, each page ``passes`` times.

    Pages are neither zero nor compressible; with ``sparse`` they are holes of the file, which costs nothing
    where only what is around the pages is measured.
    """
    headers = struct.pack(">QIIHHI", (1 << 64) - 1, 0x58454E46, 3, 0, 0, 0) + struct.pack(
        "<IHHII", 2, 12, 0, 4, 17
    )
    pages = b"" if sparse else os.urandom(PAGE) * BATCH
    with path.open("wb") as out:
        out.write(headers + struct.pack("<II", 0x10, 0))
        for first in [*range(0, octets // PAGE, BATCH)] * passes:
            out.write(struct.pack("<IIII", 1, 8 + 8 * BATCH + BATCH * PAGE, BATCH, 0))
            out.write(struct.pack(f"<{BATCH}Q", *range(first, first + BATCH)))
            if sparse:
                out.seek(BATCH * PAGE, os.SEEK_CUR)
            else:
                out.write(pages)
        out.write(struct.pack("<II", 8, 24) + bytes(24))
        out.write(struct.pack("<IIIIQQ", 0x0A, 24, 1, 0, 1, 0xFEFFC))
        out.write(struct.pack("<II8s", 9, 8, b"context!") + struct.pack("<II", 0, 0))
