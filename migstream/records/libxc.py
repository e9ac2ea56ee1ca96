"""The libxc domain image: two headers and 19 record types of Xen's, and one of our own.

Source: Xen's docs/specs/libxc-migration-stream.pandoc, revision 3; the section of each record has
the record's name. ORIGIN is ours: optional, so that Xen and every other reader passes over it.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import ClassVar

from migstream.records.array import Array
from migstream.records.fields import COUNTED, ByteOrder, array, octets, reserved, u8, u16, u32, u64
from migstream.records.hvm_params import HvmParam
from migstream.records.page_data import PageData
from migstream.records.pairs import pack_pairs, parse_pairs
from migstream.records.schema import Declaration, Record

__all__ = [
    "BIG_ENDIAN",
    "IMAGE_ID",
    "MARKER",
    "Checkpoint",
    "CheckpointDirtyPfnList",
    "CpuidLeaf",
    "DomainHeader",
    "End",
    "GuestType",
    "HvmContext",
    "HvmParamEntry",
    "HvmParams",
    "Hypervisor",
    "ImageHeader",
    "LibxcRecord",
    "MsrEntry",
    "Origin",
    "PageData",
    "RecordHeader",
    "SharedInfo",
    "StaticDataEnd",
    "Toolstack",
    "TscMode",
    "VcpuRecord",
    "Verify",
    "X86CpuidPolicy",
    "X86MsrPolicy",
    "X86PvInfo",
    "X86PvP2mFrames",
    "X86PvVcpuBasic",
    "X86PvVcpuExtended",
    "X86PvVcpuMsrs",
    "X86PvVcpuXsave",
    "X86TscInfo",
]

MARKER = 0xFFFF_FFFF_FFFF_FFFF
IMAGE_ID = 0x58454E46  # "XENF"
BIG_ENDIAN = 0x0001  # option bit 0
OPTIONS_RESERVED = 0xFFFE  # option bits 1-15


class GuestType(IntEnum):
    """The domain header's type."""

    PV = 1
    HVM = 2


class TscMode(IntEnum):
    """How a guest's time stamp counter is virtualised (xen/include/public/arch-x86/cpuid.h)."""

    DEFAULT = 0
    ALWAYS_EMULATE = 1
    NEVER_EMULATE = 2
    PVRDTSCP = 3


class ImageHeader(Declaration):
    """Identifies a libxc image. Always big-endian, whatever the options say (section Image Header)."""

    marker: int = u64("all ones", default=MARKER)
    id: int = u32('"XENF" in ASCII', default=IMAGE_ID)
    version: int = u32("version of the specification, 2 or 3", default=3)
    options: int = u16("bit 0: the image is big-endian; bits 1-15 reserved", default=0)
    reserved1: int = reserved(2, default=0)
    reserved2: int = reserved(4, default=0)

    @property
    def order(self) -> ByteOrder:
        """The byte order of everything after this header."""
        return "big" if self.options & BIG_ENDIAN else "little"


class DomainHeader(Declaration):
    """General properties of the domain (section Domain Header)."""

    type: int = u32("guest type", names=GuestType)
    page_shift: int = u16("guest page size as a power of two", unit="log2 octets", default=12)
    reserved1: int = reserved(2, default=0)
    xen_major: int = u32("major version of the Xen that saved; 0: converted from a legacy stream")
    xen_minor: int = u32("minor version of the Xen that saved, or the converter's version")


class RecordHeader(Declaration):
    """Stands before every record of libxc and of libxl (section Records)."""

    type: int = u32("record type; bit 31 set: optional")
    length: int = u32("length of the body without padding", unit="octets")


class LibxcRecord(Record, layer="libxc"):
    """Base of the records of a libxc image."""


class End(LibxcRecord, code=0x00, type="END"):
    """The image ends here. No body."""


# 0x01, PAGE_DATA, has a file of its own: page_data.py.


class X86PvInfo(LibxcRecord, code=0x02, type="X86_PV_INFO"):
    """The shape of a PV guest."""

    guest_width: int = u8("word size of the guest, 4 or 8", unit="octets")
    pt_levels: int = u8("levels of its page tables, 3 or 4")
    reserved1: bytes = reserved(6, default=bytes(6))


class X86PvP2mFrames(LibxcRecord, code=0x03, type="X86_PV_P2M_FRAMES"):
    """Where a PV guest keeps its own PFN-to-MFN list."""

    p2m_start_pfn: int = u32("first PFN that the list's frames below describe")
    p2m_end_pfn: int = u32("last PFN that they describe (inclusive)")
    p2m_pfns: Array[int] = array(8, "PFNs of the frames that hold the list, in order")


class VcpuRecord(LibxcRecord):
    """What the four VCPU records share: opaque state of one virtual processor."""

    vcpu_id: int = u32("the virtual processor")
    reserved1: int = reserved(4, default=0)
    context: bytes = octets("state as the record's hypercall gives it")


class X86PvVcpuBasic(VcpuRecord, code=0x04, type="X86_PV_VCPU_BASIC"):
    """Registers of a PV vCPU (XEN_DOMCTL_getvcpucontext): 2800 octets for 32-bit guests, 5168 for 64-bit."""


class X86PvVcpuExtended(VcpuRecord, code=0x05, type="X86_PV_VCPU_EXTENDED"):
    """Extended context of a PV vCPU (XEN_DOMCTL_get_ext_vcpucontext): at most 128 octets."""


