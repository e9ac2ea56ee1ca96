"""The libxl stream: a header and six record types around a libxc image.

Source: Xen's docs/specs/libxl-migration-stream.pandoc, revision 2. Its record header is libxc's.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

from migstream.records.fields import ByteOrder, octets, u32, u64
from migstream.records.pairs import pack_pairs, parse_pairs
from migstream.records.schema import Declaration, Record

__all__ = [
    "BIG_ENDIAN",
    "IDENT",
    "LEGACY",
    "CheckpointEnd",
    "CheckpointState",
    "CheckpointStateId",
    "EmulatorContext",
    "EmulatorId",
    "EmulatorXenstoreData",
    "LibxcContext",
    "LibxlEnd",
    "LibxlHeader",
    "LibxlRecord",
]

IDENT = 0x4C6962786C466D74  # "LibxlFmt"
BIG_ENDIAN = 0x0000_0001  # option bit 0
LEGACY = 0x0000_0002  # option bit 1
OPTIONS_RESERVED = 0xFFFF_FFFC  # option bits 2-31


class EmulatorId(IntEnum):
    """Which emulator a record belongs to."""

    UNKNOWN = 0
    QEMU_TRADITIONAL = 1
    QEMU_UPSTREAM = 2


class CheckpointStateId(IntEnum):
    """What one side of COLO tells the other."""

    NEW = 0
    SVM_SUSPENDED = 1
    SVM_READY = 2
    SVM_RESUMED = 3


class LibxlHeader(Declaration):
    """Identifies a libxl stream. Always big-endian, whatever the options say (section Header)."""

    ident: int = u64('"LibxlFmt" in ASCII', default=IDENT)
    version: int = u32("version of the specification, 2", default=2)
    options: int = u32(
        "bit 0: big-endian; bit 1: converted from a legacy stream; bits 2-31 reserved", default=0
    )

    @property
    def order(self) -> ByteOrder:
        """The byte order of the records."""
        return "big" if self.options & BIG_ENDIAN else "little"


class LibxlRecord(Record, layer="libxl"):
    """Base of the records of a libxl stream."""


class LibxlEnd(LibxlRecord, code=0x00, type="END"):
    """The stream ends here. No body."""


class LibxcContext(LibxlRecord, code=0x01, type="LIBXC_CONTEXT"):
    """A libxc image follows, with headers of its own. No body."""


class EmulatorXenstoreData(LibxlRecord, code=0x02, type="EMULATOR_XENSTORE_DATA"):
    """Xenstore keys and values that an emulator needs."""

    emulator_id: int = u32("the emulator", names=EmulatorId)
    index: int = u32("which of the domain's emulators")
    data: bytes = octets("keys and values in turn, each ended by NUL; keys relative to the emulator's tree")

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Keys and values; text that is not UTF-8 keeps its octets as surrogates.

        Raises `FormatError` where the data do not end with NUL, or a key has no value.
        """
        return parse_pairs(self.data, what="xenstore", offset=self.head_size)

    @staticmethod
    def pack(pairs: Iterable[tuple[str, str]]) -> bytes:
        """Return ``pairs`` in the form of `data`."""
        return pack_pairs(pairs, what="xenstore")


class EmulatorContext(LibxlRecord, code=0x03, type="EMULATOR_CONTEXT"):
    """An emulator's own state: for QEMU upstream, its device state as QEMU writes it."""

    emulator_id: int = u32("the emulator", names=EmulatorId)
    index: int = u32("which of the domain's emulators")
    emulator_ctx: bytes = octets("the emulator's state, in its own form")


class CheckpointEnd(LibxlRecord, code=0x04, type="CHECKPOINT_END"):
    """A checkpoint is complete; libxc's records go on, without new headers. No body."""


class CheckpointState(LibxlRecord, code=0x05, type="CHECKPOINT_STATE"):
    """COLO's hand-shake between primary and secondary.

    The specification draws eight octets with the last four as padding; libxl writes a body of four
    and lets the record's own padding fill them.
    """

    control_id: int = u32("what is told", names=CheckpointStateId)
