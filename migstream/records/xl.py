"""The file that ``xl save`` writes: a header with the domain's config, then a libxl stream.

Source: Xen's tools/xl/xl.h (struct save_file_header) and tools/xl/xl_saverestore.c.
"""

from __future__ import annotations

from migstream.records.fields import COUNTED, octets, u32
from migstream.records.schema import Declaration

__all__ = [
    "BYTE_ORDER_MARK",
    "MAGIC",
    "MANDATORY_JSON",
    "MANDATORY_STREAM_V2",
    "SaveFileConfig",
    "SaveFileHeader",
]

MAGIC = b"Xen saved domain, xl format\n \0 \r"
BYTE_ORDER_MARK = 0x01020304
MANDATORY_JSON = 0x1  # the config is JSON
MANDATORY_STREAM_V2 = 0x2  # a libxl v2 stream follows, not a legacy one


class SaveFileHeader(Declaration):
    """Identifies an xl save file. Its integers are in the byte order of the host that saved."""

    magic: bytes = octets("Xen saved domain, xl format, and line-ending probes", size=32, default=MAGIC)
    byteorder: int = u32("0x01020304 in the saver's byte order", default=BYTE_ORDER_MARK)
    mandatory_flags: int = u32(
        "bit 0: the config is JSON; bit 1: a libxl v2 stream follows; a reader refuses others",
        default=MANDATORY_JSON | MANDATORY_STREAM_V2,
    )
    optional_flags: int = u32("none are defined", default=0)
    optional_data_len: int = u32("length of the optional data that follow", unit="octets")


class SaveFileConfig(Declaration):
    """The optional data: the domain's config, and whatever a later xl may append."""

    config_len: int = u32("length of the config", unit="octets", counts="config", default=COUNTED)
    config: bytes = octets(
        "the domain's config, JSON with a NUL at its end, or xl.cfg text", counted_by="config_len"
    )

    @property
    def text(self) -> str:
        """The config without the NUL at its end; octets that are not UTF-8 become surrogates."""
        return self.config.rstrip(b"\0").decode("utf-8", "surrogateescape")
