"""Every header and record against octets written by hand from the specifications, in both byte orders."""

from __future__ import annotations

import json
from typing import Any

import pytest

from migstream.errors import FormatError
from migstream.records import (
    ByteOrder,
    Declaration,
    OpaqueRecord,
    PageData,
    Record,
    array_of,
    libxc,
    libxl,
    padding_length,
    record_class,
    record_name,
    record_types,
    xl,
)
from migstream.records.hvm_params import HvmParam
from migstream.records.page_types import DATA_TYPES, PageType, type_name


def octets(text: str) -> bytes:
    """Read hex with comments: whatever follows a ``#`` on a line is left out."""
    return bytes.fromhex(" ".join(line.split("#")[0] for line in text.splitlines()))


# Headers. libxc's image header and libxl's header are big-endian in every stream.

IMAGE_HEADER = octets("""
    ff ff ff ff ff ff ff ff     # marker
    58 45 4e 46  00 00 00 03    # "XENF", version
    00 00  00 00  00 00 00 00   # options, reserved
""")
LIBXL_HEADER = octets("""
    4c 69 62 78 6c 46 6d 74     # "LibxlFmt"
    00 00 00 02  00 00 00 02    # version, options: converted from legacy
""")


def test_image_header() -> None:
    header = libxc.ImageHeader.parse(IMAGE_HEADER, "big")
    assert header == libxc.ImageHeader(marker=2**64 - 1, id=0x58454E46, version=3, options=0)
    assert header.build("big") == IMAGE_HEADER
    assert header.order == "little"


@pytest.mark.parametrize(("options", "order"), [(0, "little"), (1, "big"), (2, "little"), (0xFFFF, "big")])
def test_only_option_bit_0_says_the_byte_order_of_an_image(options: int, order: str) -> None:
    assert libxc.ImageHeader(options=options).order == order


def test_libxl_header() -> None:
    header = libxl.LibxlHeader.parse(LIBXL_HEADER, "big")
    assert header == libxl.LibxlHeader(version=2, options=libxl.LEGACY)
    assert header.build("big") == LIBXL_HEADER
    assert header.order == "little"
    assert libxl.LibxlHeader(options=1).order == "big"


# Everything else follows the stream's byte order: name -> (value, little-endian, big-endian).

