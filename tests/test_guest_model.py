"""The model machine: what it is made of, its dirty log, suspension, and its two ends back to back."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migstream.bitmap import PfnBitmap
from migstream.errors import GuestError
from migstream.guests.compare import content_equal, differing_pfns, differing_records
from migstream.guests.model import ModelGuest, SuspendAnswer
from migstream.guests.protocols import PAGE_SIZE, RestoreTarget, SaveSource
from migstream.guests.workload import Workload
from migstream.records import Record, array_of, libxc
from migstream.records.hvm_params import HvmParam
from migstream.records.libxc import GuestType
from migstream.records.page_types import PageType
from migstream.records.pv_state import GDT_ENTRIES_MAX, PV_LAYOUTS
from tests.guests import Pfns, carry, pfns, run

BOTH = pytest.mark.parametrize("guest_type", list(GuestType))
PAGES = 4096
PV = PV_LAYOUTS[8]


def all_types(guest: ModelGuest) -> npt.NDArray[np.uint8]:
    return guest.page_types(run(0, guest.n_pages))


def ordinary(guest: ModelGuest, count: int, *, skip: int = 100) -> Pfns:
    """Some NOTAB pages that have no task."""
    candidates = np.setdiff1d(run(skip, guest.n_pages - skip), guest.fixed)
    found: Pfns = candidates[guest.page_types(candidates) == PageType.NOTAB][:count]
    return found


def one_word(guest: ModelGuest, where: Pfns, value: int) -> None:
    guest.write(where, np.full(len(where), 5, np.uint64), np.full(len(where), value, np.uint64))


def of_type(guest: ModelGuest, kind: type[Record]) -> list[Record]:
    return [record for record in guest.state() if isinstance(record, kind)]


# What a booted machine is


@BOTH
@pytest.mark.parametrize("n_pages", [64, 65, 511, 512, 513, 1024, 5000])
def test_a_machine_of_any_size_arrives_whole_on_another(guest_type: GuestType, n_pages: int) -> None:
    source = ModelGuest.booted(n_pages, guest_type, seed=n_pages)
    as_source: SaveSource = source
    target = ModelGuest.empty(n_pages, guest_type, seed=n_pages + 1)
    as_target: RestoreTarget = target
    source.suspend()
    assert len(carry(as_source, as_target)) == 0
    assert differing_pfns(source, target).tolist() == []
    assert differing_records(source, target) == []
    assert content_equal(source, target)


def test_a_pv_machine_has_pages_of_every_type() -> None:
    guest = ModelGuest.booted(PAGES, GuestType.PV)
    assert set(all_types(guest).tolist()) == set(PageType)


def test_an_hvm_machine_has_holes_broken_and_allocate_only_pages() -> None:
    guest = ModelGuest.booted(PAGES, GuestType.HVM)
    expected = {PageType.NOTAB, PageType.XTAB, PageType.BROKEN, PageType.XALLOC}
    assert set(all_types(guest).tolist()) == expected


@BOTH
def test_populated_is_what_has_data_or_is_allocate_only(guest_type: GuestType) -> None:
    guest = ModelGuest.booted(PAGES, guest_type)
    expected = [PageType(type).populated for type in all_types(guest).tolist()]
    assert guest.populated(run(0, PAGES)).tolist() == expected
    assert guest.n_populated == sum(expected)


@BOTH
def test_the_seed_decides_everything(guest_type: GuestType) -> None:
    one, same = (ModelGuest.booted(PAGES, guest_type, seed=4) for _ in range(2))
    other = ModelGuest.booted(PAGES, guest_type, seed=5)
    assert content_equal(one, same)
    assert not content_equal(one, other)
    assert len(differing_pfns(one, other)) > PAGES // 2


def test_without_holes_every_page_is_ordinary() -> None:
    assert not all_types(ModelGuest.booted(PAGES, holes=False)).any()


def test_no_two_pages_have_the_same_content() -> None:
    guest = ModelGuest.booted(PAGES, holes=False)
    assert len(np.unique(guest.memory.pages, axis=0)) == PAGES


@pytest.mark.parametrize("n_pages", [0, 1, 63])
def test_a_machine_too_small_is_refused(n_pages: int) -> None:
    with pytest.raises(GuestError, match="at least 64 pages"):
        ModelGuest.booted(n_pages)


def test_a_pv_machine_too_large_is_refused() -> None:
    with pytest.raises(GuestError, match="256 GiB"):
        ModelGuest.booted((1 << 26) + 1, GuestType.PV)


def test_an_untouched_terabyte_costs_next_to_nothing() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * 4096

    before = resident()
    target = ModelGuest.empty(1 << 28, GuestType.HVM)
    target.populate(pfns(0, (1 << 28) - 1))
    target.set_page_types(pfns(0, (1 << 28) - 1), np.zeros(2, np.uint8))
    assert target.page_types(pfns(5)).tolist() == [PageType.XTAB]
    assert resident() - before < 8 << 20


# Pages as buffers


def test_a_batch_in_a_row_is_one_buffer_of_the_machines_own_memory() -> None:
    guest = ModelGuest.booted(PAGES, holes=False)
    (buffer,), waits = guest.pages(run(1024, 1024), np.zeros(1024, np.uint8))
    assert len(buffer) == 1024 * PAGE_SIZE
    assert not waits.any()
    one_word(guest, pfns(1024), 0x1122334455667788)
    assert buffer[40:48] == bytes.fromhex("8877665544332211"), "the guest's memory itself, not a copy"


@given(st.lists(st.integers(0, 255), max_size=50))
@settings(deadline=None)
def test_buffers_are_the_pages_in_the_order_asked_coalesced(wanted: list[int]) -> None:
    guest = ModelGuest.empty(256, GuestType.HVM)
    guest.memory.words[:, 0] = np.arange(256)
    views = guest.pages(pfns(*wanted))
    content = np.frombuffer(b"".join(views), np.uint64).reshape(-1, 512)
    assert content[:, 0].tolist() == wanted
    breaks = sum(b != a + 1 for a, b in pairwise(wanted))
    assert len(views) == (breaks + 1 if wanted else 0)


def test_page_tables_stand_normalised_between_ordinary_pages() -> None:
    guest = ModelGuest.booted(2048, GuestType.PV, holes=False)
    batch = run(500, 1000)
    types = guest.page_types(batch)
    tables = batch[types == PageType.L1TAB]
    assert tables.tolist() == [511, 1023]
    buffers, waits = guest.pages(batch, types)
    assert not waits.any()
    assert [len(buffer) // PAGE_SIZE for buffer in buffers] == [11, 1, 511, 1, 476]
    # The L1 at 511 maps PFNs 0 to 511 in order: normalised, entry n names frame n.
    entries = np.frombuffer(buffers[1], np.uint64)
    assert (entries >> np.uint64(12) & np.uint64((1 << 40) - 1)).tolist() == list(range(512))
    assert entries[100] >> np.uint64(63) == 1, "no-execute"
    assert entries[511] & np.uint64(2) == 0, "a page table is mapped read-only"


@BOTH
def test_a_pfn_past_the_last_is_refused_everywhere(guest_type: GuestType) -> None:
    guest = ModelGuest.booted(PAGES, guest_type)
    beyond = pfns(3, PAGES)
    nothing = np.zeros(2, np.uint8)
    for ask in (
        lambda: guest.pages(beyond),
        lambda: guest.pages(beyond, nothing),
        lambda: guest.page_types(beyond),
        lambda: guest.set_page_types(beyond, nothing),
        lambda: guest.populate(beyond),
        lambda: guest.populated(beyond),
        lambda: guest.write(beyond, beyond, beyond),
    ):
        with pytest.raises(GuestError, match="0x1000 is past the guest's last, 0xfff"):
            ask()


# Restoring


def test_a_target_gets_no_more_memory_than_its_host_has() -> None:
    target = ModelGuest.empty(PAGES, GuestType.HVM, memory_limit=100)
    target.populate(run(0, 60))
    with pytest.raises(GuestError, match="60 of 100 pages are in use, and 41 more"):
        target.populate(run(60, 41))
    assert target.n_populated == 60
    target.populate(run(60, 40))


def test_localising_populates_what_a_table_refers_to() -> None:
    target = ModelGuest.empty(PAGES, GuestType.PV)
    target.populate(pfns(8))
    table = np.zeros(512, np.uint64)
    table[[3, 4, 5]] = [0x7063, 0x8063, 0x7063]
    target.localise(1, table.data.cast("B"))
    assert target.populated(pfns(6, 7, 8)).tolist() == [False, True, True]
    assert target.n_populated == 2
    assert target.frames is not None
    expected = [(target.frames.mfns(pfns(pfn))[0] << np.uint64(12)) | np.uint64(0x63) for pfn in (7, 8, 7)]
    assert table[[3, 4, 5]].tolist() == expected


def test_localising_refuses_an_entry_past_the_target_and_changes_nothing() -> None:
    target = ModelGuest.empty(PAGES, GuestType.PV)
    table = np.zeros(512, np.uint64)
    table[[3, 4]] = [0x7063, 0x1000063]
    with pytest.raises(GuestError, match="entry 4 of an L3 page table"):
        target.localise(3, table.data.cast("B"))
    assert table[3] == 0x7063
    assert target.n_populated == 0


def test_an_hvm_target_localises_nothing() -> None:
    with pytest.raises(GuestError, match="HVM"):
        ModelGuest.empty(PAGES, GuestType.HVM).localise(1, memoryview(bytearray(PAGE_SIZE)))


def test_the_last_record_of_a_kind_counts_and_vcpus_are_told_apart() -> None:
    target = ModelGuest.empty(PAGES, GuestType.PV)
    for vcpu_id, content in ((0, b"a" * 16), (1, b"b" * 16), (0, b"c" * 16)):
        target.apply(libxc.X86PvVcpuMsrs(vcpu_id=vcpu_id, context=content))
    assert {(r.vcpu_id, r.context) for r in target.state() if isinstance(r, libxc.X86PvVcpuMsrs)} == {
        (0, b"c" * 16),
        (1, b"b" * 16),
    }


def test_hvm_parameters_are_replaced_one_by_one() -> None:
    def params(**values: int) -> Record:
        entries = [libxc.HvmParamEntry(index=HvmParam[name], value=value) for name, value in values.items()]
        return libxc.HvmParams(params=array_of(libxc.HvmParamEntry, entries))

    target = ModelGuest.empty(PAGES, GuestType.HVM)
    target.apply(params(STORE_PFN=1, CONSOLE_PFN=2))
    target.apply(params(STORE_PFN=3))
    rings = target.complete()
    assert (rings.store_pfn, rings.console_pfn) == (3, 2)


@BOTH
def test_a_restored_machine_knows_its_rings(guest_type: GuestType) -> None:
    source = ModelGuest.booted(PAGES, guest_type)
    target = ModelGuest.empty(PAGES, guest_type)
    source.suspend()
    carry(source, target)
    rings = target.complete()
    assert rings.store_pfn is not None
    assert rings.console_pfn is not None
    assert rings == source.complete()
    assert target.page_types(pfns(rings.store_pfn, rings.console_pfn)).tolist() == [0, 0]


@BOTH
def test_a_restored_machine_runs_and_can_be_moved_on(guest_type: GuestType) -> None:
    machines = [ModelGuest.booted(PAGES, guest_type)]
    for seed in (7, 8):
        machines.append(ModelGuest.empty(PAGES, guest_type, seed=seed))
        machines[-2].suspend()
        carry(machines[-2], machines[-1])
        machines[-1].complete()
        machines[-1].resume()
        Workload(machines[-1]).step(50)
    assert len(differing_pfns(machines[0], machines[2])) > 0
    machines[2].suspend()
    last = ModelGuest.empty(PAGES, guest_type, seed=9)
    carry(machines[2], last)
    assert content_equal(machines[2], last)


# State


def test_pv_state_satisfies_what_xens_restore_checks_at_the_end() -> None:
    guest = ModelGuest.booted(PAGES, GuestType.PV, vcpus=3)
    guest.suspend()
    types = all_types(guest)
    basics = [r for r in guest.state_records() if isinstance(r, libxc.X86PvVcpuBasic)]
    assert [record.vcpu_id for record in basics] == [0, 1, 2]
    context = PV.vcpu_context
    for basic in basics:
        assert len(basic.context) == 5168
        assert 0 < context.gdt_ents.get(basic.context) <= GDT_ENTRIES_MAX
        frames = [frame.get(basic.context) for frame in context.used_gdt_frames(basic.context)]
        assert [types[pfn] for pfn in frames] == [PageType.NOTAB]
        assert types[PV.cr3_to_pfn(context.ctrlreg[3].get(basic.context))] == PageType.L4TAB_PIN
        cr1 = context.ctrlreg[1].get(basic.context)
        assert cr1 & 1
        assert PageType(types[cr1 >> 12]).page_table_level == 4
    start_info = guest.memory.page(context.edx.get(basics[0].context))
    assert types[context.edx.get(basics[0].context)] == PageType.NOTAB
    rings = pfns(PV.start_info.store_mfn.get(start_info), PV.start_info.console_mfn.get(start_info))
    assert guest.page_types(rings).tolist() == [PageType.NOTAB] * 2
    (p2m,) = guest.layout_records()
    assert isinstance(p2m, libxc.X86PvP2mFrames)
    assert (p2m.p2m_start_pfn, p2m.p2m_end_pfn, len(p2m.p2m_pfns)) == (0, PAGES - 1, PAGES // 512)
    assert guest.page_types(p2m.p2m_pfns.numpy()).tolist() == [PageType.NOTAB] * len(p2m.p2m_pfns)
    sizes = {type(r): len(r.context) for r in guest.state_records() if isinstance(r, libxc.VcpuRecord)}
    assert sizes[libxc.X86PvVcpuExtended] <= 128
    assert sizes[libxc.X86PvVcpuXsave] >= 16
    assert sizes[libxc.X86PvVcpuMsrs] % 16 == 0


@BOTH
def test_records_come_in_xens_order(guest_type: GuestType) -> None:
    guest = ModelGuest.booted(PAGES, guest_type, vcpus=1)
    guest.suspend()
    static = [record.type for record in guest.static_records()]
    state = [record.type for record in guest.state_records()]
    if guest_type is GuestType.HVM:
        assert static == ["X86_CPUID_POLICY", "X86_MSR_POLICY"]
        assert state == ["X86_TSC_INFO", "HVM_CONTEXT", "HVM_PARAMS"]
        assert guest.layout_records() == []
    else:
        assert static == ["X86_PV_INFO", "X86_CPUID_POLICY", "X86_MSR_POLICY"]
        vcpu = ["X86_PV_VCPU_BASIC", "X86_PV_VCPU_EXTENDED", "X86_PV_VCPU_XSAVE", "X86_PV_VCPU_MSRS"]
        assert state == ["X86_TSC_INFO", "SHARED_INFO", *vcpu]
        assert [record.type for record in guest.layout_records()] == ["X86_PV_P2M_FRAMES"]


def test_the_hvm_context_is_a_chain_of_save_records() -> None:
    guest = ModelGuest.booted(PAGES, GuestType.HVM, vcpus=2)
    (context,) = of_type(guest, libxc.HvmContext)
    assert isinstance(context, libxc.HvmContext)
    blob, found = context.hvm_ctx, []
    while blob:
        code, instance, length = struct.unpack_from("<HHI", blob)
        found.append((code, instance, length))
        blob = blob[8 + length :]
    # HEADER 24, CPU 1032, LAPIC 24, LAPIC_REGS 1024, END 0 (arch-x86/hvm/save.h)
    assert found == [
        (1, 0, 24), (2, 0, 1032), (2, 1, 1032), (5, 0, 24), (5, 1, 24), (6, 0, 1024), (6, 1, 1024), (0, 0, 0),
    ]  # fmt: skip


@BOTH
def test_time_changes_the_state_and_nothing_else_does(guest_type: GuestType) -> None:
    guest = ModelGuest.booted(PAGES, guest_type)
    before = guest.state()
    assert guest.state() == before
    Workload(guest).step(1)
    after = guest.state()
    assert [type(record) for record in after] == [type(record) for record in before]
    assert after != before


def test_the_state_of_a_running_guest_is_not_handed_out() -> None:
    with pytest.raises(GuestError, match="suspend it first"):
        ModelGuest.booted(PAGES).state_records()


# Suspension


@pytest.mark.parametrize(
    ("answer", "said"), [(SuspendAnswer.REFUSES, "refused"), (SuspendAnswer.SILENT, "did not answer")]
)
def test_a_guest_that_does_not_suspend_runs_on(answer: SuspendAnswer, said: str) -> None:
    guest = ModelGuest.booted(PAGES)
    guest.suspend_request = lambda: answer
    with pytest.raises(GuestError, match=said):
        guest.suspend()
    assert not guest.suspended
    Workload(guest).step(1)


def test_the_guest_may_still_write_when_it_is_asked_to_suspend() -> None:
    guest = ModelGuest.booted(PAGES)
    guest.enable_dirty_log()
    page = ordinary(guest, 1)

    def request() -> SuspendAnswer:
        one_word(guest, page, 9)
        return SuspendAnswer.SUSPENDS

    guest.suspend_request = request
    guest.suspend()
    dirty = PfnBitmap(PAGES)
    guest.clean_dirty_log(dirty)
    assert int(page[0]) in dirty


def test_a_suspended_guest_does_nothing() -> None:
    guest = ModelGuest.booted(PAGES, GuestType.PV)
    page = ordinary(guest, 1)
    guest.suspend()
    deeds: tuple[Callable[[], object], ...] = (
        lambda: one_word(guest, page, 1),
        lambda: guest.balloon_out(page),
        lambda: guest.balloon_in(page),
        lambda: guest.mark_offline(page),
        lambda: guest.exchange(int(page[0])),
        lambda: guest.begin_change(511, 0),
        lambda: Workload(guest).step(1),
    )
    for deed in deeds:
        with pytest.raises(GuestError, match="suspended"):
            deed()


def test_start_info_names_frames_while_the_guest_runs_and_pfns_while_it_does_not() -> None:
    guest = ModelGuest.booted(PAGES, GuestType.PV)
    assert guest.frames is not None
    rings = guest.complete()
    pfn = int(guest.fixed[0])
    store = PV.start_info.store_mfn
    running = store.get(guest.memory.page(pfn))
    guest.suspend()
    suspended = store.get(guest.memory.page(pfn))
    assert running == guest.frames.mfn(suspended)
    guest.resume()
    assert store.get(guest.memory.page(pfn)) == running
    assert rings.store_pfn == running, "complete() only tells PFNs of a suspended guest"


def test_a_resumed_guests_own_list_of_frames_is_its_hosts() -> None:
    source = ModelGuest.booted(PAGES, GuestType.PV)
    target = ModelGuest.empty(PAGES, GuestType.PV, seed=77)
    source.suspend()
    carry(source, target)
    target.complete()
    target.resume()
    (p2m,) = target.layout_records()
    assert isinstance(p2m, libxc.X86PvP2mFrames)
    assert target.frames is not None
    listed = target.memory.words[p2m.p2m_pfns.numpy()].reshape(-1)
    there = target.populated(run(0, PAGES))
    assert np.array_equal(listed[there], target.frames.mfns(run(0, PAGES))[there])
    assert (listed[~there] == np.uint64(2**64 - 1)).all()


# The dirty log


def test_the_log_has_what_was_written_since_it_was_enabled_or_cleaned() -> None:
    guest = ModelGuest.booted(PAGES)
    a, b, c = (int(pfn) for pfn in ordinary(guest, 3))
    found = PfnBitmap(PAGES)
    found.add(pfns(0))
    one_word(guest, pfns(a), 1)
    guest.enable_dirty_log()
    one_word(guest, pfns(b), 1)
    guest.peek_dirty_log(found)
    assert np.concatenate(list(found.batches())).tolist() == [b], "what was in the bitmap is replaced"
    one_word(guest, pfns(c), 1)
    guest.clean_dirty_log(found)
    assert np.concatenate(list(found.batches())).tolist() == [b, c]
    guest.clean_dirty_log(found)
    assert len(found) == 0


def test_a_log_that_is_off_cannot_be_asked() -> None:
    guest = ModelGuest.booted(PAGES)
    for ask in (guest.clean_dirty_log, guest.peek_dirty_log):
        with pytest.raises(GuestError, match="enable it"):
            ask(PfnBitmap(PAGES))
    guest.enable_dirty_log()
    guest.disable_dirty_log()
    with pytest.raises(GuestError, match="enable it"):
        guest.clean_dirty_log(PfnBitmap(PAGES))


def test_a_completed_target_logs_its_own_writes() -> None:
    source = ModelGuest.booted(PAGES)
    target = ModelGuest.empty(PAGES, GuestType.HVM)
    source.suspend()
    carry(source, target)
    target.complete()
    target.resume()
    page = ordinary(target, 1)
    one_word(target, page, 3)
    dirty = PfnBitmap(PAGES)
    target.clean_dirty_log(dirty)
    assert np.concatenate(list(dirty.batches())).tolist() == page.tolist()


@BOTH
@given(seed=st.integers(0, 1 << 20), rounds=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_copying_what_the_log_names_round_by_round_gives_an_equal_machine(
    guest_type: GuestType, seed: int, rounds: int
) -> None:
    source = ModelGuest.booted(256, guest_type, seed=seed)
    target = ModelGuest.empty(256, guest_type, seed=seed + 1)
    workload = Workload(source, seed=seed, working_set=256, turmoil=0.7)
    source.enable_dirty_log()
    later = carry(source, target)
    dirty = PfnBitmap(256)
    for _ in range(rounds):
        workload.step(20)
        source.clean_dirty_log(dirty)
        later = np.union1d(later, carry(source, target, np.concatenate([pfns(), *dirty.batches()])))
        workload.step(3)
    source.suspend()
    source.clean_dirty_log(dirty)
    assert len(carry(source, target, np.union1d(later, np.concatenate([pfns(), *dirty.batches()])))) == 0
    assert differing_pfns(source, target).tolist() == []
    assert content_equal(source, target)


def test_no_write_of_a_running_thread_falls_between_two_cleans() -> None:
    source = ModelGuest.booted(512)
    target = ModelGuest.empty(512, GuestType.HVM)
    source.enable_dirty_log()
    dirty = PfnBitmap(512)
    enough = threading.Event()
    workload = Workload(source, working_set=512)

    def work() -> None:
        while not enough.is_set():
            workload.step(7)

    thread = threading.Thread(target=work)
    thread.start()
    carry(source, target)
    for _ in range(60):
        source.clean_dirty_log(dirty)
        carry(source, target, np.concatenate([pfns(), *dirty.batches()]))
    enough.set()
    thread.join()
    source.suspend()
    source.clean_dirty_log(dirty)
    carry(source, target, np.concatenate([pfns(), *dirty.batches()]))
    assert workload.pages_written > 0
    assert differing_pfns(source, target).tolist() == []


# What the guest does to itself


def test_a_page_table_in_change_waits_until_the_guest_is_suspended() -> None:
    guest = ModelGuest.booted(PAGES, GuestType.PV, holes=False)
    batch = run(500, 20)
    types = guest.page_types(batch)
    guest.begin_change(511, 3)
    buffers, waits = guest.pages(batch, types)
    assert batch[waits].tolist() == [511]
    assert sum(len(buffer) for buffer in buffers) == 19 * PAGE_SIZE
    guest.suspend()
    _, waits = guest.pages(batch, types)
    assert not waits.any()


def test_a_suspended_guest_with_a_foreign_frame_in_a_page_table_cannot_be_saved() -> None:
    guest = ModelGuest.booted(PAGES, GuestType.PV)
    guest.suspend()
    guest.memory.words[511, 3] = 0x1063
    with pytest.raises(GuestError, match="page table 0x1ff refers to a frame that is not the guest's"):
        guest.pages(pfns(511), guest.page_types(pfns(511)))


@BOTH
def test_ballooning_takes_and_gives_memory_and_shows_in_the_log(guest_type: GuestType) -> None:
    guest = ModelGuest.booted(PAGES, guest_type)
    guest.enable_dirty_log()
    pages = ordinary(guest, 3)
    before = guest.n_populated
    guest.balloon_out(pages)
    assert guest.n_populated == before - 3
    assert guest.page_types(pages).tolist() == [PageType.XTAB] * 3
    guest.balloon_in(pages[:1])
    assert guest.n_populated == before - 2
    assert not guest.memory.words[int(pages[0])].any(), "what was there is gone"
    dirty = PfnBitmap(PAGES)
    guest.clean_dirty_log(dirty)
    assert dirty.test(pages).all()


@BOTH
def test_a_page_goes_offline_and_is_exchanged_for_a_good_one(guest_type: GuestType) -> None:
    guest = ModelGuest.booted(PAGES, guest_type)
    page = ordinary(guest, 1)
    guest.mark_offline(page)
    assert guest.page_types(page).tolist() == [PageType.BROKEN]
    assert not guest.populated(page).any()
    guest.exchange(int(page[0]))
    assert guest.page_types(page).tolist() == [PageType.NOTAB]
    assert guest.populated(page).all()


def test_exchanging_a_pv_page_keeps_its_content_and_moves_its_mapping() -> None:
    guest = ModelGuest.booted(PAGES, GuestType.PV)
    assert guest.frames is not None
    page = int(ordinary(guest, 1)[0])
    content, frame = guest.memory.page(page).tobytes(), guest.frames.mfn(page)
    guest.exchange(page)
    assert guest.memory.page(page).tobytes() == content
    assert guest.frames.mfn(page) != frame
    guest.suspend()
    target = ModelGuest.empty(PAGES, GuestType.PV)
    carry(guest, target)
    assert content_equal(guest, target)


# The workload


@BOTH
def test_steps_are_deterministic(guest_type: GuestType) -> None:
    machines = [ModelGuest.booted(1024, guest_type, seed=1) for _ in range(2)]
    for machine in machines:
        workload = Workload(machine, seed=2, turmoil=0.5)
        for _ in range(40):
            workload.step(10)
        machine.suspend()
    assert content_equal(*machines)
    assert not content_equal(machines[0], ModelGuest.booted(1024, guest_type, seed=1))


def test_a_workload_stays_in_its_working_set_and_off_pages_with_a_task() -> None:
    guest = ModelGuest.booted(PAGES, GuestType.PV)
    guest.enable_dirty_log()
    workload = Workload(guest, working_set=200)
    for _ in range(50):
        workload.step(50)
    dirty = PfnBitmap(PAGES)
    guest.clean_dirty_log(dirty)
    written = np.concatenate(list(dirty.batches()))
    assert 100 < len(written) <= 200
    assert written[-1] - written[0] < 200
    assert not np.isin(written, guest.fixed).any()


def test_a_workloads_thread_waits_while_the_guest_is_suspended_and_goes_on_after() -> None:
    guest = ModelGuest.booted(PAGES)
    stepped = threading.Event()
    workload = Workload(guest, pages_per_second=1e6)
    step = workload.step

    def counted(n_pages: int) -> None:
        step(n_pages)
        stepped.set()

    workload.step = counted  # type: ignore[method-assign]  # watched, not replaced
    with workload:
        assert stepped.wait(10)
        guest.suspend()
        written, memory = workload.pages_written, guest.memory.pages.copy()
        stepped.clear()
        assert not stepped.wait(0.1)
        assert workload.pages_written == written
        assert np.array_equal(guest.memory.pages, memory)
        guest.resume()
        assert stepped.wait(10)
    assert workload.pages_written > written
    stepped.clear()
    assert not stepped.wait(0.05), "stopped"


def test_a_workload_can_be_stopped_while_the_guest_is_suspended() -> None:
    guest = ModelGuest.booted(PAGES)
    workload = Workload(guest)
    workload.start()
    guest.suspend()
    workload.stop()
    workload.stop()


# Comparing


@BOTH
def test_every_kind_of_difference_is_found(guest_type: GuestType) -> None:
    one, other = (ModelGuest.booted(PAGES, guest_type, seed=3) for _ in range(2))
    a, b, c = (int(pfn) for pfn in ordinary(one, 3))
    other.memory.pages[a, 4095] ^= 1
    other.set_page_types(pfns(b), PageType.XALLOC)
    expected = [a, b]
    if guest_type is GuestType.PV:
        other.memory.words[511, c % 512] ^= np.uint64(0x40)  # the dirty bit of an entry
        expected.append(511)
    broken = np.flatnonzero(all_types(one) == PageType.BROKEN)[:1]
    other.memory.pages[broken] ^= 1  # no content, so no difference
    assert differing_pfns(one, other).tolist() == sorted(expected)


def test_records_that_differ_are_named() -> None:
    one, other = (ModelGuest.booted(PAGES, seed=3, vcpus=2) for _ in range(2))
    Workload(other).step(0)
    other.apply(libxc.SharedInfo(shared_info=bytes(PAGE_SIZE)))
    assert differing_records(one, other) == [
        "HVM_CONTEXT: not equal",
        "SHARED_INFO: only the second has it",
        "X86_TSC_INFO: not equal",
    ]


def test_pages_past_the_end_of_the_smaller_machine_are_differences() -> None:
    one = ModelGuest.booted(PAGES, holes=False)
    other = ModelGuest.empty(PAGES + 10, GuestType.HVM)
    one.suspend()
    carry(one, other)
    assert differing_pfns(one, other).tolist() == []
    other.set_page_types(pfns(PAGES + 4), PageType.NOTAB)
    assert differing_pfns(one, other).tolist() == differing_pfns(other, one).tolist() == [PAGES + 4]
