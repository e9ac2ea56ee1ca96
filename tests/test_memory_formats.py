"""Memory images in the forms of other tools: headers by hand, written and read back, read by others."""

from __future__ import annotations

import importlib
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import migstream
from migstream.errors import GuestError
from migstream.extract import ImageFormat, extract_memory
from migstream.guests import lime
from migstream.guests.elf import note, prstatus, vmcore_head
from migstream.guests.registers import guest_contexts, processors
from migstream.guests.registry import open_source
from migstream.guests.state_book import StateBook
from migstream.guests.xen_core import core_head, core_tail
from migstream.io.inputs import FileInput
from migstream.io.seekable import seekable
from migstream.page_index import PageIndex
from migstream.records import libxc
from migstream.records.libxc import GuestType
from tests.streams import END, STATIC_DATA_END, TSC, PvGuest, page, page_data, stream

PAGE = 4096
KINDS = {ImageFormat.ELF: "elf", ImageFormat.XEN_CORE: "core", ImageFormat.LIME: "lime"}


def u64s(*values: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return np.array(values, np.uint64)


def extracted(octets: bytes, path: Path, format: ImageFormat) -> dict[int, bytes]:
    """Write the image of a stream to ``path``; return the pages that the stream has, by PFN."""
    given_to = path.with_suffix(".stream")
    given_to.write_bytes(octets)
    with migstream.open(given_to) as source, seekable(source) as found, path.open("wb") as out:
        index = PageIndex.of(found.stream)
        extract_memory(found, index, out.fileno(), format)
    return {
        run.first + i: octets[run.offset + PAGE * i : run.offset + PAGE * (i + 1)]
        for run in index.runs()
        for i in range(run.pages)
    }


def read_back(name: str, guest_type: GuestType = GuestType.HVM) -> dict[int, bytes]:
    with open_source(name, guest_type) as source:
        pfns = np.arange(source.max_pfn + 1, dtype=np.uint64)
        types = source.page_types(pfns)
        there = pfns[types == 0]
        views, waiting = source.pages(there, types[types == 0])
        assert not waiting.any()
        octets = b"".join(views)
        return {int(pfn): octets[PAGE * i : PAGE * (i + 1)] for i, pfn in enumerate(there)}


# Headers, from the specifications


def test_a_lime_header_has_an_inclusive_end() -> None:
    # magic "EMiL", version 1, first address, last address, eight reserved octets
    expected = b"EMiL" + bytes.fromhex("01000000 0030000000000000 ff4f000000000000 0000000000000000")
    assert lime.range_header(3, 2) == expected


def test_a_vmcore_starts_with_a_note_header_and_a_load_header_for_each_run() -> None:
    head = vmcore_head(u64s(1, 0x100000), u64s(2, 1), [])
    assert head[:64] == bytes.fromhex(
        "7f454c46 02010100 0000000000000000"  # 64-bit, little-endian, version 1, System V
        "0400 3e00 01000000"  # core, x86-64
        "0000000000000000 4000000000000000 0000000000000000"  # entry, program headers at 64, no sections
        "00000000 4000 3800 0300 0000 0000 0000"
    )
    assert head[64:120] == struct.pack("<IIQQQQQQ", 4, 0, 0xE8, 0, 0, 0, 0, 0)
    assert head[120:176] == struct.pack("<IIQQQQQQ", 1, 7, 0x1000, 0x1000, 0x1000, 0x2000, 0x2000, 0x1000)
    assert head[176:232] == struct.pack("<IIQQQQQQ", 1, 7, 0x3000, 1 << 32, 1 << 32, 0x1000, 0x1000, 0x1000)
    assert len(head) == 0x1000
    assert not any(head[232:])


def test_more_runs_than_e_phnum_holds_are_counted_in_section_zero() -> None:
    starts = np.arange(0, 2 * 70_000, 2, dtype=np.uint64)
    head = vmcore_head(starts, np.ones(70_000, np.uint64), [])
    assert struct.unpack_from("<H", head, 56) == (0xFFFF,)
    (section_at,) = struct.unpack_from("<Q", head, 40)
    assert struct.unpack_from("<HH", head, 58) == (64, 1)  # one section header
    assert struct.unpack_from("<I", head, section_at + 44) == (70_001,)  # its sh_info


def test_registers_of_an_hvm_processor_stand_where_prstatus_has_them() -> None:
    cpu = bytearray(1032)  # struct hvm_hw_cpu
    for i in range(18):  # rax rbx rcx rdx rbp rsi rdi rsp r8-r15 rip rflags
        struct.pack_into("<Q", cpu, 512 + 8 * i, 0x1000 + i)
    struct.pack_into("<Q", cpu, 672, 0xABC000)  # cr3
    struct.pack_into("<6I", cpu, 736, 0x10, 0x18, 0x20, 0x28, 0x30, 0x38)  # cs ds es fs gs ss
    struct.pack_into("<QQ", cpu, 832, 0x7F00, 0xFFFF_8880_0000_0000)  # fs and gs base
    struct.pack_into("<Q", cpu, 944, 0x1234)  # shadow_gs
    context = struct.pack("<HHI", 1, 0, 24) + bytes(24)
    context += struct.pack("<HHI", 2, 0, len(cpu)) + cpu + struct.pack("<HHI", 0, 0, 0)
    book = StateBook()
    book.apply(libxc.HvmContext(hvm_ctx=context))
    (registers,) = processors(book)
    status = prstatus(registers, 0)
    # name size 5, body 336, type 1, "CORE", NUL, padding
    assert status[:20] == struct.pack("<III", 5, 336, 1) + b"CORE\0\0\0\0"
    body = status[20:]
    assert struct.unpack_from("<i", body, 32) == (1,)  # pr_pid
    rax, rbx, rcx, rdx, rbp, rsi, rdi, rsp, *r8_15, rip, rflags = range(0x1000, 0x1012)
    expected = [*reversed(r8_15[4:]), rbp, rbx, *reversed(r8_15[:4]), rax, rcx, rdx, rsi, rdi, 0, rip]
    expected += [0x10, rflags, rsp, 0x38, 0x7F00, 0xFFFF_8880_0000_0000, 0x18, 0x20, 0x28, 0x30]
    assert list(struct.unpack_from("<27Q", body, 112)) == expected
    # The same as struct vcpu_guest_context, which has r15 first, rip at 648 and cr3 at 5008.
    (vcpu,) = guest_contexts(book)
    assert len(vcpu) == 5168
    assert struct.unpack_from("<QQ", vcpu, 520) == (r8_15[7], r8_15[6])
    assert struct.unpack_from("<Q", vcpu, 648) == (rip,)
    assert struct.unpack_from("<Q", vcpu, 5008) == (0xABC000,)
    assert struct.unpack_from("<QQQ", vcpu, 5144) == (0x7F00, 0xFFFF_8880_0000_0000, 0x1234)


@pytest.mark.parametrize(("width", "rip_at", "rdx_at"), [(4, 548, 524), (8, 648, 616)])
def test_registers_of_a_pv_processor_are_read_by_the_guests_word_size(
    width: int, rip_at: int, rdx_at: int
) -> None:
    guest = PvGuest(width=width)
    context = bytearray(guest.basic(1).context)
    context[rip_at : rip_at + 4] = b"\x78\x56\x34\x12"
    context[rdx_at : rdx_at + 4] = b"\x01\x02\x03\x04"
    book = StateBook()
    for record in (guest.info(), libxc.X86PvVcpuBasic(vcpu_id=1, context=bytes(context))):
        book.apply(record)
    (registers,) = processors(book)
    assert registers["rip"] == 0x12345678
    assert registers["rdx"] == 0x04030201


def test_a_xen_core_names_its_sections_in_their_order() -> None:
    head = core_head(GuestType.HVM, 2, [bytes(5168)], xen=(4, 17))
    assert head[:24] == bytes.fromhex("7f454c46 02010100 0100000000000000 0400 3e00 01000000")
    assert core_tail(GuestType.HVM) == b"\0.shstrtab\0.note.Xen\0.xen_prstatus\0.xen_pages\0.xen_pfn\0"
    assert core_tail(GuestType.PV, b"x").endswith(b"\0.xen_shared_info\0.xen_pages\0.xen_p2m\0")
    notes_at = 64 + 6 * 64
    # the note of no content, then the header note: magic of an HVM guest, vCPUs, pages, page size
    assert head[notes_at : notes_at + 16] == struct.pack("<III4s", 4, 0, 0x2000000, b"Xen\0")
    assert head[notes_at + 16 : notes_at + 64] == struct.pack(
        "<III4sQQQQ", 4, 32, 0x2000001, b"Xen\0", 0xF00FEBEE, 1, 2, 4096
    )
    assert struct.unpack_from("<IIIxxxxQQ", head, notes_at + 64) == (4, 1280, 0x2000002, 4, 17)
    assert note(b"Xen", 0x2000003, struct.pack("<Q", 1)) in head


# Whole images: written here, read back here


sparse_guests = st.dictionaries(
    st.integers(0, 60) | st.integers(70_000, 70_010), st.integers(0, 255), min_size=1, max_size=20
)


@settings(max_examples=40, deadline=None)
@given(sparse_guests, st.permutations(range(20)), st.sampled_from(sorted(KINDS, key=str)))
def test_what_is_extracted_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, guest: dict[int, int], shuffle: list[int], format: ImageFormat
) -> None:
    order = [p for _, p in sorted(zip(shuffle, guest, strict=False))]
    records = [page_data([(pfn, 0)], page(guest[pfn])) for pfn in order]
    octets = stream(STATIC_DATA_END, *records, page_data([(65, 0xF)], b""), TSC, END)
    path = tmp_path_factory.mktemp("image") / "image"
    assert extracted(octets, path, format) == {pfn: page(fill) for pfn, fill in guest.items()}
    assert read_back(f"{KINDS[format]}:{path}") == {pfn: page(fill) for pfn, fill in guest.items()}


