"""The words that the cases are written in: records and whole images, packed by hand from the specification.

`tests.build` has records, headers and envelopes; here are the records of a guest that can be restored, of
either type. Nothing in this package but the decoded JSON comes from migstream.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tests.build import (
    CHECKPOINT,
    CHECKPOINT_END,
    CHECKPOINT_STATE,
    EMULATOR_CONTEXT,
    END,
    HVM_CONTEXT,
    HVM_PARAMS,
    LIBXC_CONTEXT,
    STATIC_DATA_END,
    X86_PV_INFO,
    X86_PV_P2M_FRAMES,
    X86_TSC_INFO,
    XENSTORE_DATA,
    header,
    libxl,
    page,
    page_data,
    record,
    segment,
    xl,
)

VCPU_BASIC, VCPU_XSAVE, SHARED_INFO, TOOLSTACK, VCPU_MSRS = 0x04, 0x06, 0x07, 0x0B, 0x0C
DIRTY_PFN_LIST, CPUID_POLICY, MSR_POLICY = 0x0F, 0x11, 0x12
OPTIONAL = 0x8000_0000

# Page types: bits 63-60 of a PAGE_DATA entry.
NOTAB, L1TAB, L2TAB, L3TAB, L4TAB, PIN = 0, 1, 2, 3, 4, 8
BROKEN, XALLOC, XTAB = 0xD, 0xE, 0xF


def entry(type: int, pfn: int) -> int:
    """Return a PAGE_DATA entry."""
    return type << 60 | pfn


def patched(octets: bytes, offset: int, new: bytes) -> bytes:
    """Return ``octets`` with ``new`` in place of what stands at ``offset``."""
    return octets[:offset] + new + octets[offset + len(new) :]


# Static data. A leaf is leaf, subleaf (all ones: none), EAX to EDX; an MSR is index, reserved, value.
LEAF = struct.pack("<6I", 0, 0xFFFF_FFFF, 13, 1, 2, 3)
MSR_ENTRY = struct.pack("<IIQ", 0xCE, 0, 1 << 31)
CPUID, MSR = record(CPUID_POLICY, LEAF), record(MSR_POLICY, MSR_ENTRY)
STATIC_END = record(STATIC_DATA_END)
STATIC = CPUID + MSR + STATIC_END

# State. TSC_INFO is mode, kHz, nanoseconds, incarnation, reserved; a parameter is index, value.
TSC_BODY = struct.pack("<IIQII", 0, 2_000_000, 77, 1, 0)
TSC = record(X86_TSC_INFO, TSC_BODY)
STORE_PFN, STORE_EVTCHN, PAE_ENABLED, CONSOLE_PFN = 1, 2, 4, 17
CONTEXT = record(HVM_CONTEXT, b"context!")


def params(*pairs: tuple[int, int]) -> bytes:
    """Return an HVM_PARAMS record: count, reserved, then index and value of each."""
    return record(
        HVM_PARAMS, struct.pack("<II", len(pairs), 0) + b"".join(struct.pack("<QQ", *p) for p in pairs)
    )


PARAMS = params((STORE_PFN, 1))
PAGES = page_data([0, 1], page(1) + page(2))
TAIL = TSC + PARAMS + CONTEXT
ENDED = record(END)


def hvm(*parts: bytes, version: int = 3) -> bytes:
    """Return the headers of an HVM image and ``parts``."""
    return header(version=version) + b"".join(parts)


def in_hvm(*parts: bytes) -> bytes:
    """Return a whole HVM image with ``parts`` between the pages and the state."""
    return hvm(STATIC, PAGES, *parts, TAIL, ENDED)


WHOLE = in_hvm()


# PV. Where things lie in a vCPU's context and the start info page, by the guest's word size: what
# xen/include/public/arch-x86/xen.h (struct vcpu_guest_context) and xen.h (struct start_info) come to.
@dataclass(frozen=True)
class _Offsets:
    context_size: int
    word: str
    edx: int
    gdt_frames: int
    gdt_entries: int
    cr1: int
    cr3: int
    store_mfn: int
    console_mfn: int


_OFFSETS = {
    4: _Offsets(2800, "<I", 524, 2640, 2704, 2720, 2728, 44, 52),
    8: _Offsets(5168, "<Q", 616, 4832, 4960, 4992, 5008, 56, 72),
}


def vcpu(code: int, context: bytes, vcpu_id: int = 0, reserved: int = 0) -> bytes:
    """Return one of the VCPU records: vcpu_id, reserved, context."""
    return record(code, struct.pack("<II", vcpu_id, reserved) + context)


def pv_info(width: int, levels: int, reserved: bytes = bytes(6)) -> bytes:
    """Return an X86_PV_INFO record."""
    return record(X86_PV_INFO, struct.pack("<BB", width, levels) + reserved)


def p2m_frames(start: int, end: int, frames: Sequence[int]) -> bytes:
    """Return an X86_PV_P2M_FRAMES record."""
    return record(X86_PV_P2M_FRAMES, struct.pack(f"<II{len(frames)}Q", start, end, *frames))


@dataclass(frozen=True)
class PvGuest:
    """A PV guest of 1024 PFNs and ten pages, as small as one can be; a case changes what it is about.

    PFN 0 is ordinary, 1 the xenstore ring, 2 the console ring, 3 the start info page, 4 the guest's list of
    frames, 5 the top page table, 6 to 8 the tables below it, 9 the GDT.
    """

    width: int = 8
    start_info: int = 3
    store: int = 1
    console: int = 2
    gdt_entries: int = 512
    gdt_frame: int = 9
    cr3: int = 5
    cr1: int | None = None
    p2m: Sequence[int] = (4, 4)
    types: Mapping[int, int] = field(default_factory=dict)  # PFN -> page type, instead of the usual
    tables: Mapping[int, Sequence[int]] = field(default_factory=dict)  # PFN -> PFNs that its entries name

    @property
    def offsets(self) -> _Offsets:
        """Where things lie."""
        return _OFFSETS[self.width]

    def info(self) -> bytes:
        """Return X86_PV_INFO: (4, 3) or (8, 4)."""
        return pv_info(self.width, {4: 3, 8: 4}[self.width])

    def p2m_frames(self) -> bytes:
        """Return X86_PV_P2M_FRAMES for PFNs 0 to 1023: one frame of 4-octet entries, or two of 8."""
        return p2m_frames(0, 0x3FF, self.p2m[: self.width // 4])

    def memory(self) -> bytes:
        """Return a PAGE_DATA record with all of the guest's memory."""
        top = L4TAB if self.width == 8 else L3TAB
        usual = {5: PIN | top, 6: L3TAB if self.width == 8 else L2TAB, 7: L2TAB, 8: L1TAB}
        types = dict.fromkeys(range(10), NOTAB) | usual | dict(self.types)
        start_info = bytearray(4096)
        struct.pack_into(self.offsets.word, start_info, self.offsets.store_mfn, self.store)
        struct.pack_into(self.offsets.word, start_info, self.offsets.console_mfn, self.console)
        content = {3: bytes(start_info)}
        for pfn, frames in self.tables.items():
            present = 7  # an entry is the frame's address, and the bits present, writable, user
            content[pfn] = struct.pack(f"<{len(frames)}Q", *[f << 12 | present for f in frames]).ljust(
                4096, b"\0"
            )
        pages = [content.get(pfn, bytes(4096)) for pfn, type in types.items() if type < BROKEN]
        return page_data([entry(type, pfn) for pfn, type in types.items()], b"".join(pages))

    def context(self) -> bytes:
        """Return the vcpu_guest_context of vCPU 0."""
        at, context = self.offsets, bytearray(self.offsets.context_size)
        struct.pack_into(at.word, context, at.edx, self.start_info)
        struct.pack_into(at.word, context, at.gdt_frames, self.gdt_frame)
        struct.pack_into(at.word, context, at.gdt_entries, self.gdt_entries)
        struct.pack_into(at.word, context, at.cr3, self.cr3 << 12)
        if self.cr1 is not None:
            struct.pack_into(at.word, context, at.cr1, self.cr1 << 12 | 1)
        return bytes(context)

    def basic(self, vcpu_id: int = 0) -> bytes:
        """Return X86_PV_VCPU_BASIC."""
        return vcpu(VCPU_BASIC, self.context(), vcpu_id)

    def static(self) -> bytes:
        """Return the static data, its end included."""
        return self.info() + STATIC

    def state(self) -> bytes:
        """Return TSC, shared info and vCPU 0."""
        return TSC + SHARED + self.basic()

    def image(self, *more: bytes) -> bytes:
        """Return the whole image, with ``more`` behind the vCPU."""
        return pv(self.static(), self.p2m_frames(), self.memory(), self.state(), *more, ENDED)


