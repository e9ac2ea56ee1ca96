"""``core:FILE``: a core dump of Xen, to save from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from migstream.guests.kind_segments import segment_kind

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["KIND"]


def _segments(fd: int) -> npt.NDArray[np.uint64]:
    from migstream.guests.xen_core import CoreFile

    return CoreFile.open(fd).segments()


KIND = segment_kind(
    "core",
    example="core:guest.core",
    help="a core dump of Xen, as xl dump-core writes it; PV page tables keep machine frames",
    segments=_segments,
)
