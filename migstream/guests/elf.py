"""ELF cores: what a memory image in ELF form consists of, written and read.

A *vmcore* is an ELF64 core whose PT_LOAD headers say which physical addresses its octets are, and whose
PT_NOTE holds an NT_PRSTATUS note for each processor: what QEMU's dump-guest-memory and Linux's kdump write,
and crash, gdb and volatility3 read. Here a physical address is PFN * 4096.

Source: the System V ABI (chapters Object Files and Program Loading), elf(5), and Linux's
include/uapi/linux/elfcore.h and arch/x86/include/asm/user_64.h for NT_PRSTATUS.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from migstream.errors import FormatError
from migstream.guests.protocols import PAGE_SHIFT, PAGE_SIZE
from migstream.guests.registers import Registers
from migstream.io import fd as fdio

__all__ = [
    "ELF_HEADER",
    "EM_386",
    "EM_X86_64",
    "SECTION",
    "ElfFile",
    "core_header",
    "note",
    "prstatus",
    "vmcore_head",
]

#: e_ident, e_type, e_machine, e_version, e_entry, e_phoff, e_shoff, e_flags, e_ehsize, e_phentsize, e_phnum,
#: e_shentsize, e_shnum, e_shstrndx
ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
IDENT = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")  # 64-bit, little-endian, version 1, System V
ET_CORE, EM_386, EM_X86_64 = 4, 3, 62
PT_LOAD, PT_NOTE = 1, 4
PN_XNUM = 0xFFFF  # as e_phnum: the number is in sh_info of section 0
NT_PRSTATUS = 1
PROGRAM_HEADERS_MAX = 1 << 24  # that are read of a file: enough for 64 GiB without two pages in a row

#: sh_name, sh_type, sh_flags, sh_addr, sh_offset, sh_size, sh_link, sh_info, sh_addralign, sh_entsize
SECTION = struct.Struct("<IIQQQQIIQQ")
_PROGRAM = np.dtype(
    [("type", "<u4"), ("flags", "<u4")]
    + [(name, "<u8") for name in ("offset", "vaddr", "paddr", "filesz", "memsz", "align")]
)

# struct elf_prstatus of x86-64: 112 octets, of which only pr_pid (at 32) matters; pr_reg; pr_fpvalid.
_PRSTATUS = struct.Struct("<32xi76x27Qi4x")
_PRSTATUS_REGISTERS = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "rflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)


def core_header(
    *,
    program_headers: int = 0,
    section_offset: int = 0,
    sections: int = 0,
    names: int = 0,
    machine: int = EM_X86_64,
    abi_version: int = 0,
) -> bytes:
    """Return the header of an ELF64 core; program headers, if any, stand behind it.

    ``names`` is the index of the section that holds the sections' names.
    """
    ident = IDENT[:8] + bytes([abi_version]) + IDENT[9:]
    return ELF_HEADER.pack(
        *(ident, ET_CORE, machine, 1, 0, ELF_HEADER.size if program_headers else 0, section_offset, 0),
        *(ELF_HEADER.size, _PROGRAM.itemsize, min(program_headers, PN_XNUM)),
        *(SECTION.size if sections else 0, sections, names),
    )


def note(name: bytes, type: int, body: bytes) -> bytes:
    """Return an ELF note, name and body padded to multiples of four."""
    name += b"\0"
    padded = name.ljust(-(-len(name) // 4) * 4, b"\0")
    return struct.pack("<III", len(name), len(body), type) + padded + body + bytes(-len(body) % 4)


def prstatus(registers: Registers, number: int) -> bytes:
    """Return the NT_PRSTATUS note of processor ``number``, from 0; it goes as process ``number`` + 1."""
    return note(
        b"CORE",
        NT_PRSTATUS,
        _PRSTATUS.pack(number + 1, *(registers.get(name, 0) for name in _PRSTATUS_REGISTERS), 0),
    )


def vmcore_head(
    starts: npt.NDArray[np.uint64], counts: npt.NDArray[np.uint64], processors: Sequence[Registers]
) -> bytes:
    """Return what stands before the pages of a vmcore; they follow in the order of the runs.

    The runs of PFNs are given by their first ones, uint64[n], and lengths in pages, uint64[n]. Virtual
    addresses equal the physical ones, so that a debugger which knows no others finds the memory.
    """
    notes = b"".join(prstatus(registers, i) for i, registers in enumerate(processors))
    n_headers = 1 + len(starts)
    extended = n_headers >= PN_XNUM
    section_at = ELF_HEADER.size + n_headers * _PROGRAM.itemsize
    notes_at = section_at + SECTION.size * extended
    pages_at = -(-(notes_at + len(notes)) // PAGE_SIZE) * PAGE_SIZE
    headers = np.zeros(n_headers, _PROGRAM)
    headers[0] = (PT_NOTE, 0, notes_at, 0, 0, len(notes), len(notes), 0)
    load = headers[1:]
    sizes = counts << np.uint64(PAGE_SHIFT)
    load["type"], load["flags"] = PT_LOAD, 7  # readable, writable, executable
    load["offset"] = pages_at + np.cumsum(sizes) - sizes
    load["paddr"] = load["vaddr"] = starts << np.uint64(PAGE_SHIFT)
    load["filesz"] = load["memsz"] = sizes
    load["align"] = PAGE_SIZE
    head = core_header(
        program_headers=n_headers, section_offset=section_at if extended else 0, sections=int(extended)
    )
    section = SECTION.pack(0, 0, 0, 0, 0, 0, 0, n_headers, 0, 0) if extended else b""
    return (head + headers.tobytes() + section + notes).ljust(pages_at, b"\0")


@dataclass(frozen=True)
class ElfFile:
    """An ELF64 little-endian file: where its headers lie, and how many there are."""

    fd: int
    size: int
    program_offset: int
    program_headers: int
    section_offset: int
    sections: int
    names: int

    @classmethod
    def open(cls, fd: int) -> ElfFile:
        """Read the header of the file ``fd``. Raises `FormatError` for what is no such file."""
        head = fdio.pread(fd, ELF_HEADER.size, 0)
        if len(head) < ELF_HEADER.size or head[:6] != IDENT[:6]:
            raise FormatError(
                "expected the header of a 64-bit little-endian ELF file, found "
                f"{head[:6].hex(' ') or 'nothing'}",
                offset=0,
            )
        _, _, _, _, _, phoff, shoff, _, _, phentsize, phnum, _, shnum, names = ELF_HEADER.unpack(head)
        if phnum and phentsize != _PROGRAM.itemsize:
            raise FormatError(
                f"program headers of {phentsize} octets; expected {_PROGRAM.itemsize}", offset=54
            )
        size = fdio.file_size(fd) or 0
        if phnum == PN_XNUM and shoff:
            first = fdio.pread(fd, SECTION.size, shoff)
            if len(first) < SECTION.size:
                raise FormatError(
                    "section header 0, which counts the program headers, is cut off", offset=shoff
                )
            phnum = SECTION.unpack(first)[7]
        return cls(fd, size, phoff, phnum, shoff, shnum, names)

    def load_segments(self) -> npt.NDArray[np.uint64]:
        """Return the PT_LOAD headers: physical address, offset in the file and octets of each, uint64[n, 3].

        Raises `FormatError` for headers that are cut off or reach past the end of the file.
        """
        length = self.program_headers * _PROGRAM.itemsize
        if self.program_headers > PROGRAM_HEADERS_MAX or self.program_offset + length > self.size:
            raise FormatError(
                f"{self.program_headers} program headers do not fit into the file", offset=self.program_offset
            )
        headers = np.frombuffer(fdio.pread(self.fd, length, self.program_offset), _PROGRAM)
        load = headers[(headers["type"] == PT_LOAD) & (headers["filesz"] > 0)]
        past = (load["offset"] > self.size) | (
            load["filesz"] > self.size - np.minimum(load["offset"], self.size)
        )
        if past.any():
            bad = load[past][0]
            raise FormatError(
                f"a segment of {bad['filesz']} octets at {bad['offset']} reaches past the end of the file",
                offset=self.size,
            )
        return np.stack([load["paddr"], load["offset"], load["filesz"]], axis=1).astype(np.uint64)

    def named_sections(self) -> dict[bytes, tuple[int, int]]:
        """Return (offset, octets) of each section by name. Raises `FormatError` for one past the end."""
        table = fdio.pread(self.fd, self.sections * SECTION.size, self.section_offset)
        if len(table) < self.sections * SECTION.size:
            raise FormatError(f"{self.sections} section headers do not fit into the file", offset=self.size)
        rows = list(SECTION.iter_unpack(table))
        for row in rows:
            if row[1] and row[4] + row[5] > self.size:
                raise FormatError(
                    f"a section of {row[5]} octets at {row[4]} reaches past the end", offset=self.size
                )
        if self.names >= len(rows):
            return {}
        names = os.pread(self.fd, min(rows[self.names][5], 1 << 16), rows[self.names][4])
        return {names[row[0] :].split(b"\0", 1)[0]: (row[4], row[5]) for row in rows if row[1]}