SHARED = record(SHARED_INFO, bytes(4096))
PV = PvGuest()


def pv(*parts: bytes, version: int = 3) -> bytes:
    """Return the headers of a PV image and ``parts``."""
    return header(guest=1, version=version) + b"".join(parts)


def in_pv(*parts: bytes) -> bytes:
    """Return a whole PV image with ``parts`` behind the state."""
    return PV.image(*parts)


PV_WHOLE = in_pv()

# libxl. An emulator's records start with its id (2: QEMU upstream) and its index.
EMULATOR = struct.pack("<II", 2, 0)
QEMU = record(EMULATOR_CONTEXT, EMULATOR + b"QEVM")
XENSTORE = record(XENSTORE_DATA, EMULATOR + b"physmap/f0000000/size\x00800000\0")
CONTEXT_FOLLOWS = record(LIBXC_CONTEXT)
NESTED = libxl(CONTEXT_FOLLOWS, WHOLE, QEMU, ENDED)
XL_FILE = xl(NESTED)
LIBXC_SEGMENT = segment(0xF0, WHOLE, 0)
CHECKPOINTED = record(CHECKPOINT)
CHECKPOINT_COMPLETE = record(CHECKPOINT_END)
FIRST_CHECKPOINT = hvm(STATIC, PAGES, TAIL, CHECKPOINTED)
REMUS = libxl(CONTEXT_FOLLOWS, FIRST_CHECKPOINT, CHECKPOINT_COMPLETE)


def in_libxl(*parts: bytes) -> bytes:
    """Return a whole libxl stream with ``parts`` behind the image."""
    return libxl(CONTEXT_FOLLOWS, WHOLE, *parts, ENDED)


def colo_state(control_id: int, body: bytes = b"") -> bytes:
    """Return a CHECKPOINT_STATE record."""
    return record(CHECKPOINT_STATE, struct.pack("<I", control_id) + body)


def entries(*values: int, pages: bytes = b"") -> bytes:
    """Return a PAGE_DATA record of ``values`` with ``pages``."""
    return page_data(list(values), pages)
