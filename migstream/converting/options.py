"""What a conversion is asked to do: the forms that a stream can be written in, and the options."""

from __future__ import annotations

from dataclasses import dataclass

from migstream.errors import MigstreamError
from migstream.records import Record

__all__ = ["DEFAULT_BATCH", "MAX_BATCH", "TARGETS", "ConvertError", "Options", "Target"]

DEFAULT_BATCH = 1024  # pages of a PAGE_DATA record, as Xen's own save engine writes them
MAX_BATCH = 32704  # pages that fit into the longest record that Xen reads, 128 MiB


class ConvertError(MigstreamError):
    """The input is sound, but cannot become what was asked for; the message says what to do."""


@dataclass(frozen=True)
class Target:
    """A form to write: its layers, outermost first, and the version of the libxc image in it.

    JSON has no layers of its own: it describes any. ``version`` is ``None`` where the image keeps its own.
    """

    name: str
    layers: tuple[str, ...]
    version: int | None = None


#: Forms by the name that the user gives them.
TARGETS = {
    target.name: target
    for target in (
        Target("libxc3", ("libxc",), version=3),
        Target("libxc2", ("libxc",), version=2),
        Target("libxl", ("libxl", "libxc")),
        Target("xl", ("xl", "libxl", "libxc")),
        Target("libvirt", ("libvirt", "libxl", "libxc")),
        Target("json", ()),
    )
}


@dataclass(frozen=True)
class Options:
    """What to change on the way; by default nothing but the envelope.

    ``config`` is the domain's config for an envelope that has one. ``cpuid`` and ``msr`` are policy
    records for an image without them. ``checkpoint`` is the number of the state wanted, from 1, and
    implies ``flatten``. ``batch`` is the most pages of a PAGE_DATA record. ``max_memory`` bounds, in
    octets, the memory that PFNs may span; ``None``: what the stream implies.
    """

    config: bytes | None = None
    flatten: bool = False
    checkpoint: int | None = None
    drop_zero: bool = False
    batch: int | None = None
    lossy: bool = False
    cpuid: Record | None = None
    msr: Record | None = None
    max_memory: int | None = None

    @property
    def flattens(self) -> bool:
        """Whether each page is written once."""
        return self.flatten or self.checkpoint is not None

    @property
    def seeks(self) -> bool:
        """Whether the input's pages are moved in an order or grouping of their own."""
        return self.flattens or self.drop_zero or self.batch is not None

    @property
    def policies(self) -> list[Record]:
        """The policy records that were given, in their order in a stream."""
        return [record for record in (self.cpuid, self.msr) if record is not None]