class X86PvVcpuXsave(VcpuRecord, code=0x06, type="X86_PV_VCPU_XSAVE"):
    """Extended processor state of a PV vCPU (XEN_DOMCTL_getvcpuextstate): at least 16 octets."""


class SharedInfo(LibxcRecord, code=0x07, type="SHARED_INFO"):
    """A PV guest's shared info page: exactly one page."""

    shared_info: bytes = octets("content of the page")


class X86TscInfo(LibxcRecord, code=0x08, type="X86_TSC_INFO"):
    """The guest's time stamp counter (XEN_DOMCTL_gettscinfo)."""

    mode: int = u32("TSC mode", names=TscMode)
    khz: int = u32("frequency", unit="kHz")
    nsec: int = u64("time elapsed", unit="ns")
    incarnation: int = u32("how often the domain was restored")
    reserved1: int = reserved(4, default=0)


class HvmContext(LibxcRecord, code=0x09, type="HVM_CONTEXT"):
    """An HVM guest's processors and platform devices, as Xen saves them (XEN_DOMCTL_gethvmcontext)."""

    hvm_ctx: bytes = octets("Xen's HVM save records")


class HvmParamEntry(Declaration):
    """One HVM parameter."""

    index: int = u64("which one, HVM_PARAM_*", names=HvmParam)
    value: int = u64("its value")


class HvmParams(LibxcRecord, code=0x0A, type="HVM_PARAMS"):
    """HVM parameters (HVMOP_get_param)."""

    count: int = u32("number of parameters", counts="params", default=COUNTED)
    reserved1: int = reserved(4, default=0)
    params: Array[HvmParamEntry] = array(HvmParamEntry, "the parameters", counted_by="count")


class Toolstack(LibxcRecord, code=0x0B, type="TOOLSTACK"):
    """A blob of the toolstack's. Deprecated: it stood in streams only while the format was developed."""

    data: bytes = octets("the blob")


class X86PvVcpuMsrs(VcpuRecord, code=0x0C, type="X86_PV_VCPU_MSRS"):
    """Model specific registers of a PV vCPU (XEN_DOMCTL_get_vcpu_msrs): entries of 16 octets."""


class Verify(LibxcRecord, code=0x0D, type="VERIFY"):
    """All memory has been sent; pages after this one are sent again to be compared. No body."""


class Checkpoint(LibxcRecord, code=0x0E, type="CHECKPOINT"):
    """What stands before is one consistent state. Inside libxl, libxl's records follow. No body."""


class CheckpointDirtyPfnList(LibxcRecord, code=0x0F, type="CHECKPOINT_DIRTY_PFN_LIST"):
    """Pages that COLO's secondary wrote: only on the back channel, secondary to primary."""

    pfns: Array[int] = array(8, "the PFNs, in no order")


class StaticDataEnd(LibxcRecord, code=0x10, type="STATIC_DATA_END"):
    """What does not change while a guest runs ends here. Mandatory since version 3. No body."""


class CpuidLeaf(Declaration):
    """One CPUID leaf (xen_cpuid_leaf_t)."""

    NO_SUBLEAF: ClassVar[int] = 0xFFFF_FFFF

    leaf: int = u32("leaf, the value of EAX asked with")
    subleaf: int = u32("subleaf, the value of ECX asked with; all ones: the leaf has none")
    a: int = u32("EAX")
    b: int = u32("EBX")
    c: int = u32("ECX")
    d: int = u32("EDX")


class X86CpuidPolicy(LibxcRecord, code=0x11, type="X86_CPUID_POLICY"):
    """What CPUID tells the guest (XEN_DOMCTL_get_cpu_policy)."""

    leaves: Array[CpuidLeaf] = array(CpuidLeaf, "the leaves")


class MsrEntry(Declaration):
    """One model specific register (xen_msr_entry_t)."""

    idx: int = u32("index of the register")
    flags: int = reserved(4, default=0)
    val: int = u64("its value")


class X86MsrPolicy(LibxcRecord, code=0x12, type="X86_MSR_POLICY"):
    """What the guest may see of model specific registers (XEN_DOMCTL_get_cpu_policy)."""

    msrs: Array[MsrEntry] = array(MsrEntry, "the registers")


class Hypervisor(IntEnum):
    """What ran the machine that an image was taken of."""

    UNKNOWN = 0
    QEMU = 1
    PROCESS = 2  # none: a process's memory, its pages numbered by address without gaps


class Origin(LibxcRecord, code=0xCD53_0001, type="ORIGIN"):
    """Where an image comes from that Xen did not make. Ours, optional: other readers pass over it.

    The memory of an x86 machine of this kind is one piece, of which ``ram_below_4g`` octets lie at address
    0 and the rest, if any, at ``ram_above_base``.
    """

    hypervisor: int = u32("what ran the machine", names=Hypervisor)
    vcpus: int = u32("number of virtual processors")
    ram_size: int = u64("memory of the machine", unit="octets")
    ram_below_4g: int = u64("memory from guest-physical address 0", unit="octets")
    ram_above_base: int = u64("guest-physical address of the rest; 0: there is none", default=0)
    data: bytes = octets("names and values in turn, each ended by NUL: version, machine, accelerator, ...")

    @property
    def properties(self) -> dict[str, str]:
        """The names and values. Raises `FormatError` where the data are no pairs of strings."""
        return dict(parse_pairs(self.data, what="origin", offset=self.head_size))

    @staticmethod
    def pack(properties: Iterable[tuple[str, str]]) -> bytes:
        """Return ``properties`` in the form of `data`."""
        return pack_pairs(properties, what="origin")
