"""Legacy streams: what each part becomes, of either word size, PV and HVM."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from migstream.errors import FormatError, RecordRef, TruncatedError
from migstream.io.detect import open_input
from migstream.io.inputs import MemoryInput
from migstream.legacy import LegacyShape, is_legacy
from migstream.records import PageData, libxc, libxl
from migstream.records.libxc import GuestType
from migstream.records.page_types import PageType
from tests import legacy_streams as old
from tests.build import fed
from tests.converted import convert
from tests.legacy_streams import PvGuest, Words, page
from tests.streams import CPUID, MSRS

HVM, PV = GuestType.HVM, GuestType.PV
WIDTHS = pytest.mark.parametrize("width", [4, 8], ids=["32-bit toolstack", "64-bit toolstack"])
GUEST_WIDTHS = pytest.mark.parametrize("guest_width", [4, 8], ids=["32-bit guest", "64-bit guest"])


# What it is


@pytest.mark.parametrize(
    ("start", "shape"),
    [
        # p2m_size 0x400; extended info: a word of all ones
        ("00040000 00000000 ffffffff ffffffff", LegacyShape(8, PV, 0x400)),
        ("00040000 ffffffff 180b0000 76637075", LegacyShape(4, PV, 0x400)),
        # p2m_size 0x100000; a batch of 1024 PFNs, or TSC_INFO (-7)
        ("00001000 00000000 00040000 00000000", LegacyShape(8, HVM, 0x100000)),
        ("00001000 00040000 00000000 01000000", LegacyShape(4, HVM, 0x100000)),
        ("00001000 00000000 f9ffffff 01000000", LegacyShape(8, HVM, 0x100000)),
        ("00001000 f9ffffff 01000000 4d000000", LegacyShape(4, HVM, 0x100000)),
        # the largest guest, and one too large; a batch too large; an id that is none; nothing
        ("00000010 00000000 00040000 00000000", LegacyShape(8, HVM, 1 << 28)),
        ("01000010 00000000 00040000 00000000", None),
        ("00001000 00000000 01040000 00000000", None),
        ("00001000 00000000 ebffffff 00000000", None),
        ("00001000 00000000 00000000 00000000", None),
        ("00001000 0000", None),
        ("", None),
    ],
)
def test_word_size_and_guest_are_told_from_the_first_octets(start: str, shape: LegacyShape | None) -> None:
    assert is_legacy(bytes.fromhex(start)) == shape


@WIDTHS
def test_what_is_converted_says_so_and_what_it_lacks(width: int) -> None:
    converted = convert(old.hvm(width, old.mark(old.LAST_CHECKPOINT)))
    report = converted.report
    assert (report.guest, report.word_size, report.p2m_size) == (HVM, width, 0x100000)
    assert (report.pages, report.states, report.device_model) == (2, 1, "DeviceModelRecord0002")
    assert (report.missing, report.warnings, report.losses) == (["CPUID", "MSR"], [], [])
    # LibxlFmt, version 2, option bit 1: legacy; LIBXC_CONTEXT; then the image: XENF, version 3,
    # little-endian; type 2 (HVM), page shift 12, Xen 0.1
    assert converted.octets[:64].hex() == (
        "4c6962786c466d740000000200000002" + "0100000000000000"
        "ffffffffffffffff58454e46000000030000000000000000" + "020000000c0000000000000001000000"
    )


def test_a_libxc_image_is_the_same_without_libxl_around_it_and_names_what_is_lost() -> None:
    legacy = old.hvm(8, old.toolstack(old.physmap()), old.mark(old.LAST_CHECKPOINT))
    wrapped, bare = convert(legacy), convert(legacy, libxl=False)
    assert bare.octets in wrapped.octets
    assert bare.types == ["STATIC_DATA_END", "PAGE_DATA", "HVM_PARAMS", "HVM_CONTEXT", "END"]
    assert [loss.split(",")[0].split(" (")[0] for loss in bare.report.losses] == [
        "QEMU's state",
        "libxl's toolstack data",
    ]


def test_static_data_that_are_given_stand_before_their_end() -> None:
    converted = convert(old.hvm(8), static_records=[CPUID, MSRS], libxl=False)
    assert converted.types[:4] == ["X86_CPUID_POLICY", "X86_MSR_POLICY", "STATIC_DATA_END", "PAGE_DATA"]
    assert converted.report.missing == []
    assert convert(old.hvm(8), static_records=[MSRS]).report.missing == ["CPUID"]


# Chunks


@pytest.mark.parametrize(
    ("chunk", "name"),
    [
        # id, padding, value
        ("fdffffff 00000000 00f0fffe00000000", "IDENT_PT"),
        ("fcffffff 00000000 00f0fffe00000000", "VM86_TSS"),
        ("f8ffffff 00000000 00f0fffe00000000", "CONSOLE_PFN"),
        ("f6ffffff 00000000 00f0fffe00000000", "ACPI_IOPORTS_LOCATION"),
        ("f5ffffff 00000000 00f0fffe00000000", "VIRIDIAN"),
        ("f2ffffff 00000000 00f0fffe00000000", "VM_GENERATION_ID_ADDR"),
        ("f1ffffff 00000000 00f0fffe00000000", "PAGING_RING_PFN"),
        ("f0ffffff 00000000 00f0fffe00000000", "MONITOR_RING_PFN"),
        ("efffffff 00000000 00f0fffe00000000", "SHARING_RING_PFN"),
        ("edffffff 00000000 00f0fffe00000000", "IOREQ_SERVER_PFN"),
        ("ecffffff 00000000 00f0fffe00000000", "NR_IOREQ_SERVER_PAGES"),
    ],
)
@WIDTHS
def test_a_parameter_chunk_becomes_an_hvm_parameter(chunk: str, name: str, width: int) -> None:
    magic = {"IOREQ_PFN": 0xFEFFB, "BUFIOREQ_PFN": 0xFEFFD, "STORE_PFN": 0xFEFFC}
    converted = convert(old.hvm(width, bytes.fromhex(chunk)))
    assert converted.params == magic | {name: 0xFEFFF000}


def test_a_parameter_of_zero_is_absent_as_savers_and_restorers_hold_it() -> None:
    tail = old.hvm_tail(magic=(0, 0, 5)) + old.qemu()
    assert convert(old.hvm(8, old.param(old.CONSOLE_PFN, 0), tail=tail)).params == {"STORE_PFN": 5}
    nothing = old.hvm_tail(magic=(0, 0, 0)) + old.qemu()
    none = convert(
        old.hvm(8, tail=nothing), allowed=frozenset({"layout-missing-usual", "layout-order-tolerated"})
    )
    assert "HVM_PARAMS" not in none.types


@WIDTHS
def test_tsc_info_becomes_a_record_behind_the_pages(width: int) -> None:
    # TSC_INFO, mode 2, nsec 0x0102030405060708, khz 2_400_000, incarnation 9
    chunk = bytes.fromhex("f9ffffff 02000000 0807060504030201 009f2400 09000000")
    tsc = convert(old.hvm(width, chunk)).one(libxc.X86TscInfo)
    assert (tsc.mode, tsc.nsec, tsc.khz, tsc.incarnation) == (2, 0x0102030405060708, 2_400_000, 9)


@WIDTHS
def test_last_checkpoint_ends_the_stream_and_leaves_what_follows(width: int) -> None:
    legacy = old.hvm(width, bytes.fromhex("f7ffffff"))
    source = MemoryInput(legacy + b"of somebody else")
    converted = convert(source)
    assert converted.report.states == 1
    assert source.read(100) == b"of somebody else"


@WIDTHS
def test_verify_mode_becomes_a_verify_record_between_the_pages(width: int) -> None:
    again = Words(width).batch([0], page(0x11))
    converted = convert(old.hvm(width, bytes.fromhex("ffffffff"), again))
    assert converted.types[2:5] == ["PAGE_DATA", "VERIFY", "PAGE_DATA"]


@pytest.mark.parametrize("chunk", ["fbffffff", "faffffff"], ids=["TMEM", "TMEM_EXTRA"])
def test_transcendent_memory_is_refused_by_name_with_its_place(chunk: str) -> None:
    legacy = old.hvm(8, bytes.fromhex(chunk), bytes(64))
    with pytest.raises(FormatError, match="tmem") as caught:
        convert(legacy)
    assert caught.value.offset == 8 + 4 + 16 + 8192
    assert caught.value.layer == "legacy"
    assert caught.value.record == RecordRef(2, {"fb": "TMEM", "fa": "TMEM_EXTRA"}[chunk[:2]])
    assert "save it again" in str(caught.value)


@WIDTHS
def test_libxls_physmap_becomes_xenstore_pairs(width: int) -> None:
    # Version 1, 2 mappings: phys_offset, start_addr, size, length of the name with its NUL, name; a 64-bit
    # structure ends with four octets of padding, behind the name.
    padding = "aaaaaaaa" if width == 8 else ""
    data = bytes.fromhex(
        "01000000 02000000"
        "00000080 00000000 00000ef0 00000000 00008000 00000000 09000000" + b"vga.vram\0".hex() + padding +
        "00000880 00000000 00000c00 00000000 00000100 00000000 00000000" + padding
    )  # fmt: skip
    pairs = convert(old.hvm(width, old.toolstack(data))).one(libxl.EmulatorXenstoreData).pairs
    assert pairs == [
        ("physmap/80000000/start_addr", "f00e0000"),
        ("physmap/80000000/size", "800000"),
        ("physmap/80000000/name", "vga.vram"),
        ("physmap/80080000/start_addr", "c0000"),
        ("physmap/80080000/size", "10000"),
    ]


def test_a_physmap_without_mappings_needs_no_record() -> None:
    converted = convert(old.hvm(8, old.toolstack(old.physmap())))
    assert converted.all(libxl.EmulatorXenstoreData) == []
    assert converted.all(libxl.EmulatorContext) != []


# Pages


@WIDTHS
def test_a_batch_keeps_pfns_types_and_pages(width: int) -> None:
    # Four PFNs: 0x10 ordinary, 0x12 broken, 0x13 allocate-only, 0x11 ordinary
    entries = {
        4: "04000000 10000000 120000d0 130000e0 11000000",
        8: "04000000 1000000000000000 120000d000000000 130000e000000000 1100000000000000",
    }[width]
    converted = convert(old.hvm(width, bytes.fromhex(entries) + page(0x33) + page(0x44)))
    assert converted.pages == {
        0: (0, page(0x11)),
        1: (0, page(0x22)),
        0x10: (0, page(0x33)),
        0x12: (PageType.BROKEN, b""),
        0x13: (PageType.XALLOC, b""),
        0x11: (0, page(0x44)),
    }
    assert converted.report.pages == 4


@WIDTHS
def test_placeholders_of_unmapped_pfns_go_and_never_touch_pfn_0(width: int) -> None:
    batch = Words(width).batch([old.XTAB, 7, old.XTAB], page(0x77))
    converted = convert(old.hvm(width, batch))
    assert [(pfn, type) for pfn, type, _ in converted.history] == [(0, 0), (1, 0), (7, 0)]


@WIDTHS
def test_a_batch_of_placeholders_only_leaves_no_empty_record(width: int) -> None:
    converted = convert(old.hvm(width, Words(width).batch([old.XTAB] * 1024)))
    assert [len(record.entries) for record in converted.all(PageData)] == [2]


@WIDTHS
def test_a_batch_of_invalid_pfns_only_is_a_record_without_pages(width: int) -> None:
    batch = Words(width).batch([old.XTAB | 0x20, old.XTAB | 0x21])
    converted = convert(old.hvm(width, batch))
    assert converted.history[2:] == [(0x20, PageType.XTAB, b""), (0x21, PageType.XTAB, b"")]


def test_pages_pass_from_files_and_pipes_as_from_memory(tmp_path: Path) -> None:
    chunks = [Words(8).batch([pfn], page(pfn & 0xFF)) for pfn in range(2, 300)]
    legacy = old.hvm(8, *chunks, old.mark(old.LAST_CHECKPOINT), tail=old.hvm_tail() + old.qemu())
    expected = convert(legacy)
    path = tmp_path / "legacy"
    path.write_bytes(legacy + b"behind")
    file = open_input(path)
    with fed(legacy + b"behind") as descriptor:
        pipe = open_input(descriptor)
        for source in (file, pipe):
            assert convert(source).octets == expected.octets
            assert source.read(10) == b"behind"
    file.close()


# The state of PV guests


@GUEST_WIDTHS
@WIDTHS
@pytest.mark.parametrize("xsave", [0, 576], ids=["no xsave", "xsave"])
@pytest.mark.parametrize("extended", [False, True], ids=["basic", "extended"])
def test_a_pv_guest_keeps_its_shape_and_its_vcpus(
    width: int, guest_width: int, extended: bool, xsave: int
) -> None:
    vcpus = (0, 2, 65)
    guest = PvGuest(width, guest_width, extended=extended, xsave=xsave, vcpus=vcpus)
    info = old.vcpu_info(70, 0b101, 0b10)
    converted = convert(
        guest.start()
        + old.tsc()
        + guest.memory()
        + info
        + old.mark(old.LAST_CHECKPOINT)
        + old.mark(0)
        + guest.tail()
    )
    shape = converted.one(libxc.X86PvInfo)
    assert (shape.guest_width, shape.pt_levels) == (guest_width, 4 if guest_width == 8 else 3)
    frames = converted.one(libxc.X86PvP2mFrames)
    assert (frames.p2m_start_pfn, frames.p2m_end_pfn) == (0, 1023)
    assert list(frames.p2m_pfns) == ([4, 5] if guest_width == 8 else [4])
    size = old.BASIC_SIZE[guest_width]
    assert [(r.vcpu_id, r.context) for r in converted.all(libxc.X86PvVcpuBasic)] == [
        (i, bytes([0x10 + i]) * size) for i in vcpus
    ]
    assert [(r.vcpu_id, r.context) for r in converted.all(libxc.X86PvVcpuExtended)] == [
        (i, bytes([0x20 + i]) * 128) for i in vcpus if extended
    ]
    # Mask and length that stand before xsave state in a legacy stream are not part of it.
    assert [(r.vcpu_id, r.context) for r in converted.all(libxc.X86PvVcpuXsave)] == [
        (i, bytes([0x30 + i]) * xsave) for i in vcpus if xsave
    ]
    assert converted.one(libxc.SharedInfo).shared_info == page(0x5A)
    assert converted.pages[6][0] == (0xC if guest_width == 8 else 0xB)
    assert converted.types[-2:] == ["END", "END"]


@WIDTHS
def test_without_vcpu_info_there_is_vcpu_0_and_it_is_online(width: int) -> None:
    guest = PvGuest(width, 8, extended=False)
    (vcpu,) = convert(guest.start() + guest.memory() + old.mark(0) + guest.tail()).all(libxc.X86PvVcpuBasic)
    # flags are the u64 at 512 of the context; VGCF_online is bit 5, which 0x10 does not have
    assert vcpu.context[512:520].hex() == "3010101010101010"
    assert vcpu.context[:512] + vcpu.context[520:] == bytes([0x10]) * (5168 - 8)


@WIDTHS
def test_unmapped_pfns_become_xtab_entries(width: int) -> None:
    unmapped = tuple(range(7, 1024))
    converted = convert(PvGuest(width, unmapped=unmapped).stream())
    assert converted.history[7:] == [(pfn, PageType.XTAB, b"") for pfn in unmapped]


@WIDTHS
def test_a_stream_without_extended_info_is_of_a_guest_as_wide_as_the_toolstack(width: int) -> None:
    guest = PvGuest(width, width, extended=False, info=b"")
    legacy = guest.start() + guest.memory() + old.mark(0) + guest.tail()
    assert convert(legacy, guest=PV).one(libxc.X86PvInfo).guest_width == width


def test_a_block_of_extended_info_that_is_not_known_is_left_out_with_a_warning() -> None:
    blocks = b"newb" + struct.pack("<I", 3) + b"abc" + b"vcpu" + struct.pack("<I", 2800) + bytes(2800)
    guest = PvGuest(8, 4, extended=False, info=b"\xff" * 8 + struct.pack("<I", len(blocks)) + blocks)
    converted = convert(guest.stream())
    assert converted.one(libxc.X86PvInfo).guest_width == 4
    assert converted.report.warnings == ["extended-info block b'newb' is not known and was left out"]


def test_a_pv_guests_toolstack_data_are_a_loss() -> None:
    converted = convert(PvGuest().stream(old.toolstack(b"whatever")))
    assert converted.report.losses == ["toolstack data: they belong to HVM guests"]


# The state of HVM guests


@pytest.mark.parametrize(
    "signature", [b"QemuDeviceModelRecord", b"DeviceModelRecord0002", b"RemusDeviceModelState"]
)
@WIDTHS
def test_each_record_of_qemu_becomes_an_emulator_context(signature: bytes, width: int) -> None:
    state = b"QEVM" + bytes(range(256)) * 40
    converted = convert(old.hvm(width, tail=old.hvm_tail() + old.qemu(state, signature)))
    emulator = converted.one(libxl.EmulatorContext)
    assert (emulator.emulator_id, emulator.index, emulator.emulator_ctx) == (0, 0, state)
    assert converted.one(libxc.HvmContext).hvm_ctx == b"hvm context"
    assert converted.report.device_model == signature.decode()


def test_qemus_record_of_xapis_first_image_has_a_line_feed_and_a_big_endian_length() -> None:
    record = b"QemuDeviceModelRecord\n" + bytes.fromhex("00 00 00 0a") + b"QEVM state"
    emulator = convert(old.hvm(4, tail=old.hvm_tail() + record)).one(libxl.EmulatorContext)
    assert emulator.emulator_ctx == b"QEVM state"
    with pytest.raises(TruncatedError):
        convert(old.hvm(4, tail=old.hvm_tail() + record[:-1]))


def test_without_a_record_of_qemu_there_is_a_warning() -> None:
    converted = convert(old.hvm(8, tail=old.hvm_tail()))
    assert converted.all(libxl.EmulatorContext) == []
    assert converted.report.device_model is None
    assert "no device model record" in converted.report.warnings[0]


def test_behind_an_image_in_an_envelope_that_goes_on_only_qemus_record_is_taken() -> None:
    for last in (old.mark(old.LAST_CHECKPOINT), b""):  # older savers did not write it
        source = MemoryInput(old.hvm(8, last, tail=old.hvm_tail()) + b"next segment")
        assert convert(source, device_model=False).report.device_model is None
        assert source.read(100) == b"next segment"
        source = MemoryInput(old.hvm(8, last) + b"next segment")
        assert convert(source, device_model=False).report.device_model == "DeviceModelRecord0002"
        assert source.read(100) == b"next segment"
