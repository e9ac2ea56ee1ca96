"""The restore engine: what reaches the guest, in which order, and what is refused with which message."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from migstream.cli.restore import command as restore_command
from migstream.engines.common import Missing, StreamType
from migstream.engines.restore import Outcome, RestoreCallbacks, RestoreResult, restore
from migstream.errors import DeadlineError, GuestError, StreamError, TruncatedError
from migstream.guests.model import ModelGuest
from migstream.guests.protocols import RestoredRings
from migstream.io import reader
from migstream.records import OPTIONAL, Record, array_of, libxc
from migstream.records.libxc import GuestType
from migstream.records.page_types import PageType

from . import build
from .streams import (
    CHECKPOINT,
    CONTEXT,
    CPUID,
    END,
    MSRS,
    NOTAB,
    PAGE,
    PARAMS,
    STATIC_DATA_END,
    TAIL,
    TSC,
    VERIFY,
    PvGuest,
    headers,
    hvm,
    page,
    page_data,
    pages,
    params,
    raw,
    stream,
)

N_PAGES = 1024


def guest(kind: GuestType = GuestType.HVM, n_pages: int = N_PAGES) -> ModelGuest:
    return ModelGuest.empty(n_pages, kind)


def run(octets: bytes, target: ModelGuest | None = None, **options: Any) -> tuple[ModelGuest, RestoreResult]:
    target = guest() if target is None else target
    with reader.open_memory(octets) as source:
        return target, restore(target, source, **options)


def run_pv(octets: bytes, **options: Any) -> tuple[ModelGuest, RestoreResult]:
    return run(octets, guest(GuestType.PV), **options)


def content(target: ModelGuest, pfn: int) -> bytes:
    return bytes(target.memory.pages[pfn])


def types(target: ModelGuest, *pfns: int) -> list[int]:
    return [int(t) for t in target.page_types(np.array(pfns, np.uint64))]


def populated(target: ModelGuest, *pfns: int) -> list[bool]:
    return [bool(p) for p in target.populated(np.array(pfns, np.uint64))]


class Told(ModelGuest):
    """A model that notes what it is asked."""

    def note(self, what: str) -> None:
        self.__dict__.setdefault("story", []).append(what)

    @property
    def story(self) -> list[str]:
        return list(self.__dict__.get("story", []))

    def apply(self, record: Record) -> None:
        self.note(record.type)
        super().apply(record)

    def populate(self, pfns: np.ndarray[Any, np.dtype[np.uint64]]) -> None:
        if len(pfns):
            self.note(f"populate {len(pfns)}")
        super().populate(pfns)

    def take_run(self, first_pfn: int, count: int, type: int) -> memoryview:
        before = self.n_populated
        memory = super().take_run(first_pfn, count, type)
        if self.n_populated > before:
            self.note(f"populate {self.n_populated - before}")
        return memory

    def complete(self) -> RestoredRings:
        self.note("complete")
        return super().complete()


def told(target: Told, name: str, answer: int = 1) -> Callable[..., int]:
    def callback(*_: object) -> int:
        target.note(name)
        return answer

    return callback


# What reaches the guest


def test_a_run_reaches_a_target_that_takes_runs_as_it_does_one_that_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    octets = hvm(pages(0, [1, 2, 3]), pages(2, [4, 5]))
    with_runs, _ = run(octets)
    monkeypatch.setattr(ModelGuest, "take_run", None)
    without, _ = run(octets)
    for guest_ in (with_runs, without):
        assert [content(guest_, pfn)[0] for pfn in range(4)] == [1, 2, 4, 5]
        assert types(guest_, 0, 3) == [0, 0]
        assert guest_.n_populated == 4


def test_pages_types_and_state_reach_the_guest() -> None:
    entries = [(1, NOTAB), (7, PageType.XTAB), (2, PageType.L1TAB_PIN), (9, PageType.XALLOC), (4, 13)]
    target, result = run(hvm(page_data(entries, page(0x11) + page(0x22))))
    assert content(target, 1) == page(0x11)
    assert content(target, 2) == page(0x22)
    assert content(target, 9) == page(0)
    assert types(target, 1, 7, 2, 9, 4) == [0x0, 0xF, 0x9, 0xE, 0xD]
    assert populated(target, 1, 7, 2, 9, 4, 5) == [True, False, True, True, False, False]
    assert {type(r) for r in target.state()} == {libxc.X86TscInfo, libxc.HvmContext, libxc.HvmParams}
    assert (result.result, result.pages, result.missing) == (Outcome.RESTORED, 2, Missing.NONE)
    assert (result.store_pfn, result.console_pfn) == (5, 8)


def test_of_a_pfn_that_stands_twice_in_a_record_the_last_counts() -> None:
    target, _ = run(hvm(page_data([(3, 0), (4, 0), (3, 0)], page(1) + page(2) + page(3))))
    assert content(target, 3) == page(3)
    assert content(target, 4) == page(2)


def test_a_batch_larger_than_savers_make_is_taken_whole() -> None:
    count = 20_000
    entries = [(pfn, int(PageType.XTAB)) for pfn in range(count)]
    entries[-1] = (count - 1, 0)
    target, _ = run(hvm(page_data(entries, page(9))), guest(n_pages=count))
    assert content(target, count - 1) == page(9)


def test_holes_beyond_the_target_are_let_be() -> None:
    target, _ = run(hvm(page_data([((1 << 52) - 1, 0xF), (1, 0), (N_PAGES, 0xD)], page(1))))
    assert content(target, 1) == page(1)


def test_hvm_order_is_policies_static_data_done_pages_params_at_once_and_context_last() -> None:
    target = Told.empty(N_PAGES, GuestType.HVM)
    octets = stream(
        CPUID, MSRS, STATIC_DATA_END, pages(0, [1, 2]), PARAMS, CONTEXT, TSC, pages(0, [3]), CONTEXT, END
    )
    run(octets, target, callbacks=RestoreCallbacks(static_data_done=told(target, "static_data_done", 0)))
    assert target.story == [
        *("X86_CPUID_POLICY", "X86_MSR_POLICY", "static_data_done", "populate 2"),
        *("HVM_PARAMS", "X86_TSC_INFO", "HVM_CONTEXT", "complete"),
    ]


def test_pv_order_ends_with_each_vcpu_as_basic_extended_xsave_msrs() -> None:
    target = Told.empty(N_PAGES, GuestType.PV)
    state = [
        libxc.X86PvVcpuMsrs(vcpu_id=0, context=bytes(16)),
        libxc.X86PvVcpuXsave(vcpu_id=0, context=bytes(16)),
        libxc.X86PvVcpuExtended(vcpu_id=1, context=bytes(128)),
        libxc.X86PvVcpuExtended(vcpu_id=0, context=bytes(64)),
    ]
    run(
        PvGuest().stream(*state),
        target,
        callbacks=RestoreCallbacks(static_data_done=told(target, "static_data_done", 0)),
    )
    assert target.story == [
        *("X86_PV_INFO", "X86_CPUID_POLICY", "X86_MSR_POLICY", "static_data_done", "X86_PV_P2M_FRAMES"),
        *("populate 10", "X86_TSC_INFO", "X86_PV_VCPU_BASIC", "X86_PV_VCPU_EXTENDED"),
        *("X86_PV_VCPU_XSAVE", "X86_PV_VCPU_MSRS", "X86_PV_VCPU_EXTENDED", "complete"),
    ]


def test_the_last_policy_counts_and_one_behind_the_end_of_static_data_is_warned_of() -> None:
    target, result = run(stream(MSRS, CPUID, CPUID, STATIC_DATA_END, MSRS, pages(0, [1]), *TAIL, END))
    assert [type(r) for r in target.static_records()] == [libxc.X86CpuidPolicy, libxc.X86MsrPolicy]
    assert [w for w in result.warnings if "X86_MSR_POLICY" in w and "not applied" in w]


@pytest.mark.parametrize(
    ("octets", "kind", "missing"),
    [
        (stream(pages(0, [1]), *TAIL, END, version=2), GuestType.HVM, Missing.CPUID | Missing.MSR),
        (stream(MSRS, pages(0, [1]), *TAIL, END, version=2), GuestType.HVM, Missing.CPUID),
        (PvGuest().stream(version=2), GuestType.PV, Missing.CPUID | Missing.MSR),
        (stream(*TAIL, END), GuestType.HVM, Missing.CPUID | Missing.MSR),
        (stream(CPUID, STATIC_DATA_END, *TAIL, END), GuestType.HVM, Missing.MSR),
    ],
    ids=["v2-hvm", "v2-hvm-msrs", "v2-pv", "neither-pages-nor-end-of-static-data", "v3"],
)
def test_static_data_done_is_called_once_with_what_is_missing(
    octets: bytes, kind: GuestType, missing: Missing
) -> None:
    called: list[Missing] = []

    def done(what: Missing) -> int:
        called.append(what)
        return 0

    _, result = run(octets, guest(kind), callbacks=RestoreCallbacks(static_data_done=done))
    assert called == [missing]
    assert result.missing == missing


def test_rings_are_kept_as_the_stream_has_them_unless_they_are_to_be_reset() -> None:
    octets = hvm(pages(5, [1, 2, 3, 4]))
    assert content(run(octets)[0], 5) == page(1)
    target, _ = run(octets, reset_rings=True)
    assert content(target, 5) == bytes(PAGE)
    console = bytearray(PAGE)
    console[3088] = 1  # disconnected
    assert content(target, 8) == bytes(console)
    assert content(target, 6) == page(2)


def test_a_ring_without_memory_is_not_reset_and_no_error() -> None:
    run(stream(STATIC_DATA_END, params(STORE_PFN=77, CONSOLE_PFN=1 << 40), END), reset_rings=True)


def test_the_pae_parameter_is_dropped() -> None:
    target, _ = run(stream(STATIC_DATA_END, params(PAE_ENABLED=1, VIRIDIAN=3), END))
    (kept,) = [r for r in target.state() if isinstance(r, libxc.HvmParams)]
    assert [(p.index, p.value) for p in kept.params] == [(9, 3)]


def test_page_tables_of_a_pv_guest_hold_its_own_frames_afterwards() -> None:
    target, _ = run_pv(PvGuest(tables={5: [6], 8: [0, 700]}).stream())
    assert target.frames is not None
    entries = target.memory.words[8]
    assert [int(e >> 12) for e in entries[:2]] == [target.frames.mfn(0), target.frames.mfn(700)]
    assert populated(target, 700) == [True], "what a page table refers to gets memory"
    assert types(target, 700) == [0]


def test_a_page_table_that_the_same_record_replaces_is_not_localised() -> None:
    table = struct.pack("<512Q", *range(1, 2048, 4))  # would refer to PFN 0 only, or be changed
    twice = page_data([(8, 1), (8, 0)], table + page(0x21))
    target, _ = run_pv(PvGuest().stream(twice))
    assert content(target, 8) == page(0x21)


def test_a_32_bit_pv_guest_is_restored() -> None:
    _, result = run_pv(PvGuest(width=4).stream())
    assert (result.result, result.pages) == (Outcome.RESTORED, 10)


def test_unknown_optional_records_bodies_where_none_belong_and_padding_are_passed_over() -> None:
    odd = [raw(OPTIONAL | 0x42, b"12345", padding=0xFF), raw(0x0D, b"body")]
    target, _ = run(stream(raw(0x10, b"12345678"), pages(0, [7]), *odd, *TAIL, raw(0x00, b"bye")))
    assert content(target, 0) == page(7)


def test_verify_reports_every_page_that_differs_and_changes_none() -> None:
    octets = hvm(pages(0, [1, 2, 3, 4]), VERIFY, pages(0, [1, 9]), pages(2, [8, 4]))
    target, result = run(octets)
    assert result.verify_mismatches.tolist() == [1, 2]
    assert result.verify_mismatch_count == 2
    assert content(target, 1) == page(2)


def test_verify_compares_page_tables_as_frames() -> None:
    pv = PvGuest(tables={5: [6], 8: [0, 700]})
    _, result = run_pv(pv.stream(VERIFY, pv.memory()))
    assert result.verify_mismatch_count == 0


def test_differing_pages_are_an_error_on_request_before_anything_is_complete() -> None:
    target = Told.empty(N_PAGES, GuestType.HVM)
    with pytest.raises(StreamError, match=r"1 pages differ.*PFN 0x1"):
        run(hvm(pages(0, [1, 2]), VERIFY, pages(0, [1, 3])), target, verify_fails=True)
    assert "complete" not in target.story


# What is refused, with the check's own message and place


def with_pages(entries: list[tuple[int, int]], n_pages: int) -> bytes:
    return hvm(page_data(entries, page(0) * n_pages))


REFUSED_HVM: dict[str, tuple[bytes, str]] = {
    "version 1": (headers(version=1), "version 2 or 3, found 1"),
    "big-endian": (build.image("big"), "little-endian"),
    "guest type": (headers(GuestType.PV) + raw(0), "of an HVM guest, found one of PV"),
    "page_shift 44": (headers(page_shift=44) + raw(0), "found page_shift 44"),
    "unknown record": (hvm(raw(0x7FFF_FFFF)), "unknown type"),
    "TOOLSTACK": (hvm(raw(0x0B)), "deprecated"),
    "dirty list": (hvm(raw(0x0F)), "back channel"),
    "PV record": (hvm(PvGuest().info()), "does not belong into the image of an HVM guest"),
    "second end of static data": (hvm(STATIC_DATA_END), "second STATIC_DATA_END"),
    "end of static data after it was inferred": (
        stream(pages(0, [1]), STATIC_DATA_END, version=2),
        "inferred",
    ),
    "PAGE_DATA before static data end": (stream(pages(0, [1]), END), "PAGE_DATA before STATIC_DATA_END"),
    "CHECKPOINT": (hvm(CHECKPOINT), "without checkpoints"),
    "CPUID 0": (stream(raw(0x11)), "multiple of 24, not 0"),
    "CPUID 25": (stream(raw(0x11, bytes(25))), "multiple of 24"),
    "MSR 24": (stream(raw(0x12, bytes(24))), "multiple of 16"),
    "TSC 32": (hvm(raw(0x08, bytes(32))), "exactly 24 octets, found 32"),
    "empty context": (hvm(raw(0x09)), "at least 1"),
    "short params": (hvm(raw(0x0A, bytes(7))), "at least 8"),
    "params count": (hvm(raw(0x0A, struct.pack("<II", 1, 0) + bytes(32))), "1 parameters need 24"),
    "too long": (hvm(struct.pack("<II", 0x09, (128 << 20) + 1)), "the limit is 134217728"),
    "PAGE_DATA of 7": (hvm(raw(0x01, bytes(7))), "at least 8"),
    "count 0": (hvm(raw(0x01, bytes(8))), "at least one PFN"),
    "count too large": (hvm(raw(0x01, struct.pack("<IIQ", 2, 0, 1))), "count is 2"),
    "type 7": (with_pages([(0, 0), (1, 7)], 2), "PFN 0x1 is of the type RESERVED_7"),
    "too few pages": (with_pages([(0, 0), (1, 0)], 1), "need 8216 octets; the body has 4120"),
    "too many pages": (with_pages([(0, 0xF)], 1), "need 16 octets; the body has 4112"),
    "PFN past the target": (with_pages([(1 << 36, 0)], 1), "above the target's highest, 0x3ff"),
    "allocate-only past the target": (with_pages([(N_PAGES, 0xE)], 0), "above the target's highest"),
}


@pytest.mark.parametrize("case", REFUSED_HVM)
def test_hvm_streams_are_refused_with_the_checks_own_message(case: str) -> None:
    octets, message = REFUSED_HVM[case]
    target = Told.empty(N_PAGES, GuestType.HVM)
    with pytest.raises(StreamError, match=message) as caught:
        run(octets, target)
    assert caught.value.offset is not None
    assert caught.value.layer == "libxc"
    assert "complete" not in target.story


@pytest.mark.parametrize("entries", [[(0, 0), (1, 7)], [(0, 0), (1 << 36, 0)], [(0, 0), (1, 0), (2, 0)]])
def test_a_bad_page_data_record_is_refused_before_anything_is_populated(
    entries: list[tuple[int, int]],
) -> None:
    target = Told.empty(N_PAGES, GuestType.HVM)
    with pytest.raises(StreamError):
        run(with_pages(entries, 2), target)
    assert not [what for what in target.story if what.startswith("populate")]


def vcpu(code: int, length: int, vcpu_id: int = 0) -> bytes:
    return raw(code, struct.pack("<II", vcpu_id, 0) + bytes(length))


def p2m(start: int, end: int, frames: int) -> bytes:
    return raw(0x03, struct.pack("<II", start, end) + bytes(8 * frames))


def pv_start(*items: Record | bytes) -> bytes:
    return stream(*items, guest=GuestType.PV)


REFUSED_PV: dict[str, tuple[bytes, str]] = {
    "second PV_INFO": (PvGuest().stream(PvGuest().info()), "second X86_PV_INFO"),
    "PV_INFO of 7": (pv_start(raw(0x02, bytes(7))), "at least 8"),
    "width 8, levels 3": (pv_start(raw(0x02, b"\x08\x03" + bytes(6))), "found 8 with 3"),
    "width 5": (pv_start(raw(0x02, b"\x05\x04" + bytes(6))), "found 5 with 4"),
    "P2M before static end": (pv_start(PvGuest().info(), p2m(0, 1, 1)), "before STATIC_DATA_END"),
    "P2M before PV_INFO": (pv_start(STATIC_DATA_END, p2m(0, 1, 1)), "before X86_PV_INFO"),
    "PAGE_DATA before P2M": (
        pv_start(PvGuest().info(), STATIC_DATA_END, pages(0, [1])),
        "before X86_PV_P2M_FRAMES",
    ),
    "P2M start above end": (PvGuest().stream(p2m(9, 8, 1)), "0x9, is above the last, 0x8"),
    "P2M frames": (PvGuest().stream(p2m(0, 512, 1)), "2 frames of 512 entries, which is 24 octets"),
    "P2M end 0": (pv_start(PvGuest().info(), STATIC_DATA_END, p2m(0, 0, 1)), "one page"),
    "PFN above P2M": (PvGuest().stream(pages(1024, [1])), "PFN 0x400 is above the guest's highest, 0x3ff"),
    "PTE above P2M": (PvGuest(tables={8: [1024]}).stream(), "refers to PFN 0x400"),
    "VCPU of 7": (PvGuest().stream(raw(0x05, bytes(7))), "at least 8"),
    "vCPU 77": (PvGuest().stream(vcpu(0x05, 8, 77)), "vCPU 77"),
    "BASIC of 32-bit": (PvGuest().stream(vcpu(0x04, 2800)), "exactly 5168 octets, found 2800"),
    "EXTENDED 129": (PvGuest().stream(vcpu(0x05, 129)), "at most 128 octets, found 129"),
    "XSAVE 15": (PvGuest().stream(vcpu(0x06, 15)), "at least 16 octets, found 15"),
    "MSRS 17": (PvGuest().stream(vcpu(0x0C, 17)), "multiple of 16"),
    "SHARED_INFO before PV_INFO": (pv_start(raw(0x07, bytes(4096))), "before X86_PV_INFO"),
    "SHARED_INFO 8": (PvGuest().stream(raw(0x07, bytes(8))), "exactly 4096"),
    "HVM record": (PvGuest().stream(PARAMS), "does not belong into the image of an PV guest"),
    "no vCPU 0": (
        stream(PvGuest().info(), STATIC_DATA_END, PvGuest().p2m_frames(), END, guest=GuestType.PV),
        "X86_PV_VCPU_BASIC of vCPU 0",
    ),
    "start info range": (PvGuest(edx=2000).stream(), "start info page .* above the highest"),
    "start info absent": (PvGuest(edx=20).stream(), "start info page .* no memory"),
    "start info type": (PvGuest(edx=8).stream(), "start info page .* L1TAB, expected NOTAB"),
    "store range": (PvGuest(store=1024).stream(), "xenstore page .* above"),
    "store absent": (PvGuest(store=99).stream(), "xenstore page .* no memory"),
    "console range": (PvGuest(console=1024).stream(), "console page .* above"),
    "console absent": (PvGuest(console=99).stream(), "console page .* no memory"),
    "GDT entries": (PvGuest(gdt_entries=7169).stream(), "7169 entries"),
    "GDT range": (PvGuest(gdt_frame=9999).stream(), r"GDT frame 0 \(PFN 0x270f\) is above"),
    "GDT type": (PvGuest(gdt_frame=7).stream(), "GDT frame 0 .* L2TAB"),
    "GDT absent": (PvGuest(gdt_frame=99).stream(), "GDT frame 0 .* no memory"),
    "cr3 range": (PvGuest(cr3=9999).stream(), "cr3 .* above"),
    "cr3 type": (PvGuest(cr3=6).stream(), "cr3 .* L3TAB, expected a page table of level 4"),
    "cr3 absent": (PvGuest(cr3=99).stream(), "cr3 .* no memory"),
    "cr1 range": (PvGuest(cr1=9999).stream(), "cr1 .* above"),
    "cr1 type": (PvGuest(cr1=6).stream(), "cr1 .* level 4"),
    "p2m range": (PvGuest(p2m=[4, 5000]).stream(), "frame 1 of the p2m .* above"),
    "p2m type": (PvGuest(p2m=[4, 6]).stream(), "frame 1 of the p2m .* L3TAB"),
    "p2m absent": (PvGuest(p2m=[600, 4]).stream(), "frame 0 of the p2m .* no memory"),
    "p2m not told": (PvGuest().stream(p2m(2048, 2048, 1)), "frame 2 of the p2m .* above"),
}


@pytest.mark.parametrize("case", REFUSED_PV)
def test_pv_streams_are_refused_with_the_checks_own_message(case: str) -> None:
    octets, message = REFUSED_PV[case]
    target = Told.empty(N_PAGES, GuestType.PV)
    with pytest.raises(StreamError, match=message) as caught:
        run(octets, target)
    assert caught.value.offset is not None
    assert "complete" not in target.story


def test_an_empty_vcpu_blob_is_skipped_whatever_its_vcpu_and_cr1_needs_its_valid_bit() -> None:
    run_pv(PvGuest(cr1=None).stream(vcpu(0x06, 0, 77)))


def test_what_the_target_refuses_is_told_with_the_records_place() -> None:
    target = ModelGuest.empty(N_PAGES, GuestType.HVM, memory_limit=1)
    with pytest.raises(StreamError, match="no memory is left") as caught:
        run(hvm(pages(0, [1, 2])), target)
    assert caught.value.record is not None
    assert caught.value.record.type == "PAGE_DATA"
    assert isinstance(caught.value.__cause__, GuestError)


def test_static_data_done_may_refuse_the_guest() -> None:
    with pytest.raises(StreamError, match=r"static_data_done .* returned 5"):
        run(hvm(), callbacks=RestoreCallbacks(static_data_done=lambda _: 5))


@pytest.mark.parametrize(
    "lacking", ["checkpoint", "postcopy", "wait_checkpoint", "suspend", "restore_results"]
)
def test_a_checkpointed_stream_needs_its_callbacks(lacking: str) -> None:
    there = dict.fromkeys(("checkpoint", "postcopy", "wait_checkpoint", "suspend"), lambda: 1)
    callbacks = RestoreCallbacks(**{**there, "restore_results": lambda *_: None, lacking: None})  # type: ignore[arg-type]  # by name
    with pytest.raises(ValueError, match=lacking):
        run(b"", stream_type=StreamType.COLO, callbacks=callbacks, send_back_fd=0)


# Descriptors


def test_nothing_is_read_behind_the_end_of_a_pipe() -> None:
    read_end, write_end = os.pipe()
    with open(read_end, "rb", buffering=0) as source, open(write_end, "wb", buffering=0) as sink:
        sink.write(hvm(pages(0, [1])) + b"what comes next")
        _, result = guest(), restore(guest(), source.fileno())
        assert result.pages == 1
        assert source.read(100) == b"what comes next"


def test_the_end_is_not_waited_behind_of() -> None:
    read_end, write_end = os.pipe()
    try:
        os.write(write_end, hvm(pages(0, [1])))
        restore(guest(), read_end, timeout_s=5)  # the other end stays open
    finally:
        os.close(read_end)
        os.close(write_end)


@pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "non-blocking"])
def test_a_socket_that_dribbles_is_read_to_the_end(blocking: bool) -> None:
    ours, theirs = socket.socketpair()
    octets = hvm(pages(0, [1, 2, 3]))

    def dribble() -> None:
        for start in range(0, len(octets), 611):
            theirs.sendall(octets[start : start + 611])
        theirs.close()

    ours.setblocking(blocking)
    thread = threading.Thread(target=dribble)
    thread.start()
    target = guest()
    restore(target, ours.fileno())
    thread.join()
    ours.close()
    assert [content(target, pfn)[0] for pfn in range(3)] == [1, 2, 3]


def test_a_sender_that_stops_sending_runs_into_the_deadline() -> None:
    read_end, write_end = os.pipe()
    try:
        os.write(write_end, hvm(pages(0, [1]))[:3000])
        with pytest.raises(DeadlineError):
            restore(guest(), read_end, timeout_s=0.05)
    finally:
        os.close(read_end)
        os.close(write_end)


def test_a_libxl_stream_is_unwrapped_and_its_emulator_records_are_kept_and_shown() -> None:
    shown: list[str] = []
    target, result = run(
        build.xl(build.libxl_stream()), libxl_record=lambda frame: shown.append(frame.type_name)
    )
    assert content(target, 0) == build.page(0x11)
    assert shown == ["LIBXC_CONTEXT", "EMULATOR_XENSTORE_DATA", "EMULATOR_CONTEXT", "END"]
    assert [r.type for r in result.libxl_records] == ["EMULATOR_XENSTORE_DATA", "EMULATOR_CONTEXT"]


def test_a_libxl_stream_that_breaks_off_behind_the_image_is_an_error() -> None:
    with pytest.raises(TruncatedError):
        run(build.libxl_stream()[:-8])


# Against an oracle


@st.composite
def memories(draw: st.DrawFn) -> list[list[tuple[int, int, int]]]:
    """Draw PAGE_DATA records: lists of (PFN, type, fill)."""
    kinds = st.sampled_from([t.value for t in PageType])
    entry = st.tuples(st.integers(0, 40), kinds, st.integers(1, 255))
    return draw(st.lists(st.lists(entry, min_size=1, max_size=12), max_size=8))


@settings(max_examples=120, deadline=None)
@given(memories())
def test_memory_and_types_are_those_of_an_oracle_that_goes_entry_by_entry(
    records: list[list[tuple[int, int, int]]],
) -> None:
    content_of: dict[int, int] = {}
    type_of: dict[int, int] = {}
    octets = []
    for entries in records:
        data = [(pfn, type, fill) for pfn, type, fill in entries if PageType(type).has_data]
        octets.append(page_data([(p, t) for p, t, _ in entries], b"".join(page(f) for _, _, f in data)))
        content_of |= {pfn: content_of.get(pfn, 0) for pfn, t, _ in entries if PageType(t).populated}
        content_of |= {pfn: fill for pfn, _, fill in data}
        type_of |= {pfn: type for pfn, type, _ in entries}
    target, result = run(hvm(*octets), guest(n_pages=64))
    assert result.pages == sum(PageType(t).has_data for entries in records for _, t, _ in entries)
    for pfn in range(41):
        assert populated(target, pfn) == [pfn in content_of]
        assert types(target, pfn) == [type_of.get(pfn, PageType.XTAB)]
        assert content(target, pfn) == page(content_of.get(pfn, 0))


def test_every_octet_of_a_small_stream_may_be_wrong_without_anything_but_a_clear_error() -> None:
    octets = hvm(pages(0, [1]))
    errors: list[StreamError] = []
    for i in [i for i in range(len(octets)) if not 200 < i < 4240]:
        damaged = bytearray(octets)
        damaged[i] ^= 0xFF
        try:
            run(bytes(damaged))
        except StreamError as exc:
            errors.append(exc)
    assert len(errors) > 50
    assert [exc for exc in errors if exc.offset is None] == []


def test_params_may_come_by_the_array() -> None:
    many = array_of(libxc.HvmParamEntry, [libxc.HvmParamEntry(index=9, value=i) for i in range(100)])
    target, _ = run(stream(STATIC_DATA_END, libxc.HvmParams(params=many), END))
    assert target.state()


# The command


def command(octets: bytes, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """Run ``migstream restore - model:4M --json``; return the exit code and the objects that it printed."""
    read_end, write_end = os.pipe()
    thread = threading.Thread(target=lambda: build_and_close(write_end, octets))
    thread.start()
    try:
        done = CliRunner().invoke(restore_command, [f"fd:{read_end}", "model:4M", "--json", *arguments])
    finally:
        os.close(read_end)
        thread.join()
    return done.exit_code, [json.loads(line) for line in done.stdout.splitlines()]


def build_and_close(fd: int, octets: bytes) -> None:
    with contextlib.suppress(BrokenPipeError), open(fd, "wb") as sink:
        sink.write(octets)


def test_the_last_line_says_what_was_restored() -> None:
    code, lines = command(stream(STATIC_DATA_END, pages(0, [1, 2]), pages(0, [3]), *TAIL, END))
    assert code == 0
    assert [(line["event"], line.get("pages")) for line in lines] == [("pass", 2), ("pass", 1), ("result", 3)]
    last = lines[-1]
    assert (last["result"], last["missing"], last["checkpoints"]) == ("restored", ["CPUID", "MSR"], 0)
    assert last["error"] is None
    assert last["seconds"] > 0


def test_the_last_line_says_where_a_restore_failed_and_how_far_it_came() -> None:
    octets = hvm(pages(0, [1, 2]), raw(0x0B))
    code, lines = command(octets)
    assert code == 1
    assert (lines[-1]["result"], lines[-1]["pages"]) == ("failed", 2)
    assert lines[-1]["error"]["record"]["type"] == "TOOLSTACK"
    assert octets[lines[-1]["error"]["offset"] - 8 :].startswith(b"\x0b")


def test_a_checkpointed_stream_that_breaks_off_failed_over() -> None:
    code, lines = command(build.remus_stream(2)[:-8], "--type", "remus")
    assert code == 0
    assert [line["number"] for line in lines if line["event"] == "checkpoint"] == [1, 2]
    assert (lines[-1]["result"], lines[-1]["checkpoints"]) == ("failed_over", 2)


def test_the_guest_type_is_the_streams_own_unless_it_is_asked_for() -> None:
    assert command(PvGuest().stream())[0] == 0
    code, lines = command(PvGuest().stream(), "--guest-type", "hvm")
    assert code == 1
    assert lines[-1]["error"]["field"] == "type"


@pytest.mark.parametrize("arguments", [["--type", "colo"], ["--type", "other"]])
def test_wrong_usage_is_told_before_anything_is_read(arguments: list[str]) -> None:
    assert command(b"", *arguments) == (2, [])
