"""libxc streams put together from declarations: what the restore engine's tests are fed.

`build` has bytes by hand from the specification; the declarations are held against those elsewhere. Here
whole streams matter: guests of a few pages, and each of their records replaceable.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from migstream.records import Declaration, Record, array_of, libxc
from migstream.records.hvm_params import HvmParam
from migstream.records.libxc import GuestType
from migstream.records.page_types import TYPE_SHIFT, PageType
from migstream.records.pv_state import PV_LAYOUTS

PAGE = 4096
NOTAB = PageType.NOTAB

STATIC_DATA_END, VERIFY, CHECKPOINT, END = (
    libxc.StaticDataEnd(),
    libxc.Verify(),
    libxc.Checkpoint(),
    libxc.End(),
)
CPUID = libxc.X86CpuidPolicy(
    leaves=array_of(libxc.CpuidLeaf, [libxc.CpuidLeaf(leaf=0, subleaf=0xFFFF_FFFF, a=13, b=1, c=2, d=3)])
)
MSRS = libxc.X86MsrPolicy(msrs=array_of(libxc.MsrEntry, [libxc.MsrEntry(idx=0x10A, val=5)]))
TSC = libxc.X86TscInfo(mode=1, khz=2_600_000, nsec=77, incarnation=3)
CONTEXT = libxc.HvmContext(hvm_ctx=bytes(range(64)))


def params(**values: int) -> libxc.HvmParams:
    """Return HVM_PARAMS by name, such as ``STORE_PFN=5``."""
    entries = [libxc.HvmParamEntry(index=HvmParam[name], value=value) for name, value in values.items()]
    return libxc.HvmParams(params=array_of(libxc.HvmParamEntry, entries))


PARAMS = params(STORE_PFN=5, CONSOLE_PFN=8)
TAIL = (TSC, CONTEXT, PARAMS)


def headers(guest: GuestType = GuestType.HVM, *, version: int = 3, **domain: int) -> bytes:
    """Return an image and a domain header."""
    image = libxc.ImageHeader(version=version)
    return image.build("big") + libxc.DomainHeader(type=guest, xen_major=4, xen_minor=17, **domain).build()


def raw(code: int, body: bytes = b"", *, padding: int = 0) -> bytes:
    """Return any record, with padding of that octet."""
    return struct.pack("<II", code, len(body)) + body + bytes([padding]) * (-len(body) % 8)


def record(item: Record | bytes) -> bytes:
    """Return a record's octets; octets pass as they are."""
    return item if isinstance(item, bytes) else raw(item.type_code, item.build())


def stream(*items: Declaration | bytes, guest: GuestType = GuestType.HVM, version: int = 3) -> bytes:
    """Return headers and records."""
    body = b"".join(record(item) for item in items if isinstance(item, Record | bytes))
    return headers(guest, version=version) + body


def page(fill: int) -> bytes:
    """Return a page of one octet."""
    return bytes([fill]) * PAGE


def page_data(entries: Iterable[tuple[int, int]], content: bytes) -> bytes:
    """Return a PAGE_DATA record of (PFN, type) and the pages that belong to it."""
    words = [type << TYPE_SHIFT | pfn for pfn, type in entries]
    return raw(0x01, struct.pack(f"<II{len(words)}Q", len(words), 0, *words) + content)


def pages(first: int, fills: Sequence[int]) -> bytes:
    """Return a PAGE_DATA record of ordinary pages from PFN ``first``, each of one octet."""
    return page_data([(first + i, NOTAB) for i in range(len(fills))], b"".join(map(page, fills)))


def hvm(*middle: Record | bytes) -> bytes:
    """Return a plain image of an HVM guest, ``middle`` between its static data and its state."""
    return stream(CPUID, MSRS, STATIC_DATA_END, *middle, *TAIL, END)


@dataclass
class PvGuest:
    """A PV guest of 1024 PFNs and ten pages, as small as one can be; change what a test is about.

    PFNs 0-2 are ordinary (1 xenstore ring, 2 console ring), 3 the start info, 4 the p2m, 5 the top page
    table, 6-8 the tables below it, 9 the GDT.
    """

    width: int = 8
    edx: int = 3
    store: int = 1
    console: int = 2
    gdt_entries: int = 512
    gdt_frame: int = 9
    cr3: int = 5
    cr1: int | None = 5
    p2m: Sequence[int] | None = None
    p2m_end: int = 1023
    types: dict[int, int] = field(default_factory=dict)
    tables: dict[int, Sequence[int]] = field(default_factory=dict)

    def info(self) -> libxc.X86PvInfo:
        return libxc.X86PvInfo(guest_width=self.width, pt_levels=PV_LAYOUTS[self.width].pt_levels)

    def p2m_frames(self) -> libxc.X86PvP2mFrames:
        frames = self.p2m if self.p2m is not None else [4] * (self.p2m_end * self.width // PAGE + 1)
        return libxc.X86PvP2mFrames(p2m_start_pfn=0, p2m_end_pfn=self.p2m_end, p2m_pfns=array_of(8, frames))

    def memory(self) -> bytes:
        top = PageType.L4TAB_PIN if self.width == 8 else PageType.L3TAB_PIN
        types = dict.fromkeys(range(10), int(NOTAB)) | {5: int(top), 6: 3, 7: 2, 8: 1} | self.types
        start_info = bytearray(PAGE)
        layout = PV_LAYOUTS[self.width].start_info
        layout.store_mfn.set(start_info, self.store)
        layout.console_mfn.set(start_info, self.console)
        content = {3: bytes(start_info)}
        for pfn, frames in self.tables.items():
            content[pfn] = struct.pack("<512Q", *[f << 12 | 7 for f in frames], *[0] * (512 - len(frames)))
        with_data = [p for p, t in types.items() if PageType(t).has_data]
        return page_data(types.items(), b"".join(content.get(p, bytes(PAGE)) for p in with_data))

    def basic(self, vcpu_id: int = 0) -> libxc.X86PvVcpuBasic:
        layout = PV_LAYOUTS[self.width]
        state = layout.vcpu_context
        context = bytearray(state.size)
        state.edx.set(context, self.edx)
        state.gdt_ents.set(context, self.gdt_entries)
        state.gdt_frames[0].set(context, self.gdt_frame)
        state.ctrlreg[3].set(context, layout.pfn_to_cr3(self.cr3))
        if self.cr1 is not None and self.width == 8:
            state.ctrlreg[1].set(context, self.cr1 << 12 | 1)
        return libxc.X86PvVcpuBasic(vcpu_id=vcpu_id, context=bytes(context))

    def stream(self, *more: Record | bytes, version: int = 3) -> bytes:
        """Return the guest's image, ``more`` behind its processor."""
        static = (self.info(), CPUID, MSRS, STATIC_DATA_END) if version >= 3 else (self.info(),)
        return stream(
            *static,
            self.p2m_frames(),
            self.memory(),
            self.basic(),
            *more,
            TSC,
            END,
            guest=GuestType.PV,
            version=version,
        )
