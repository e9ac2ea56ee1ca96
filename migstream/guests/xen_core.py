"""Xen's core dumps, as ``xl dump-core`` writes them: an ELF file of sections, without program headers.

``.xen_pages`` holds the pages one after the other; which is which says ``.xen_pfn`` (HVM: a PFN each) or
``.xen_p2m`` (PV: a PFN and a machine frame each). Source: Xen's docs/misc/dump-core-format.txt and
tools/libs/guest/xg_core.c; the order of sections is that of real dumps, on which volatility3 relies.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from migstream.errors import FormatError
from migstream.guests.elf import ELF_HEADER, EM_386, EM_X86_64, SECTION, ElfFile, core_header, note
from migstream.guests.protocols import PAGE_SIZE
from migstream.io import fd as fdio
from migstream.records.libxc import GuestType
from migstream.records.pv_state import PV_LAYOUTS

__all__ = ["CoreFile", "core_head", "core_tail", "frame_list"]

MAGIC = {GuestType.PV: 0xF00FEBED, GuestType.HVM: 0xF00FEBEE}
NOTE_NONE, NOTE_HEADER, NOTE_XEN_VERSION, NOTE_FORMAT_VERSION = range(0x200_0000, 0x200_0004)
FORMAT_VERSION = 1  # 0.1
SHT_PROGBITS, SHT_STRTAB, SHT_NOTE = 1, 3, 7
NO_FRAME = (1 << 64) - 1  # a PFN or frame that is none

#: extra version, compiler, who, where, when, capabilities, changeset, start of Xen's addresses, page size
_XEN_VERSION = struct.Struct("<QQ16s64s16s32s32s1024s64sQQ")
VIRT_START = 0xFFFF_8000_0000_0000  # of a 64-bit Xen, as xen_platform_parameters has it


@dataclass(frozen=True)
class _Shape:
    """Which sections a core has: name, type, octets, alignment, octets of an entry."""

    sections: list[tuple[str, int, int, int, int]]

    @property
    def names(self) -> bytes:
        return b"\0" + b"".join(name.encode() + b"\0" for name, *_ in self.sections)


def _notes(guest: GuestType, vcpus: int, pages: int, xen: tuple[int, int]) -> bytes:
    version = _XEN_VERSION.pack(*xen, b"", b"", b"", b"", b"", b"", b"", VIRT_START, PAGE_SIZE)
    return (
        note(b"Xen", NOTE_NONE, b"")
        + note(b"Xen", NOTE_HEADER, struct.pack("<QQQQ", MAGIC[guest], vcpus, pages, PAGE_SIZE))
        + note(b"Xen", NOTE_XEN_VERSION, version)
        + note(b"Xen", NOTE_FORMAT_VERSION, struct.pack("<Q", FORMAT_VERSION))
    )


def _shape(guest: GuestType, notes: int, contexts: Sequence[bytes], shared_info: bytes, pages: int) -> _Shape:
    context_size = len(contexts[0]) if contexts else 0
    sections = [
        (".shstrtab", SHT_STRTAB, 0, 0, 0),
        (".note.Xen", SHT_NOTE, notes, 0, 0),
        (".xen_prstatus", SHT_PROGBITS, context_size * len(contexts), 8, context_size),
        (".xen_pages", SHT_PROGBITS, pages * PAGE_SIZE, PAGE_SIZE, PAGE_SIZE),
        (".xen_p2m", SHT_PROGBITS, pages * 16, 8, 16)
        if guest is GuestType.PV
        else (".xen_pfn", SHT_PROGBITS, pages * 8, 8, 8),
    ]
    if shared_info:
        sections.insert(3, (".xen_shared_info", SHT_PROGBITS, len(shared_info), 8, len(shared_info)))
    return _Shape(sections)


def core_head(
    guest: GuestType,
    pages: int,
    contexts: Sequence[bytes],
    shared_info: bytes = b"",
    *,
    xen: tuple[int, int] = (0, 0),
) -> bytes:
    """Return what stands before the ``pages`` pages of a core; then come the frame list and `core_tail`.

    ``contexts`` are struct vcpu_guest_context, one a vCPU; ``xen`` the version of Xen, major and minor.
    """
    notes = _notes(guest, len(contexts), pages, xen)
    shape = _shape(guest, len(notes), contexts, shared_info, pages)
    at = ELF_HEADER.size + SECTION.size * (1 + len(shape.sections))
    rows = [SECTION.pack(*[0] * 10)]
    offsets = {}
    for name, _, size, align, _ in shape.sections[1:]:
        at = -(-at // (align or 1)) * (align or 1)
        offsets[name] = at
        at += size
    offsets[".shstrtab"] = at
    for name, type, size, align, entry in shape.sections:
        length = len(shape.names) if name == ".shstrtab" else size
        at_name = shape.names.index(b"\0" + name.encode() + b"\0") + 1
        rows.append(SECTION.pack(at_name, type, 0, 0, offsets[name], length, 0, 0, align, entry))
    machine = EM_386 if contexts and len(contexts[0]) == PV_LAYOUTS[4].vcpu_context.size else EM_X86_64
    head = core_header(
        section_offset=ELF_HEADER.size, sections=len(rows), names=1, machine=machine, abi_version=1
    )
    octets = bytearray(offsets[".xen_pages"])
    pieces = {0: head + b"".join(rows), offsets[".note.Xen"]: notes}
    pieces[offsets[".xen_prstatus"]] = b"".join(contexts)
    if shared_info:
        pieces[offsets[".xen_shared_info"]] = shared_info
    for start, piece in pieces.items():
        octets[start : start + len(piece)] = piece
    return bytes(octets)


def frame_list(guest: GuestType, pfns: npt.NDArray[np.uint64]) -> bytes:
    """Return the part of .xen_pfn or .xen_p2m for ``pfns``, uint64[n].

    A stream has no machine frames, and page tables in it name PFNs: so each PFN is given as its own frame, by
    which the tables can be followed.
    """
    frames = np.repeat(pfns, 2) if guest is GuestType.PV else pfns
    return frames.astype("<u8").tobytes()


def core_tail(guest: GuestType, shared_info: bytes = b"") -> bytes:
    """Return what stands behind the frame list: the names of the sections."""
    return _shape(guest, 0, (), shared_info, 0).names


@dataclass(frozen=True)
class CoreFile:
    """A Xen core dump: PFNs of its pages, uint64[n], where these lie, and a PV guest's machine frames."""

    guest_type: GuestType
    pfns: npt.NDArray[np.uint64]
    frames: npt.NDArray[np.uint64] | None
    pages_offset: int

    @classmethod
    def open(cls, fd: int) -> CoreFile:
        """Read the lists of the file ``fd``. Raises `FormatError` for what is no Xen core dump."""
        sections = ElfFile.open(fd).named_sections()
        lists = [name for name in (b".xen_p2m", b".xen_pfn") if name in sections]
        if b".xen_pages" not in sections or len(lists) != 1:
            raise FormatError(
                "no Xen core dump: expected the section .xen_pages and one of .xen_p2m and .xen_pfn, found "
                f"{', '.join(sorted(ascii(name.decode('latin-1')) for name in sections)) or 'no sections'}",
                offset=0,
                hint="an ELF core with program headers is opened as elf:FILE",
            )
        pages_offset, octets = sections[b".xen_pages"]
        list_offset, list_octets = sections[lists[0]]
        pv = lists[0] == b".xen_p2m"
        count = list_octets // (16 if pv else 8)
        if count * PAGE_SIZE > octets:
            raise FormatError(
                f"{count} frames are listed for {octets // PAGE_SIZE} pages", offset=list_offset
            )
        listed = np.frombuffer(fdio.pread(fd, list_octets, list_offset), "<u8").astype(np.uint64)
        pairs = listed[: count * 2].reshape(-1, 2) if pv else listed[:count].reshape(-1, 1)
        return cls(
            GuestType.PV if pv else GuestType.HVM, pairs[:, 0], pairs[:, 1] if pv else None, pages_offset
        )

    def segments(self) -> npt.NDArray[np.uint64]:
        """Return address, offset in the file and octets of each run of pages that are there, uint64[n, 3]."""
        there = np.flatnonzero(self.pfns != np.uint64(NO_FRAME)).astype(np.uint64)
        if not len(there):
            return np.empty((0, 3), np.uint64)
        pfns = self.pfns[there.astype(np.int64)]
        breaks = np.flatnonzero((np.diff(pfns) != 1) | (np.diff(there) != 1)) + 1
        starts = np.concatenate(([0], breaks))
        counts = np.diff(np.append(starts, len(there))).astype(np.uint64)
        page = np.uint64(PAGE_SIZE)
        offsets = there[starts] * page + np.uint64(self.pages_offset)
        return np.stack([pfns[starts] * page, offsets, counts * page], axis=1)