GOLDEN: dict[str, tuple[Declaration, bytes, bytes]] = {
    "domain header": (
        libxc.DomainHeader(type=libxc.GuestType.HVM, page_shift=12, xen_major=4, xen_minor=21),
        octets("""
            02 00 00 00  0c 00  00 00   # HVM, page shift, reserved
            04 00 00 00  15 00 00 00    # Xen 4.21
        """),
        octets("""
            00 00 00 02  00 0c  00 00
            00 00 00 04  00 00 00 15
        """),
    ),
    "record header": (
        libxc.RecordHeader(type=0x8000_0012, length=0x0102_0304),
        octets("12 00 00 80  04 03 02 01"),
        octets("80 00 00 12  01 02 03 04"),
    ),
    "xl header": (
        xl.SaveFileHeader(mandatory_flags=3, optional_flags=0, optional_data_len=0x1234),
        octets("""
            58 65 6e 20 73 61 76 65 64 20 64 6f 6d 61 69 6e   # "Xen saved domain"
            2c 20 78 6c 20 66 6f 72 6d 61 74 0a 20 00 20 0d   # ", xl format\\n \\0 \\r"
            04 03 02 01  03 00 00 00  00 00 00 00  34 12 00 00
        """),
        octets("""
            58 65 6e 20 73 61 76 65 64 20 64 6f 6d 61 69 6e
            2c 20 78 6c 20 66 6f 72 6d 61 74 0a 20 00 20 0d
            01 02 03 04  00 00 00 03  00 00 00 00  00 00 12 34
        """),
    ),
    "xl config": (
        xl.SaveFileConfig(config=b"{}\0"),
        octets("03 00 00 00  7b 7d 00"),
        octets("00 00 00 03  7b 7d 00"),
    ),
    "END": (libxc.End(), b"", b""),
    "PAGE_DATA": (
        PageData(entries=array_of(8, [0x0000_0000_0000_1234, 0xF000_0000_0000_0001])),
        octets("""
            02 00 00 00  00 00 00 00    # count, reserved
            34 12 00 00 00 00 00 00     # a normal page
            01 00 00 00 00 00 00 f0     # XTAB
        """),
        octets("""
            00 00 00 02  00 00 00 00
            00 00 00 00 00 00 12 34
            f0 00 00 00 00 00 00 01
        """),
    ),
    "X86_PV_INFO": (
        libxc.X86PvInfo(guest_width=8, pt_levels=4),
        octets("08 04 00 00 00 00 00 00"),
        octets("08 04 00 00 00 00 00 00"),
    ),
    "X86_PV_P2M_FRAMES": (
        libxc.X86PvP2mFrames(p2m_start_pfn=0, p2m_end_pfn=0x3FF, p2m_pfns=array_of(8, [0x81, 0x82])),
        octets("""
            00 00 00 00  ff 03 00 00
            81 00 00 00 00 00 00 00
            82 00 00 00 00 00 00 00
        """),
        octets("""
            00 00 00 00  00 00 03 ff
            00 00 00 00 00 00 00 81
            00 00 00 00 00 00 00 82
        """),
    ),
    "X86_PV_VCPU_BASIC": (
        libxc.X86PvVcpuBasic(vcpu_id=1, context=b"basic"),
        octets("01 00 00 00  00 00 00 00  62 61 73 69 63"),
        octets("00 00 00 01  00 00 00 00  62 61 73 69 63"),
    ),
    "X86_PV_VCPU_EXTENDED": (
        libxc.X86PvVcpuExtended(vcpu_id=2, context=b"ext"),
        octets("02 00 00 00  00 00 00 00  65 78 74"),
        octets("00 00 00 02  00 00 00 00  65 78 74"),
    ),
    "X86_PV_VCPU_XSAVE": (
        libxc.X86PvVcpuXsave(vcpu_id=3, context=b"xs"),
        octets("03 00 00 00  00 00 00 00  78 73"),
        octets("00 00 00 03  00 00 00 00  78 73"),
    ),
    "SHARED_INFO": (libxc.SharedInfo(shared_info=b"page"), b"page", b"page"),
    "X86_TSC_INFO": (
        libxc.X86TscInfo(mode=libxc.TscMode.NEVER_EMULATE, khz=0x0026_25A0, nsec=0x0102, incarnation=7),
        octets("""
            02 00 00 00  a0 25 26 00    # mode, 2.5 GHz
            02 01 00 00 00 00 00 00     # ns
            07 00 00 00  00 00 00 00    # incarnation, reserved
        """),
        octets("""
            00 00 00 02  00 26 25 a0
            00 00 00 00 00 00 01 02
            00 00 00 07  00 00 00 00
        """),
    ),
    "HVM_CONTEXT": (libxc.HvmContext(hvm_ctx=b"blob"), b"blob", b"blob"),
    "HVM_PARAMS": (
        libxc.HvmParams(
            params=array_of(
                libxc.HvmParamEntry,
                [
                    libxc.HvmParamEntry(index=HvmParam.STORE_PFN, value=0xFEFFC),
                    libxc.HvmParamEntry(index=HvmParam.CONSOLE_PFN, value=0xFEFFF),
                ],
            )
        ),
        octets("""
            02 00 00 00  00 00 00 00                            # count, reserved
            01 00 00 00 00 00 00 00   fc ef 0f 00 00 00 00 00   # STORE_PFN
            11 00 00 00 00 00 00 00   ff ef 0f 00 00 00 00 00   # CONSOLE_PFN
        """),
        octets("""
            00 00 00 02  00 00 00 00
            00 00 00 00 00 00 00 01   00 00 00 00 00 0f ef fc
            00 00 00 00 00 00 00 11   00 00 00 00 00 0f ef ff
        """),
    ),
    "TOOLSTACK": (libxc.Toolstack(data=b"blob"), b"blob", b"blob"),
    "X86_PV_VCPU_MSRS": (
        libxc.X86PvVcpuMsrs(vcpu_id=4, context=b"m"),
        octets("04 00 00 00  00 00 00 00  6d"),
        octets("00 00 00 04  00 00 00 00  6d"),
    ),
    "VERIFY": (libxc.Verify(), b"", b""),
    "CHECKPOINT": (libxc.Checkpoint(), b"", b""),
    "CHECKPOINT_DIRTY_PFN_LIST": (
        libxc.CheckpointDirtyPfnList(pfns=array_of(8, [9, 3])),
        octets("09 00 00 00 00 00 00 00  03 00 00 00 00 00 00 00"),
        octets("00 00 00 00 00 00 00 09  00 00 00 00 00 00 00 03"),
    ),
    "STATIC_DATA_END": (libxc.StaticDataEnd(), b"", b""),
    "X86_CPUID_POLICY": (
        libxc.X86CpuidPolicy(
            leaves=array_of(
                libxc.CpuidLeaf,
                [
                    libxc.CpuidLeaf(
                        leaf=0x8000_0000, subleaf=libxc.CpuidLeaf.NO_SUBLEAF, a=1, b=0x756E_6547, c=3, d=4
                    )
                ],
            )
        ),
        octets("00 00 00 80  ff ff ff ff  01 00 00 00  47 65 6e 75  03 00 00 00  04 00 00 00"),
        octets("80 00 00 00  ff ff ff ff  00 00 00 01  75 6e 65 47  00 00 00 03  00 00 00 04"),
    ),
    "X86_MSR_POLICY": (
        libxc.X86MsrPolicy(msrs=array_of(libxc.MsrEntry, [libxc.MsrEntry(idx=0xCE, val=0x8000_0000)])),
        octets("ce 00 00 00  00 00 00 00  00 00 00 80 00 00 00 00"),
        octets("00 00 00 ce  00 00 00 00  00 00 00 00 80 00 00 00"),
    ),
    "libxl END": (libxl.LibxlEnd(), b"", b""),
    "libxl LIBXC_CONTEXT": (libxl.LibxcContext(), b"", b""),
    "libxl EMULATOR_XENSTORE_DATA": (
        libxl.EmulatorXenstoreData(
            emulator_id=libxl.EmulatorId.QEMU_UPSTREAM, index=0, data=b"physmap/0\0ff\0"
        ),
        octets("02 00 00 00  00 00 00 00  70 68 79 73 6d 61 70 2f 30 00  66 66 00"),
        octets("00 00 00 02  00 00 00 00  70 68 79 73 6d 61 70 2f 30 00  66 66 00"),
    ),
    "libxl EMULATOR_CONTEXT": (
        libxl.EmulatorContext(emulator_id=libxl.EmulatorId.QEMU_TRADITIONAL, index=5, emulator_ctx=b"QEVM"),
        octets("01 00 00 00  05 00 00 00  51 45 56 4d"),
        octets("00 00 00 01  00 00 00 05  51 45 56 4d"),
    ),
    "ORIGIN": (
        libxc.Origin(
            hypervisor=libxc.Hypervisor.QEMU,
            vcpus=2,
            ram_size=5 << 30,
            ram_below_4g=3 << 30,
            ram_above_base=4 << 30,
            data=b"machine\0pc\0",
        ),
        octets(
            "01 00 00 00 02 00 00 00 00 00 00 40 01 00 00 00 00 00 00 c0 00 00 00 00 "
            "00 00 00 00 01 00 00 00 6d 61 63 68 69 6e 65 00 70 63 00"
        ),
        octets(
            "00 00 00 01 00 00 00 02 00 00 00 01 40 00 00 00 00 00 00 00 c0 00 00 00 "
            "00 00 00 01 00 00 00 00 6d 61 63 68 69 6e 65 00 70 63 00"
        ),
    ),
    "libxl CHECKPOINT_END": (libxl.CheckpointEnd(), b"", b""),
    "libxl CHECKPOINT_STATE": (
        libxl.CheckpointState(control_id=libxl.CheckpointStateId.SVM_READY),
        octets("02 00 00 00"),
        octets("00 00 00 02"),
    ),
}