@pytest.mark.parametrize("format", KINDS)
def test_an_image_saved_again_has_the_same_pages(format: ImageFormat, tmp_path: Path) -> None:
    octets = stream(
        STATIC_DATA_END, page_data([(5, 0), (6, 0), (9, 0), (0, 0)], os.urandom(4 * PAGE)), TSC, END
    )
    pages = extracted(octets, tmp_path / "image", format)
    with (
        open_source(f"{KINDS[format]}:{tmp_path / 'image'}") as source,
        (tmp_path / "again").open("wb") as out,
    ):
        migstream.save(source, out.fileno())
    assert extracted((tmp_path / "again").read_bytes(), tmp_path / "image2", format) == pages


def test_an_elf_with_pieces_off_page_boundaries_gives_its_whole_pages(tmp_path: Path) -> None:
    memory = os.urandom(3 * PAGE)
    head = struct.pack(
        *("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 4, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    )
    load = struct.pack("<IIQQQQQQ", 1, 7, 120, 0, 0x1F00, len(memory), len(memory), 0)
    (tmp_path / "core").write_bytes(head + load + memory)
    start = 0x100  # from 0x1f00 to the first page boundary
    expected = {2: memory[start : start + PAGE], 3: memory[start + PAGE : start + 2 * PAGE]}
    assert read_back(f"elf:{tmp_path / 'core'}") == expected


@pytest.mark.parametrize("format", KINDS)
def test_an_image_cut_anywhere_is_refused_or_smaller(format: ImageFormat, tmp_path: Path) -> None:
    octets = stream(STATIC_DATA_END, page_data([(1, 0), (2, 0), (4, 0)], bytes(3 * PAGE)), TSC, END)
    path = tmp_path / "image"
    whole = extracted(octets, path, format)
    image = path.read_bytes()
    for length in (0, 3, 16, 63, 64, 100, 200, PAGE - 1, PAGE, len(image) // 2, len(image) - 1):
        path.write_bytes(image[:length])
        with pytest.raises(GuestError, match="image"):
            read_back(f"{KINDS[format]}:{path}")
    assert len(whole) == 3


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(sorted(KINDS, key=str)))
def test_a_damaged_image_is_refused_or_read_but_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, format: ImageFormat
) -> None:
    octets = stream(STATIC_DATA_END, page_data([(1, 0), (2, 0), (4, 0)], bytes(3 * PAGE)), TSC, END)
    path = tmp_path_factory.mktemp("image") / "image"
    extracted(octets, path, format)
    image = bytearray(path.read_bytes())
    # headers and lists, not the pages in between
    places = st.integers(0, 600) | st.integers(len(image) - 120, len(image) - 1)
    for at in data.draw(st.lists(places, min_size=1, max_size=3)):
        image[at] = data.draw(st.integers(0, 255))
    path.write_bytes(image)
    try:
        with open_source(f"{KINDS[format]}:{path}") as source:
            pfns = np.arange(min(source.max_pfn, 9) + 1, dtype=np.uint64)
            there = pfns[source.page_types(pfns) == 0]
            views, _ = source.pages(there, np.zeros(len(there), np.uint8))
            assert sum(len(view) for view in views) == PAGE * len(there)
    except GuestError:
        pass


def test_pieces_that_overlap_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.lime"
    path.write_bytes((lime.range_header(3, 2) + bytes(2 * PAGE)) + (lime.range_header(4, 1) + bytes(PAGE)))
    with pytest.raises(GuestError, match="two copies of a page"):
        read_back(f"lime:{path}")


def test_a_xen_core_is_not_taken_for_a_vmcore_nor_the_reverse(tmp_path: Path) -> None:
    octets = stream(STATIC_DATA_END, page_data([(1, 0)], bytes(PAGE)), TSC, END)
    extracted(octets, tmp_path / "core", ImageFormat.XEN_CORE)
    with pytest.raises(GuestError, match="no whole page"):
        read_back(f"elf:{tmp_path / 'core'}")
    extracted(octets, tmp_path / "vmcore", ImageFormat.ELF)
    with pytest.raises(GuestError, match="elf:FILE"):
        read_back(f"core:{tmp_path / 'vmcore'}")


# Whole images: written here, read by others


def volatility_layer(module: str, name: str, path: Path) -> Any:
    """Open ``path`` as a layer of volatility3."""
    contexts = pytest.importorskip("volatility3.framework.contexts", reason="volatility3 is not installed")
    physical = importlib.import_module("volatility3.framework.layers.physical")
    layers = importlib.import_module(f"volatility3.framework.layers.{module}")
    context = contexts.Context()
    context.config["file.location"] = path.as_uri()
    context.config["image.base_layer"] = "file"
    context.add_layer(physical.FileLayer(context, "file", "file"))
    return getattr(layers, name)(context, "image", "image")


@pytest.mark.parametrize(
    ("format", "module", "name"),
    [
        (ImageFormat.ELF, "elf", "Elf64Layer"),
        (ImageFormat.LIME, "lime", "LimeLayer"),
        (ImageFormat.XEN_CORE, "xen", "XenCoreDumpLayer"),
    ],
)
def test_volatility_reads_the_image(format: ImageFormat, module: str, name: str, tmp_path: Path) -> None:
    entries = [(7, 0), (3, 0), (4, 0), (0xFFFFF, 0), (6, 0xF)]
    octets = stream(STATIC_DATA_END, page_data(entries, os.urandom(4 * PAGE)), TSC, END)
    pages = extracted(octets, tmp_path / "image", format)
    layer = volatility_layer(module, name, tmp_path / "image")
    assert sorted(pages) == [3, 4, 7, 0xFFFFF]
    for pfn, content in pages.items():
        assert layer.read(PAGE * pfn, PAGE) == content
    assert not layer.is_valid(6 * PAGE)
    assert layer.maximum_address == 0x100000 * PAGE - 1


@pytest.mark.skipif(shutil.which("gdb") is None, reason="gdb is not installed")
def test_gdb_reads_memory_and_registers_of_a_vmcore(tmp_path: Path) -> None:
    guest = PvGuest()
    contexts = []
    for vcpu in range(2):
        context = bytearray(guest.basic(vcpu).context)
        context[648:656] = struct.pack("<Q", 0xFFFF_FFFF_8100_0000 + vcpu)  # rip
        contexts.append(libxc.X86PvVcpuBasic(vcpu_id=vcpu, context=bytes(context)))
    memory = page_data([(5, 0), (900, 0)], page(0x11) + page(0x22))
    head = guest.info(), STATIC_DATA_END, guest.p2m_frames()
    octets = stream(*head, memory, TSC, *contexts, END, guest=GuestType.PV)
    extracted(octets, tmp_path / "vmcore", ImageFormat.ELF)
    commands = ["info threads", "thread 2", "p/x $rip", "x/1gx 0x5ff8", "x/1gx 0x384000", "x/1gx 0x6000"]
    argv = ["gdb", "-nx", "-batch", "-core", str(tmp_path / "vmcore")]
    for command in commands:
        argv += ["-ex", command]
    shown = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert "LWP 2" in shown.stdout
    assert "= 0xffffffff81000001" in shown.stdout
    assert "0x5ff8:\t0x1111111111111111" in shown.stdout
    assert "0x384000:\t0x2222222222222222" in shown.stdout
    assert "Cannot access memory at address 0x6000" in shown.stdout + shown.stderr


def test_reading_pages_out_of_order_keeps_the_order_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "image.lime"
    path.write_bytes((lime.range_header(3, 2) + page(3) + page(4)) + (lime.range_header(9, 1) + page(9)))
    with open_source(f"lime:{path}") as source:
        views, _ = source.pages(u64s(9, 4, 3), np.zeros(3, np.uint8))
        assert [bytes(v)[:1] for v in views] == [b"\x09", b"\x04", b"\x03"]
        with pytest.raises(GuestError, match="PFN 0x5 has no page"):
            source.pages(u64s(5), np.zeros(1, np.uint8))


def test_an_input_of_a_descriptor_that_stands_inside_a_file_counts_from_there(tmp_path: Path) -> None:
    octets = stream(STATIC_DATA_END, page_data([(0, 0)], page(7)), TSC, END)
    path = tmp_path / "prefixed"
    path.write_bytes(b"prefix" + octets)
    with path.open("rb") as file, (tmp_path / "raw").open("wb") as out:
        file.seek(6)
        with migstream.open(file.fileno()) as source, seekable(source) as found:
            assert isinstance(found.input, FileInput)
            extract_memory(found, PageIndex.of(found.stream), out.fileno(), ImageFormat.RAW)
    assert (tmp_path / "raw").read_bytes() == page(7)
