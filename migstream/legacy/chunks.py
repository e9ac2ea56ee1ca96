"""The chunks of a legacy body, as one table.

A chunk starts with an ``int``: positive, it is a batch of so many PFNs; zero, the body ends; negative, it
is one of these. Source: xg_save_restore.h of Xen 4.4 and 4.5 (XC_SAVE_ID_*).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from migstream.records.hvm_params import HvmParam

__all__ = ["CHUNKS", "PAGES", "Body", "ChunkType"]

PAGES = "PAGES"  # what a batch is called in errors; the format has no name for it


class Body(Enum):
    """What follows a chunk's id; the reader has one method for each."""

    NONE = "nothing"
    PARAM = "u32 padding, u64 value"
    VCPU_INFO = "i32 highest vCPU id, then a bitmap of vCPUs in u64 words"
    TSC_INFO = "u32 mode, u64 nanoseconds, u32 kHz, u32 incarnation"
    SIZED_DATA = "u32 length, octets"
    COMPRESSED = "word length, octets"
    TMEM = "transcendent memory, of no known length"


@dataclass(frozen=True)
class ChunkType:
    """One type of chunk. ``param``: the HVM parameter that it becomes."""

    id: int
    name: str
    body: Body
    meaning: str
    param: HvmParam | None = None


_TABLE = (
    ChunkType(-1, "ENABLE_VERIFY_MODE", Body.NONE, "pages from here on are compared, not restored"),
    ChunkType(-2, "VCPU_INFO", Body.VCPU_INFO, "which vCPUs a PV tail has"),
    ChunkType(-3, "HVM_IDENT_PT", Body.PARAM, "identity page table", HvmParam.IDENT_PT),
    ChunkType(-4, "HVM_VM86_TSS", Body.PARAM, "TSS of virtual 8086 mode", HvmParam.VM86_TSS),
    ChunkType(-5, "TMEM", Body.TMEM, "transcendent memory"),
    ChunkType(-6, "TMEM_EXTRA", Body.TMEM, "transcendent memory invalidated since"),
    ChunkType(-7, "TSC_INFO", Body.TSC_INFO, "time stamp counter"),
    ChunkType(-8, "HVM_CONSOLE_PFN", Body.PARAM, "console ring", HvmParam.CONSOLE_PFN),
    ChunkType(-9, "LAST_CHECKPOINT", Body.NONE, "the stream ends behind the next tail"),
    ChunkType(
        -10, "HVM_ACPI_IOPORTS_LOCATION", Body.PARAM, "which ACPI ports", HvmParam.ACPI_IOPORTS_LOCATION
    ),
    ChunkType(-11, "HVM_VIRIDIAN", Body.PARAM, "Hyper-V interfaces", HvmParam.VIRIDIAN),
    ChunkType(-12, "COMPRESSED_DATA", Body.COMPRESSED, "pages of the batches before, as deltas"),
    ChunkType(-13, "ENABLE_COMPRESSION", Body.NONE, "batches behind the next tail have no pages"),
    ChunkType(
        -14,
        "HVM_GENERATION_ID_ADDR",
        Body.PARAM,
        "address of the generation id",
        HvmParam.VM_GENERATION_ID_ADDR,
    ),
    ChunkType(-15, "HVM_PAGING_RING_PFN", Body.PARAM, "paging ring", HvmParam.PAGING_RING_PFN),
    ChunkType(-16, "HVM_ACCESS_RING_PFN", Body.PARAM, "memory access ring", HvmParam.MONITOR_RING_PFN),
    ChunkType(-17, "HVM_SHARING_RING_PFN", Body.PARAM, "sharing ring", HvmParam.SHARING_RING_PFN),
    ChunkType(-18, "TOOLSTACK", Body.SIZED_DATA, "the toolstack's own data (libxl: QEMU's physmap)"),
    ChunkType(-19, "HVM_IOREQ_SERVER_PFN", Body.PARAM, "first ioreq server page", HvmParam.IOREQ_SERVER_PFN),
    ChunkType(
        -20, "HVM_NR_IOREQ_SERVER_PAGES", Body.PARAM, "how many of them", HvmParam.NR_IOREQ_SERVER_PAGES
    ),
)

#: Every type by its id.
CHUNKS: dict[int, ChunkType] = {chunk.id: chunk for chunk in _TABLE}