both_orders = pytest.mark.parametrize("order", ["little", "big"])
every_golden = pytest.mark.parametrize("name", GOLDEN)


def golden(name: str, order: ByteOrder) -> tuple[Declaration, bytes]:
    value, little, big = GOLDEN[name]
    return value, little if order == "little" else big


def test_there_are_golden_octets_for_every_declared_record() -> None:
    tested = {type(value) for value, _, _ in GOLDEN.values()}
    assert {*record_types("libxc"), *record_types("libxl")} <= tested


@both_orders
@every_golden
def test_octets_parse_to_the_value(name: str, order: ByteOrder) -> None:
    value, wire = golden(name, order)
    assert type(value).parse(wire, order) == value


@both_orders
@every_golden
def test_the_value_builds_the_octets(name: str, order: ByteOrder) -> None:
    value, wire = golden(name, order)
    assert value.build(order) == wire


@both_orders
@every_golden
def test_json_there_and_back_keeps_the_value(name: str, order: ByteOrder) -> None:
    value, wire = golden(name, order)
    text = json.dumps(type(value).parse(wire, order).to_json())
    assert type(value).from_json(json.loads(text)) == value


@every_golden
def test_a_body_cut_short_names_the_field_it_ends_in(name: str) -> None:
    declared, wire = type(GOLDEN[name][0]), GOLDEN[name][1]
    for length in range(declared.head_size):
        with pytest.raises(FormatError) as caught:
            declared.parse(wire[:length])
        fixed = [w for w in declared.wire_fields if not w.variable]
        ends = [sum(w.size for w in fixed[: i + 1]) for i in range(len(fixed))]
        assert caught.value.field == next(w.name for w, end in zip(fixed, ends, strict=True) if end > length)
        assert caught.value.offset == length
        assert str(declared.head_size) in caught.value.message


