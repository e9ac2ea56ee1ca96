"""The state of a model machine beside its memory, as records: processors, timers, parameters, policies.

All of it is made from a seed and a count of ticks, so that two checkpoints of a running machine differ
and the same machine at the same moment does not.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass

from migstream.records import Record, array_of
from migstream.records.hvm_params import HvmParam
from migstream.records.libxc import (
    CpuidLeaf,
    HvmContext,
    HvmParamEntry,
    HvmParams,
    MsrEntry,
    SharedInfo,
    TscMode,
    X86CpuidPolicy,
    X86MsrPolicy,
    X86PvInfo,
    X86PvVcpuBasic,
    X86PvVcpuExtended,
    X86PvVcpuMsrs,
    X86PvVcpuXsave,
    X86TscInfo,
)
from migstream.records.pv_state import CONTEXT_ONLINE, GDT_ENTRIES_PER_FRAME, PV_LAYOUTS

__all__ = ["HvmPlaces", "PvPlaces", "hvm_state", "policies", "pv_info", "pv_state"]

PV = PV_LAYOUTS[8]  # model PV guests are 64-bit
TSC_KHZ = 2_893_300
NS_PER_TICK = 1_000_000
NO_SUBLEAF = CpuidLeaf.NO_SUBLEAF

# leaf, subleaf, EAX, EBX, ECX, EDX: what a small 64-bit machine says of itself ("GenuineIntel").
CPUID = (
    (0x0000_0000, NO_SUBLEAF, 0xD, 0x756E_6547, 0x6C65_746E, 0x4965_6E69),
    (0x0000_0001, NO_SUBLEAF, 0x306E4, 0x0010_0800, 0xF7FA_3203, 0x1789_FBFF),
    (0x0000_0007, 0, 0, 0x0000_0281, 0, 0xBC00_0400),
    (0x0000_000D, 0, 7, 0x340, 0x340, 0),
    (0x0000_000D, 1, 1, 0, 0, 0),
    (0x0000_000D, 2, 0x100, 0x240, 0, 0),
    (0x8000_0000, NO_SUBLEAF, 0x8000_0008, 0, 0, 0),
    (0x8000_0001, NO_SUBLEAF, 0, 0, 0x121, 0x2C10_0800),
    (0x8000_0008, NO_SUBLEAF, 0x3030, 0x1000, 0, 0),
)
# MSR_INTEL_PLATFORM_INFO with CPUID faulting, MSR_ARCH_CAPABILITIES.
MSRS = ((0xCE, 0x8000_0000), (0x10A, 0x0000_006B))


@dataclass(frozen=True)
class HvmPlaces:
    """PFNs of an HVM guest's rings and special pages."""

    store: int
    console: int
    ioreq: int
    buffered_ioreq: int
    ident_pt: int


@dataclass(frozen=True)
class PvPlaces:
    """PFNs of what a PV guest's processors refer to."""

    start_info: int
    gdt: int
    top_table: int  # CR3: the kernel's L4
    user_table: int  # CR1: the user's L4
    n_pages: int


def policies() -> list[Record]:
    """Return the CPUID and MSR policies."""
    leaves = [CpuidLeaf(leaf=le, subleaf=s, a=a, b=b, c=c, d=d) for le, s, a, b, c, d in CPUID]
    msrs = [MsrEntry(idx=idx, val=val) for idx, val in MSRS]
    return [
        X86CpuidPolicy(leaves=array_of(CpuidLeaf, leaves)),
        X86MsrPolicy(msrs=array_of(MsrEntry, msrs)),
    ]


def pv_info() -> Record:
    """Return the shape of the model's PV guests: 64-bit."""
    return X86PvInfo(guest_width=PV.guest_width, pt_levels=PV.pt_levels)


def hvm_state(places: HvmPlaces, *, vcpus: int, seed: int, ticks: int) -> list[Record]:
    """Return an HVM guest's state, in the order in which Xen saves it."""
    params = {
        HvmParam.STORE_PFN: places.store,
        HvmParam.IOREQ_PFN: places.ioreq,
        HvmParam.BUFIOREQ_PFN: places.buffered_ioreq,
        HvmParam.CONSOLE_PFN: places.console,
        HvmParam.ACPI_IOPORTS_LOCATION: 1,
        HvmParam.IDENT_PT: places.ident_pt << 12,
        HvmParam.X87_FIP_WIDTH: 8,
    }
    entries = [HvmParamEntry(index=index, value=value) for index, value in params.items()]
    return [
        _tsc(ticks),
        HvmContext(hvm_ctx=_hvm_context(vcpus, seed, ticks)),
        HvmParams(params=array_of(HvmParamEntry, entries)),
    ]


