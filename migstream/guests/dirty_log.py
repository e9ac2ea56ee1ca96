"""A log of written pages with Xen's operations (XEN_DOMCTL_SHADOW_OP_*)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from migstream.bitmap import PfnBitmap
from migstream.errors import GuestError

__all__ = ["DirtyLog"]


class DirtyLog:
    """Which of ``size`` PFNs were written since the log was enabled or cleaned.

    It has no lock of its own: whoever writes pages holds one around a write *and* its `note`, and around
    `clean`. Else a write could fall between the two, and be lost.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._dirty: PfnBitmap | None = None

    @property
    def enabled(self) -> bool:
        """Whether writes are logged."""
        return self._dirty is not None

    def enable(self) -> None:
        """Start with an empty log."""
        self._dirty = PfnBitmap(self.size)

    def disable(self) -> None:
        """Stop, and forget what was logged."""
        self._dirty = None

    def note(self, pfns: npt.NDArray[np.uint64]) -> None:
        """Log that ``pfns``, uint64[n], were written, if writes are logged."""
        if self._dirty is not None:
            self._dirty.add(pfns)

    def clean(self, into: PfnBitmap) -> None:
        """Move the log into ``into``. Raises `GuestError` if writes are not logged."""
        self.peek(into)
        assert self._dirty is not None
        self._dirty.clear()

    def peek(self, into: PfnBitmap) -> None:
        """Copy the log into ``into``. Raises `GuestError` if writes are not logged."""
        if self._dirty is None:
            raise GuestError("the dirty log is off; enable it before asking what is dirty")
        if into.size != self.size:
            raise ValueError(f"a dirty log of {self.size} PFNs does not fit a bitmap of {into.size}")
        into.words[:] = self._dirty.words