def takes_all(declared: type[Declaration]) -> bool:
    """Whether pages, or octets that fill the body, leave nothing past the declared fields."""
    return bool(declared.payload) or any(
        w.kind == "octets" and w.variable and not w.counted_by for w in declared.wire_fields
    )


@both_orders
@pytest.mark.parametrize(
    "name", [name for name, (value, _, _) in GOLDEN.items() if not takes_all(type(value))]
)
def test_octets_past_the_declared_fields_survive(name: str, order: ByteOrder) -> None:
    value, wire = golden(name, order)
    declared = type(value)
    parsed = declared.parse(wire + b"\x01\x02\x03", order)
    assert parsed.surplus == b"\x01\x02\x03"
    assert parsed != value
    assert parsed.build(order) == wire + b"\x01\x02\x03"
    assert parsed.to_json()["surplus"] == "010203"
    assert declared.from_json(parsed.to_json()) == parsed


@pytest.mark.parametrize(
    ("declared", "wire", "count", "field", "offset"),
    [
        (PageData, "03 00 00 00  00 00 00 00" + " 00" * 16, 3, "count", 0),
        (libxc.HvmParams, "ff ff ff ff  00 00 00 00" + " 00" * 16, 0xFFFF_FFFF, "count", 0),
        (xl.SaveFileConfig, "04 00 00 00  7b 7d 00", 4, "config_len", 0),
    ],
)
def test_a_count_larger_than_the_body_is_refused_by_its_field(
    declared: type[Declaration], wire: str, count: int, field: str, offset: int
) -> None:
    with pytest.raises(FormatError, match=f"{field} is {count}, which needs") as caught:
        declared.parse(octets(wire))
    assert (caught.value.field, caught.value.offset) == (field, offset)


def test_pages_behind_the_entries_are_no_part_of_the_record() -> None:
    wire = GOLDEN["PAGE_DATA"][1]
    assert PageData.parse(wire + bytes(4096)) == GOLDEN["PAGE_DATA"][0]


