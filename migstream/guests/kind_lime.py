"""``lime:FILE``: a LiME memory image, to save from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from migstream.guests.kind_segments import segment_kind

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["KIND"]


def _segments(fd: int) -> npt.NDArray[np.uint64]:
    from migstream.guests.lime import ranges

    return ranges(fd)


KIND = segment_kind(
    "lime",
    example="lime:memory.lime",
    help="a LiME memory image",
    segments=_segments,
)
