"""What the kinds of guest share whose files list where their memory lies: ELF and Xen cores, LiME images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from migstream.guests.kind import GuestKind, GuestSpec, Option
from migstream.guests.protocols import SaveSource
from migstream.records.libxc import GuestType

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["segment_kind"]


def segment_kind(
    name: str, *, example: str, help: str, segments: Callable[[int], npt.NDArray[np.uint64]]
) -> GuestKind:
    """Return the kind ``name:FILE``, to save from; ``segments`` reads them as `SegmentSource` takes them."""

    @contextmanager
    def source(spec: GuestSpec, guest_type: GuestType) -> Iterator[SaveSource]:
        from migstream.guests.segments import SegmentSource

        with SegmentSource(spec.what, spec.guest_type(guest_type), segments) as opened:
            yield opened

    return GuestKind(
        name=name,
        what="FILE",
        example=example,
        help=f"{help}; to save from",
        source=source,
        options=(Option("guest-type", "pv", "pv or hvm; default: as --guest-type says"),),
    )