@pytest.mark.parametrize(
    ("declared", "wire", "field", "value"),
    [
        (libxc.ImageHeader, IMAGE_HEADER[:18] + b"\x01\x02" + bytes(4), "reserved1", 0x0201),
        (libxc.DomainHeader, octets("02 00 00 00  0c 00  07 00") + bytes(8), "reserved1", 7),
        (libxc.X86PvInfo, octets("08 04 00 00 00 00 00 01"), "reserved1", bytes([0, 0, 0, 0, 0, 1])),
        (libxc.X86PvVcpuBasic, octets("00 00 00 00  01 00 00 00"), "reserved1", 1),
        (libxc.HvmParams, octets("00 00 00 00  05 00 00 00"), "reserved1", 5),
        (libxc.X86TscInfo, bytes(20) + b"\0\0\0\x80", "reserved1", 0x8000_0000),
        (PageData, octets("00 00 00 00  01 00 00 00"), "reserved1", 1),
        (libxc.MsrEntry, octets("00 00 00 00  01 00 00 00") + bytes(8), "flags", 1),
    ],
)
def test_reserved_fields_that_are_not_zero_are_kept_and_reported(
    declared: type[Declaration], wire: bytes, field: str, value: int | bytes
) -> None:
    parsed = declared.parse(wire)
    assert [(w.name, v) for w, v in parsed.reserved_fields()] == [(field, value)]
    assert parsed.build() == wire


@every_golden
def test_reserved_fields_that_are_zero_are_not_reported(name: str) -> None:
    assert list(GOLDEN[name][0].reserved_fields()) == []


# Types


def test_the_specifications_19_libxc_and_6_libxl_records_are_declared_and_one_of_ours() -> None:
    assert {cls.code: cls.type for cls in record_types("libxc")} == {
        0x00: "END",
        0x01: "PAGE_DATA",
        0x02: "X86_PV_INFO",
        0x03: "X86_PV_P2M_FRAMES",
        0x04: "X86_PV_VCPU_BASIC",
        0x05: "X86_PV_VCPU_EXTENDED",
        0x06: "X86_PV_VCPU_XSAVE",
        0x07: "SHARED_INFO",
        0x08: "X86_TSC_INFO",
        0x09: "HVM_CONTEXT",
        0x0A: "HVM_PARAMS",
        0x0B: "TOOLSTACK",
        0x0C: "X86_PV_VCPU_MSRS",
        0x0D: "VERIFY",
        0x0E: "CHECKPOINT",
        0x0F: "CHECKPOINT_DIRTY_PFN_LIST",
        0x10: "STATIC_DATA_END",
        0x11: "X86_CPUID_POLICY",
        0x12: "X86_MSR_POLICY",
        0xCD530001: "ORIGIN",
    }
    assert {cls.code: cls.type for cls in record_types("libxl")} == {
        0: "END",
        1: "LIBXC_CONTEXT",
        2: "EMULATOR_XENSTORE_DATA",
        3: "EMULATOR_CONTEXT",
        4: "CHECKPOINT_END",
        5: "CHECKPOINT_STATE",
    }


def test_codes_lead_to_declarations_and_names_also_unknown_and_optional_ones() -> None:
    assert record_class("libxc", 0x08) is libxc.X86TscInfo
    assert record_class("libxl", 0x02) is libxl.EmulatorXenstoreData
    assert record_class("libxc", 0x13) is None
    assert record_name("libxl", 4) == "CHECKPOINT_END"
    assert record_name("libxc", 0x13) == "UNKNOWN_0x00000013"
    assert record_name("libxc", 0x8000_0001) == "OPTIONAL_0x80000001"


def test_padding_fills_up_to_eight_octets() -> None:
    assert [padding_length(n) for n in (0, 1, 7, 8, 9)] == [0, 7, 1, 0, 7]


def test_page_types_are_those_of_domctl_h() -> None:
    values = {0: "NOTAB", 1: "L1TAB", 2: "L2TAB", 3: "L3TAB", 4: "L4TAB", 9: "L1TAB_PIN", 10: "L2TAB_PIN"}
    values |= {11: "L3TAB_PIN", 12: "L4TAB_PIN", 13: "BROKEN", 14: "XALLOC", 15: "XTAB"}
    assert {t.value: t.name for t in PageType} == values
    assert [type_name(n) for n in (4, 5, 8)] == ["L4TAB", "RESERVED_5", "RESERVED_8"]
    assert {0, 1, 2, 3, 4, 9, 10, 11, 12} == DATA_TYPES
    assert [t for t in PageType if t.populated and not t.has_data] == [PageType.XALLOC]
    levels = {t: t.page_table_level for t in PageType if t.page_table_level}
    assert levels == {1: 1, 2: 2, 3: 3, 4: 4, 9: 1, 10: 2, 11: 3, 12: 4}


