"""Legacy (version 1) libxc streams, as Xen 4.5 and earlier wrote them, read and converted to version 3.

`spec/legacy.md` describes the format. Importing this costs next to nothing: the work is imported when used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from migstream.legacy.report import LegacyReport
from migstream.records.legacy import LegacyShape, is_legacy

if TYPE_CHECKING:
    from migstream.io.inputs import Input
    from migstream.io.writer import StreamWriter
    from migstream.records import Record
    from migstream.records.libxc import GuestType

__all__ = ["LegacyReport", "LegacyShape", "convert_legacy", "is_legacy"]


def convert_legacy(
    source: Input,
    writer: StreamWriter,
    *,
    guest: GuestType | None = None,
    libxl: bool = True,
    static_records: Sequence[Record] = (),
    checkpointed: bool | None = None,
    device_model: bool = True,
    directory: str | None = None,
) -> LegacyReport:
    """Write the legacy stream at ``source``'s position as a libxc stream of version 3.

    ``libxl``: as a whole libxl stream around it, which also carries the device model's state and its
    xenstore pairs; its header says that it was converted. ``guest`` overrides what the stream looks like,
    which it may do where extended info is absent (Xen before 3.1). ``static_records`` are CPUID and MSR
    policies, which no legacy stream has; the report's ``missing`` says what is still not there.

    ``device_model``: behind an HVM guest's image there is QEMU's record, or the end of the input; ``False``
    where an envelope may go on there, as xapi's does: QEMU's record is then taken only if it is there.
    ``checkpointed``: whether further states (Remus) may follow the first; ``None``: where there is more
    input, no LAST_CHECKPOINT came before, and no envelope goes on. The last complete state is written.
    Behind the stream's end nothing is consumed.

    ``directory`` is for temporary files: the pages of a checkpoint wait there until it is complete, and
    pages that came compressed are kept there.

    Raises `FormatError` and `TruncatedError`, layer ``legacy``, for a stream that is damaged or cannot be
    carried over (tmem), and `MigstreamError` where there is no room for temporary files.
    """
    from migstream.legacy.convert import convert
    from migstream.legacy.reader import LegacyReader

    reader = LegacyReader(source, guest, checkpointed=checkpointed, device_model=device_model)
    return convert(reader, writer, wrap=libxl, static_records=static_records, directory=directory)
