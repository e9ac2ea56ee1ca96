"""What lies where in the state of a PV guest: vCPU context, start info page, shared info page.

A PV restore has to turn PFNs in these into the target's frames, and to check them on the way; a PV guest
that is made here has to hold them. The layouts are those that a 32-bit and a 64-bit guest see, whatever
the tools are: ``PV_LAYOUTS[guest_width]``.

Source: xen/include/public/xen.h (start_info, shared_info), arch-x86/xen.h (vcpu_guest_context,
arch_shared_info), arch-x86/xen-x86_32.h and xen-x86_64.h (cpu_user_regs, xen_pfn_to_cr3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = [
    "CONTEXT_ONLINE",
    "GDT_ENTRIES_MAX",
    "GDT_ENTRIES_PER_FRAME",
    "PV_LAYOUTS",
    "Integer",
    "PvLayout",
    "SharedInfoLayout",
    "StartInfoLayout",
    "VcpuContextLayout",
]

CONTEXT_ONLINE = 1 << 5  # VGCF_online, a bit of vcpu_guest_context.flags
GDT_ENTRIES_PER_FRAME = 512
GDT_ENTRIES_MAX = 14 * GDT_ENTRIES_PER_FRAME  # FIRST_RESERVED_GDT_ENTRY: the rest of the table is Xen's


@dataclass(frozen=True)
class Integer:
    """A little-endian unsigned integer of ``size`` octets at ``offset`` of a structure."""

    offset: int
    size: int

    def get(self, structure: bytes | bytearray | memoryview) -> int:
        """Return its value in ``structure``."""
        return int.from_bytes(structure[self.offset : self.offset + self.size], "little")

    def set(self, structure: bytearray | memoryview, value: int) -> None:
        """Write ``value`` into ``structure``; raises `OverflowError` where it does not fit."""
        structure[self.offset : self.offset + self.size] = value.to_bytes(self.size, "little")


@dataclass(frozen=True)
class VcpuContextLayout:
    """vcpu_guest_context: the body of X86_PV_VCPU_BASIC."""

    size: int  # octets
    flags: Integer  # VGCF_*
    edx: Integer  # user_regs.edx; on vCPU 0 of a suspended guest: PFN of the start info page
    gdt_frames: tuple[Integer, ...]  # PFNs of the GDT's frames, as many as gdt_ents needs
    gdt_ents: Integer  # entries of the GDT
    ctrlreg: tuple[Integer, ...]  # CR0 to CR7; 3: top page table; 1 (64-bit): user page table, bit 0: valid

    def used_gdt_frames(self, context: bytes | bytearray | memoryview) -> Iterator[Integer]:
        """Yield those of `gdt_frames` that ``gdt_ents`` entries need."""
        yield from self.gdt_frames[: -(-self.gdt_ents.get(context) // GDT_ENTRIES_PER_FRAME)]


@dataclass(frozen=True)
class StartInfoLayout:
    """start_info: the page at vCPU 0's edx. Its frame numbers are PFNs while the guest is suspended."""

    nr_pages: Integer
    shared_info: Integer  # machine address
    flags: Integer
    store_mfn: Integer
    store_evtchn: Integer
    console_mfn: Integer
    console_evtchn: Integer


@dataclass(frozen=True)
class SharedInfoLayout:
    """shared_info: what Xen and the guest tell each other, one page."""

    max_pfn: Integer  # arch.max_pfn: entries of the p2m
    frame_list_list: Integer  # arch.pfn_to_mfn_frame_list_list: root of the p2m tree
    p2m_cr3: Integer  # arch.p2m_cr3, p2m_vaddr, p2m_generation: the p2m as a virtually mapped list
    p2m_vaddr: Integer
    p2m_generation: Integer


@dataclass(frozen=True)
class PvLayout:
    """All of it, for guests of one word size."""

    guest_width: int  # octets of a word
    pt_levels: int  # levels of page tables
    vcpu_context: VcpuContextLayout
    start_info: StartInfoLayout
    shared_info: SharedInfoLayout

    @property
    def p2m_entries_per_frame(self) -> int:
        """Entries of the guest's own p2m in one of its frames."""
        return 4096 // self.guest_width

    def cr3_to_pfn(self, cr3: int) -> int:
        """Return the frame that a CR3 value names; 32-bit guests fold its top 12 bits into the low ones."""
        if self.guest_width == 8:
            return cr3 >> 12
        return (cr3 >> 12 | cr3 << 20) & 0xFFFF_FFFF

    def pfn_to_cr3(self, pfn: int) -> int:
        """Return the CR3 value that names frame ``pfn``."""
        if self.guest_width == 8:
            return pfn << 12
        return (pfn << 12 | pfn >> 20) & 0xFFFF_FFFF


def _words(offset: int, size: int, count: int) -> tuple[Integer, ...]:
    return tuple(Integer(offset + i * size, size) for i in range(count))


#: guest_width -> layouts.
PV_LAYOUTS: dict[int, PvLayout] = {
    4: PvLayout(
        guest_width=4,
        pt_levels=3,
        vcpu_context=VcpuContextLayout(
            size=2800,
            flags=Integer(512, 4),
            edx=Integer(524, 4),
            gdt_frames=_words(2640, 4, 16),
            gdt_ents=Integer(2704, 4),
            ctrlreg=_words(2716, 4, 8),
        ),
        start_info=StartInfoLayout(
            nr_pages=Integer(32, 4),
            shared_info=Integer(36, 4),
            flags=Integer(40, 4),
            store_mfn=Integer(44, 4),
            store_evtchn=Integer(48, 4),
            console_mfn=Integer(52, 4),
            console_evtchn=Integer(56, 4),
        ),
        shared_info=SharedInfoLayout(
            max_pfn=Integer(2316, 4),
            frame_list_list=Integer(2320, 4),
            p2m_cr3=Integer(2328, 4),
            p2m_vaddr=Integer(2332, 4),
            p2m_generation=Integer(2336, 4),
        ),
    ),
    8: PvLayout(
        guest_width=8,
        pt_levels=4,
        vcpu_context=VcpuContextLayout(
            size=5168,
            flags=Integer(512, 8),
            edx=Integer(616, 8),  # all of rdx: the tools' name for it covers the whole register
            gdt_frames=_words(4832, 8, 16),
            gdt_ents=Integer(4960, 8),
            ctrlreg=_words(4984, 8, 8),
        ),
        start_info=StartInfoLayout(
            nr_pages=Integer(32, 8),
            shared_info=Integer(40, 8),
            flags=Integer(48, 4),
            store_mfn=Integer(56, 8),
            store_evtchn=Integer(64, 4),
            console_mfn=Integer(72, 8),
            console_evtchn=Integer(80, 4),
        ),
        shared_info=SharedInfoLayout(
            max_pfn=Integer(3088, 8),
            frame_list_list=Integer(3096, 8),
            p2m_cr3=Integer(3112, 8),
            p2m_vaddr=Integer(3120, 8),
            p2m_generation=Integer(3128, 8),
        ),
    ),
}