def pv_state(places: PvPlaces, *, vcpus: int, seed: int, ticks: int) -> list[Record]:
    """Return a PV guest's state, in the order in which Xen saves it. Frames in it are PFNs."""
    records: list[Record] = [_tsc(ticks), SharedInfo(shared_info=_shared_info(places, ticks))]
    for vcpu_id in range(vcpus):
        chance = _chance(seed, ticks, vcpu_id)
        extended = struct.pack("<II", vcpu_id, 128) + chance.randbytes(120)
        # xfeature_mask and xcr0_accum (x87, SSE, AVX), then the legacy area and header of XSAVE.
        xsave = struct.pack("<QQ", 7, 7) + chance.randbytes(576)
        msrs = b"".join(
            struct.pack("<IIQ", index, 0, chance.getrandbits(47)) for index in (0x140, 0xC000_0103)
        )
        records += [
            X86PvVcpuBasic(vcpu_id=vcpu_id, context=_vcpu_context(places, vcpu_id, chance)),
            X86PvVcpuExtended(vcpu_id=vcpu_id, context=extended),
            X86PvVcpuXsave(vcpu_id=vcpu_id, context=xsave),
            X86PvVcpuMsrs(vcpu_id=vcpu_id, context=msrs),
        ]
    return records


def _chance(seed: int, ticks: int, vcpu_id: int) -> random.Random:
    return random.Random(f"vcpu {seed} {ticks} {vcpu_id}")  # noqa: S311 - a model, not a secret


def _tsc(ticks: int) -> Record:
    return X86TscInfo(mode=TscMode.DEFAULT, khz=TSC_KHZ, nsec=ticks * NS_PER_TICK, incarnation=0)


def _vcpu_context(places: PvPlaces, vcpu_id: int, chance: random.Random) -> bytes:
    """vcpu_guest_context of a suspended guest, as arch-x86/xen.h and Xen's restore want it."""
    layout = PV.vcpu_context
    context = bytearray(layout.size)
    context[: layout.flags.offset] = chance.randbytes(layout.flags.offset)  # the FPU's registers
    layout.flags.set(context, CONTEXT_ONLINE | 1 << 2)  # VGCF_in_kernel
    if vcpu_id == 0:
        layout.edx.set(context, places.start_info)
    layout.gdt_ents.set(context, GDT_ENTRIES_PER_FRAME)
    layout.gdt_frames[0].set(context, places.gdt)
    layout.ctrlreg[0].set(context, 0x8005_0033)
    layout.ctrlreg[1].set(context, places.user_table << 12 | 1)
    layout.ctrlreg[3].set(context, PV.pfn_to_cr3(places.top_table))
    layout.ctrlreg[4].set(context, 0x2660)
    return bytes(context)


def _shared_info(places: PvPlaces, ticks: int) -> bytes:
    page = bytearray(4096)
    page[:8] = ticks.to_bytes(8, "little")  # within vcpu_info: some event is always pending
    PV.shared_info.max_pfn.set(page, places.n_pages)
    PV.shared_info.p2m_generation.set(page, 2 * ticks)
    return bytes(page)


# HVM context: descriptors (typecode u16, instance u16, length u32), each with its body
# (xen/include/public/hvm/save.h and arch-x86/hvm/save.h).

HVM_END, HVM_HEADER, HVM_CPU, HVM_LAPIC, HVM_LAPIC_REGS = 0, 1, 2, 5, 6
HVM_FILE_MAGIC = 0x5438_1286
CPU_SIZE = 1032  # struct hvm_hw_cpu


def _hvm_context(vcpus: int, seed: int, ticks: int) -> bytes:
    header = struct.pack("<IIQII", HVM_FILE_MAGIC, 1, 0, CPUID[1][2], TSC_KHZ)
    parts = [(HVM_HEADER, 0, header)]
    parts += [(HVM_CPU, i, _hvm_cpu(_chance(seed, ticks, i), ticks)) for i in range(vcpus)]
    # apic_base_msr (enabled; the first is the boot processor), disabled, timer_divisor, tdt_msr
    lapics = [struct.pack("<QIIQ", 0xFEE0_0800 | (i == 0) << 8, 0, 2, 0) for i in range(vcpus)]
    parts += [(HVM_LAPIC, i, lapic) for i, lapic in enumerate(lapics)]
    parts += [(HVM_LAPIC_REGS, i, _chance(seed, 0, i).randbytes(1024)) for i in range(vcpus)]
    parts += [(HVM_END, 0, b"")]
    return b"".join(struct.pack("<HHI", code, instance, len(body)) + body for code, instance, body in parts)


def _hvm_cpu(chance: random.Random, ticks: int) -> bytes:
    cpu = bytearray(CPU_SIZE)
    cpu[:640] = chance.randbytes(640)  # FPU and the sixteen general registers
    for offset, value in (
        (640, 0xFFFF_FFFF_8100_0000 | chance.getrandbits(20)),  # rip
        (648, 0x246),  # rflags
        (656, 0x8005_0033),  # cr0
        (672, chance.getrandbits(20) << 12),  # cr3
        (680, 0x606F0),  # cr4
        (992, 0xD01),  # msr_efer
        (1008, ticks * NS_PER_TICK * TSC_KHZ // 1_000_000),  # tsc
        (1024, 1),  # flags: the FPU is initialised
    ):
        cpu[offset : offset + 8] = value.to_bytes(8, "little")
    return bytes(cpu)