def test_hvm_params_are_those_of_params_h() -> None:
    assert len(HvmParam) == 36
    some = {"CALLBACK_IRQ": 0, "STORE_PFN": 1, "PAE_ENABLED": 4, "VIRIDIAN": 9, "IDENT_PT": 12}
    some |= {"CONSOLE_PFN": 17, "BUFIOREQ_EVTCHN": 26, "IOREQ_SERVER_PFN": 32, "MCA_CAP": 38}
    assert {name: HvmParam[name].value for name in some} == some
    assert {3, 7, 8}.isdisjoint(set(HvmParam))


# Records of types that are not known


@pytest.mark.parametrize("code", [0x13, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF])
@pytest.mark.parametrize("layer", ["libxc", "libxl"])
def test_an_unknown_record_keeps_layer_code_and_body(layer: str, code: int) -> None:
    record = OpaqueRecord.of(layer, code, b"\0\x01\xff")
    assert (record.layer, record.type_code, record.build(), record.build("big")) == (
        layer,
        code,
        b"\0\x01\xff",
        b"\0\x01\xff",
    )
    text = json.dumps(record.to_json())
    assert OpaqueRecord.from_json(json.loads(text)) == record
    assert hash(OpaqueRecord.from_json(json.loads(text))) == hash(record)
    assert record != OpaqueRecord.of(layer, code ^ 1, b"\0\x01\xff")
    assert record != b"\0\x01\xff"


@pytest.mark.parametrize(
    "data",
    [
        {"body": "00"},
        {"body": "00", "layer": "xl", "type_code": 1},
        {"body": "00", "layer": "libxc", "type_code": 1 << 32},
        {"body": "00", "layer": "libxc", "type_code": "1"},
    ],
)
def test_an_unknown_record_without_its_type_is_no_record(data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="layer"):
        OpaqueRecord.from_json(data)


# JSON


def test_json_names_what_has_names() -> None:
    tsc = GOLDEN["X86_TSC_INFO"][0]
    assert tsc.to_json() == {
        "mode": 2,
        "mode_name": "NEVER_EMULATE",
        "khz": 2_500_000,
        "nsec": 258,
        "incarnation": 7,
        "reserved1": 0,
    }
    assert libxc.X86TscInfo(mode=9, khz=0, nsec=0, incarnation=0).to_json()["mode_name"] is None
    params = GOLDEN["HVM_PARAMS"][0].to_json()["params"]
    assert params[0] == {"index": 1, "index_name": "STORE_PFN", "value": 0xFEFFC}


