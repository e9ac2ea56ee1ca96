"""``elf:FILE``: an ELF core, such as a vmcore, to save from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from migstream.guests.kind_segments import segment_kind

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["KIND"]


def _segments(fd: int) -> npt.NDArray[np.uint64]:
    from migstream.guests.elf import ElfFile

    return ElfFile.open(fd).load_segments()


KIND = segment_kind(
    "elf",
    example="elf:vmcore",
    help="an ELF core with program headers (a vmcore): page PFN at physical address PFN * 4096",
    segments=_segments,
)
