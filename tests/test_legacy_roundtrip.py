"""Whole guests as legacy streams, converted and restored: they are the guests that they were."""

from __future__ import annotations

import os
import struct
import tempfile
from pathlib import Path

import pytest
import zstandard

import migstream
from migstream.guests.compare import differing_pfns, differing_records
from migstream.io import reader
from migstream.records import PageData, Record, libxc
from migstream.records.hvm_params import HvmParam
from migstream.records.libxc import GuestType
from tests import legacy_streams as old
from tests.build import DATA
from tests.converted import Converted, convert
from tests.legacy_streams import Words, extended_info

MAGIC = (HvmParam.IOREQ_PFN, HvmParam.BUFIOREQ_PFN, HvmParam.STORE_PFN)
PARAM_CHUNKS = {
    HvmParam.IDENT_PT: old.IDENT_PT,
    HvmParam.CONSOLE_PFN: old.CONSOLE_PFN,
    HvmParam.VM86_TSS: old.VM86_TSS,
    HvmParam.VIRIDIAN: old.VIRIDIAN,
    HvmParam.ACPI_IOPORTS_LOCATION: old.ACPI_IOPORTS,
}


def as_legacy(octets: bytes, width: int, p2m_size: int) -> bytes:
    """Return a version 3 image as an old toolstack of words of ``width`` octets would have written it."""
    words = Words(width)
    frames, body, state = b"", b"", _State()
    with reader.open_memory(octets) as stream:
        for frame in stream:
            record = frame.record()
            if isinstance(record, PageData):
                entries = zip(record.pfns.tolist(), record.types.tolist(), strict=True)
                body += words.batch([type << 28 | pfn for pfn, type in entries], frame.body())
            elif isinstance(record, libxc.X86PvInfo):
                state.guest_width = record.guest_width
            elif isinstance(record, libxc.X86PvP2mFrames):
                p2m_size = record.p2m_end_pfn + 1
                frames = words.words(*record.p2m_pfns)
            else:
                state.take(record)
    if not frames:
        return words.words(p2m_size) + body + state.chunks() + old.mark(0) + state.hvm_tail()
    xsave = {len(vcpu) for vcpu in state.xsave.values()}
    info = extended_info(width, state.guest_width, xsave=xsave.pop() + 16 if xsave else 0)
    return words.words(p2m_size) + info + frames + body + state.chunks() + old.mark(0) + state.pv_tail()


class _State:
    """What of an image stands behind the pages."""

    def __init__(self) -> None:
        self.guest_width = 8
        self.tsc = b""
        self.params: dict[int, int] = {}
        self.context = b""
        self.basic: dict[int, bytes] = {}
        self.extended: dict[int, bytes] = {}
        self.xsave: dict[int, bytes] = {}
        self.shared_info = b""

    def take(self, record: Record) -> None:
        match record:
            case libxc.X86TscInfo():
                self.tsc = old.tsc(record.mode, record.nsec, record.khz, record.incarnation)
            case libxc.HvmParams():
                self.params = {p.index: p.value for p in record.params}
            case libxc.HvmContext():
                self.context = record.hvm_ctx
            case libxc.X86PvVcpuBasic():
                self.basic[record.vcpu_id] = record.context
            case libxc.X86PvVcpuExtended():
                self.extended[record.vcpu_id] = record.context
            case libxc.X86PvVcpuXsave():
                self.xsave[record.vcpu_id] = record.context
            case libxc.SharedInfo():
                self.shared_info = record.shared_info

    def chunks(self) -> bytes:
        known = [old.param(PARAM_CHUNKS[HvmParam(i)], v) for i, v in self.params.items() if i in PARAM_CHUNKS]
        highest = max(self.basic, default=0)
        vcpus = old.vcpu_info(highest, sum(1 << vcpu for vcpu in self.basic)) if self.basic else b""
        return self.tsc + vcpus + b"".join(known) + old.mark(old.LAST_CHECKPOINT)

    def hvm_tail(self) -> bytes:
        ioreq, bufioreq, store = (self.params.get(index, 0) for index in MAGIC)
        return old.hvm_tail(self.context, (ioreq, bufioreq, store))

    def pv_tail(self) -> bytes:
        out = struct.pack("<I", 0)
        for vcpu_id, basic in sorted(self.basic.items()):
            out += basic + self.extended[vcpu_id].ljust(128, b"\0")
            if self.xsave:
                state = self.xsave[vcpu_id]
                out += struct.pack("<QQ", 7, len(state)) + state
        return out + self.shared_info


@pytest.mark.parametrize("width", [4, 8], ids=["32-bit toolstack", "64-bit toolstack"])
@pytest.mark.parametrize("guest", [GuestType.HVM, GuestType.PV], ids=["HVM", "PV"])
def test_a_machine_saved_as_legacy_is_restored_as_it_was(guest: GuestType, width: int) -> None:
    source = migstream.ModelGuest.booted(1024, guest, vcpus=3)
    with tempfile.TemporaryFile() as file:
        migstream.save(source, file.fileno())
        file.seek(0)
        saved = file.read()
    policies = [r for r in source.static_records() if not isinstance(r, libxc.X86PvInfo)]
    converted = convert(as_legacy(saved, width, 1024), static_records=policies, libxl=False)
    assert converted.report.missing == []
    target = migstream.ModelGuest.empty(1024, guest)
    with tempfile.TemporaryFile() as file:
        file.write(converted.octets)
        file.flush()
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        migstream.restore(target, file.fileno())
    assert len(differing_pfns(source, target)) == 0
    # What a legacy stream has no place for: MSRs of PV guests, and parameters without a chunk.
    lost = {"X86_PV_VCPU_MSRS of vCPU 0", "X86_PV_VCPU_MSRS of vCPU 1", "X86_PV_VCPU_MSRS of vCPU 2"}
    assert {line.split(":")[0] for line in differing_records(source, target)} <= lost | {"HVM_PARAMS"}
    for record in target.state():
        if isinstance(record, libxc.HvmParams):
            kept = {p.index: p.value for p in record.params}
            before = next(r for r in source.state() if isinstance(r, libxc.HvmParams))
            expected = {p.index: p.value for p in before.params if p.index in {*MAGIC, *PARAM_CHUNKS}}
            assert kept == expected


@pytest.mark.parametrize("name", ["tinypv-save-p", "tinypvb8-xsave-save-c2"])
@pytest.mark.parametrize("width", [4, 8], ids=["32-bit toolstack", "64-bit toolstack"])
def test_a_real_pv_guest_is_the_same_by_way_of_a_legacy_stream(name: str, width: int) -> None:
    with Path(DATA / f"{name}.xl.zst").open("rb") as packed:
        capture = zstandard.ZstdDecompressor().stream_reader(packed).read()
    expected = Converted(capture, migstream.legacy.LegacyReport(GuestType.PV, width, 0))
    converted = convert(as_legacy(capture, width, 0), allowed=frozenset({"vcpu-context-size"}))
    assert converted.pages == {
        pfn: page for pfn, page in expected.pages.items() if (page[0], pfn) != (0xF, 0)
    }
    for kind in (libxc.X86PvInfo, libxc.X86PvP2mFrames, libxc.SharedInfo, libxc.X86TscInfo):
        assert converted.one(kind) == expected.one(kind)
    for per_vcpu in (libxc.X86PvVcpuBasic, libxc.X86PvVcpuXsave):
        assert converted.all(per_vcpu) == expected.all(per_vcpu)