@pytest.mark.parametrize(
    ("declared", "data", "expected"),
    [
        (libxc.X86PvInfo, {"guest_width": 8, "pt_levels": 4}, "reserved1 is missing"),
        (libxc.X86PvInfo, {"guest_width": 256, "pt_levels": 4, "reserved1": "00" * 6}, "guest_width"),
        (libxc.X86PvInfo, {"guest_width": "8", "pt_levels": 4, "reserved1": "00" * 6}, "guest_width"),
        (libxc.X86PvInfo, {"guest_width": 8, "pt_levels": 4, "reserved1": "00" * 7}, "reserved1"),
        (libxc.X86PvInfo, {"guest_width": 8, "pt_levels": -1, "reserved1": "00" * 6}, "pt_levels"),
        (libxc.SharedInfo, {"shared_info": "0"}, "shared_info"),
        (libxc.SharedInfo, {"shared_info": 5}, "shared_info"),
        (libxc.SharedInfo, {"shared_info": "", "surplus": 5}, "surplus"),
        (libxc.SharedInfo, ["shared_info"], "expected an object"),
        (libxc.CheckpointDirtyPfnList, {"pfns": 5}, "pfns"),
        (libxc.CheckpointDirtyPfnList, {"pfns": [1 << 64]}, "pfns"),
        (libxc.CheckpointDirtyPfnList, {"pfns": ["x"]}, "pfns"),
        (libxc.X86MsrPolicy, {"msrs": [{"idx": 0}]}, "flags is missing"),
        (libxc.X86MsrPolicy, {"msrs": [5]}, "expected an object"),
        (libxc.HvmParams, {"count": 1, "reserved1": 0, "params": []}, "count is not the length"),
    ],
)
def test_malformed_json_is_refused_by_the_field(
    declared: type[Declaration], data: Any, expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        declared.from_json(data)


# Values


def test_a_value_that_does_not_fit_its_field_is_refused_on_build() -> None:
    with pytest.raises(ValueError, match="RecordHeader"):
        libxc.RecordHeader(type=1 << 32, length=0).build()
    with pytest.raises(ValueError, match="reserved1 has to be 6 octets long"):
        libxc.X86PvInfo(guest_width=8, pt_levels=4, reserved1=bytes(7))


def test_a_count_that_contradicts_its_array_is_refused() -> None:
    with pytest.raises(ValueError, match=r"HvmParams\.count is not the length of params, 0"):
        libxc.HvmParams(count=1, params=array_of(libxc.HvmParamEntry, []))
    assert libxc.HvmParams(count=0, params=array_of(libxc.HvmParamEntry, [])).count == 0


def test_equal_values_are_equal_and_hash_alike_whatever_their_byte_order() -> None:
    for value, little, big in GOLDEN.values():
        one, other = type(value).parse(little, "little"), type(value).parse(big, "big")
        assert one == other
        assert hash(one) == hash(other)
    assert libxc.End() != libxc.Verify()


def test_fields_are_named_and_none_may_be_missing_or_unknown() -> None:
    with pytest.raises(TypeError, match="X86PvInfo needs the field pt_levels"):
        libxc.X86PvInfo(guest_width=8)  # type: ignore[call-arg]  # the point
    with pytest.raises(TypeError, match="X86PvInfo has no field colour, width"):
        libxc.X86PvInfo(guest_width=8, pt_levels=4, width=8, colour=1)  # type: ignore[call-arg]  # the point


def test_a_value_shows_its_fields_and_its_surplus() -> None:
    assert repr(libxc.TscMode.DEFAULT) in repr(
        libxc.X86TscInfo(mode=libxc.TscMode.DEFAULT, khz=1, nsec=2, incarnation=3)
    )
    assert repr(libxl.CheckpointState.parse(bytes(8))) == (
        "CheckpointState(control_id=0, surplus=b'\\x00\\x00\\x00\\x00')"
    )


def test_records_are_frozen() -> None:
    with pytest.raises(AttributeError):
        libxc.X86PvInfo(guest_width=8, pt_levels=4).guest_width = 4  # type: ignore[misc]  # the point


def test_an_array_is_a_sequence() -> None:
    array = array_of(4, [1, 2, 3, 4])
    assert (len(array), array[0], array[-1], list(array[1:3])) == (4, 1, 4, [2, 3])
    assert 3 in array
    assert hash(array) == hash(array_of(4, [1, 2, 3, 4]))
    assert repr(array) == "<Array of 4 u32>"
    assert repr(array_of(libxc.MsrEntry, [])) == "<Array of 0 MsrEntry>"
    with pytest.raises(IndexError):
        array[4]
    with pytest.raises(ValueError, match="steps of 1"):
        array[::2]
    assert array != [1, 2, 3, 4]
    assert array != array_of(8, [1, 2, 3, 4])


def test_an_array_is_numpys_without_a_copy() -> None:
    import numpy as np

    pfns = libxc.CheckpointDirtyPfnList.parse(octets("00 00 00 00 00 00 00 09"), "big").pfns
    assert pfns.numpy().tolist() == [9]
    assert np.asarray(pfns).dtype.itemsize == 8
    assert np.array(pfns, dtype=np.uint16).tolist() == [9]
    assert array_of(8, np.array([1, 2], np.uint32)) == array_of(8, [1, 2])
    assert libxc.CheckpointDirtyPfnList.parse(b"").pfns.numpy().tolist() == []
    leaves = libxc.X86CpuidPolicy.parse(GOLDEN["X86_CPUID_POLICY"][1]).leaves
    assert leaves.numpy()["b"].tolist() == [0x756E_6547]


def test_only_the_last_field_of_a_declaration_may_be_of_variable_length() -> None:
    from migstream.records.fields import octets as octets_field
    from migstream.records.fields import u32 as u32_field

    with pytest.raises(TypeError, match="only the last field"):

        class Wrong(Declaration):
            blob: bytes = octets_field("anything")
            number: int = u32_field("a number")


def test_wire_types_read_as_the_specification_tables_do() -> None:
    declared: list[type[Record]] = [libxc.X86PvInfo, libxc.X86PvP2mFrames, libxc.HvmParams]
    declared += [libxc.X86MsrPolicy, libxc.SharedInfo]
    types = {f"{cls.type}.{w.name}": w.wire_type for cls in declared for w in cls.wire_fields}
    assert types == {
        "X86_PV_INFO.guest_width": "u8",
        "X86_PV_INFO.pt_levels": "u8",
        "X86_PV_INFO.reserved1": "octets[6]",
        "X86_PV_P2M_FRAMES.p2m_start_pfn": "u32",
        "X86_PV_P2M_FRAMES.p2m_end_pfn": "u32",
        "X86_PV_P2M_FRAMES.p2m_pfns": "u64[...]",
        "HVM_PARAMS.count": "u32",
        "HVM_PARAMS.reserved1": "u32",
        "HVM_PARAMS.params": "HvmParamEntry[count]",
        "X86_MSR_POLICY.msrs": "MsrEntry[...]",
        "SHARED_INFO.shared_info": "octets[...]",
    }


def test_names_are_looked_up_only_where_a_field_has_some() -> None:
    mode, khz = libxc.X86TscInfo.wire_fields[:2]
    assert [mode.label(3), mode.label(4), khz.label(3)] == ["PVRDTSCP", "", ""]


# Xenstore pairs and configs


def xenstore(data: bytes) -> libxl.EmulatorXenstoreData:
    return libxl.EmulatorXenstoreData(emulator_id=2, index=0, data=data)


def test_xenstore_data_are_pairs_of_key_and_value() -> None:
    pairs = [("physmap/1/start_addr", "f0000000"), ("empty", ""), ("latin", "\udce9")]
    data = b"physmap/1/start_addr\0f0000000\0empty\0\0latin\0\xe9\0"
    assert xenstore(data).pairs == pairs
    assert libxl.EmulatorXenstoreData.pack(pairs) == data
    assert xenstore(b"").pairs == []


@pytest.mark.parametrize(
    ("data", "expected", "offset"),
    [(b"key\0value", "no NUL", 8 + 9), (b"key\0value\0key\0", "3 xenstore strings", 8)],
)
def test_malformed_xenstore_data_are_refused_with_their_place(
    data: bytes, expected: str, offset: int
) -> None:
    with pytest.raises(FormatError, match=expected) as caught:
        _ = xenstore(data).pairs
    assert (caught.value.field, caught.value.offset) == ("data", offset)


def test_a_xenstore_string_with_nul_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="NUL"):
        libxl.EmulatorXenstoreData.pack([("key", "a\0b")])


def test_the_config_is_text_without_its_nul() -> None:
    assert xl.SaveFileConfig(config=b'{"name": "\xff"}\0').text == '{"name": "\udcff"}'


def test_a_checkpoint_state_of_eight_octets_as_the_specification_draws_it_is_kept() -> None:
    state = libxl.CheckpointState.parse(octets("01 00 00 00  00 00 00 00"))
    assert (state.control_id, state.surplus) == (1, bytes(4))
    assert state.build() == octets("01 00 00 00  00 00 00 00")


def test_a_declaration_says_where_its_fields_start() -> None:
    assert libxc.X86TscInfo.offset_of("incarnation") == 16
    with pytest.raises(ValueError):
        libxc.X86TscInfo.offset_of("nothing")


def test_every_record_has_a_docstring_and_every_field_a_meaning() -> None:
    for cls in [*record_types("libxc"), *record_types("libxl")]:
        assert issubclass(cls, Record)
        assert cls.__doc__
        assert all(wire.doc for wire in cls.wire_fields)
