"""What small sound guests consist of, as strategies: static data, batches of pages, state.

Strategies are kept (`cache`): making them takes longer than drawing from them, and shrinking draws a lot.

A guest has `N_PAGES` PFNs at most. A PV guest's page tables, start info and frame list refer to each other,
so they are at fixed PFNs, and what is drawn is everything else.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import hypothesis.strategies as st

from migstream.records import Record, array_of, libxc
from migstream.records.hvm_params import HvmParam
from migstream.records.libxc import GuestType, TscMode
from migstream.records.page_types import TYPE_SHIFT, PageType
from migstream.records.pv_state import CONTEXT_ONLINE, PV_LAYOUTS
from migstream.testing.records import records

__all__ = ["N_PAGES", "PAGE", "Batch", "Guest", "guests"]

N_PAGES = 64  # a restore target of so many pages takes every stream
PAGE = 4096
HVM_TYPES = (PageType.NOTAB, PageType.XALLOC, PageType.XTAB, PageType.BROKEN)
PV_EXTRA = 8  # PFNs from here on are a PV guest's ordinary ones
STORE, CONSOLE, START_INFO, P2M, TOP_TABLE, USER_TABLE, GDT = range(7)
#: Parameters whose value is a PFN.
PFN_PARAMS = {HvmParam.STORE_PFN, HvmParam.IOREQ_PFN, HvmParam.BUFIOREQ_PFN, HvmParam.CONSOLE_PFN}
HVM_HEADER = struct.pack("<HHIIIQII", 1, 0, 24, 0x5438_1286, 1, 0, 0x306E4, 2_893_300)
HVM_END = struct.pack("<HHI", 0, 0, 0)


@dataclass(frozen=True)
class Batch:
    """PFNs in the order of a record, each with its type and the octet that its page is filled with."""

    pages: tuple[tuple[int, PageType, int], ...]
    content: dict[int, bytes] | None = None  # pages that are not of one octet, by PFN

    def octets(self, order: str) -> bytes:
        """Return the body of a PAGE_DATA record."""
        entries = [kind << TYPE_SHIFT | pfn for pfn, kind, _ in self.pages]
        head = struct.pack(f"{order}II{len(entries)}Q", len(entries), 0, *entries)
        content = self.content or {}
        data = [content.get(pfn, bytes([fill]) * PAGE) for pfn, kind, fill in self.pages if kind.has_data]
        return head + b"".join(data)


@dataclass(frozen=True)
class Guest:
    """A guest as a stream tells it: ``first`` is needed before any of ``pages`` may be repeated.

    ``states`` is the state behind each pass of pages, the last one's last.
    """

    type: GuestType
    static: tuple[Record, ...]
    layout: tuple[Record, ...]
    first: tuple[Batch, ...]
    again: tuple[tuple[Batch, ...], ...]
    states: tuple[tuple[Record, ...], ...]


@cache
def _pages(pfns: Sequence[int], kinds: Sequence[PageType], *, min_size: int) -> st.SearchStrategy[Batch]:
    one = st.tuples(st.sampled_from(pfns), st.sampled_from(kinds), st.integers(0, 255))
    several = st.lists(one, min_size=min_size, max_size=6, unique_by=lambda page: page[0])
    return several.map(lambda pages: Batch(tuple(pages)))


@cache
def _batches(
    pfns: Sequence[int], kinds: Sequence[PageType], *, min_size: int
) -> st.SearchStrategy[tuple[Batch, ...]]:
    return st.lists(_pages(pfns, kinds, min_size=1), min_size=min_size, max_size=3).map(tuple)


@cache
def _policies() -> st.SearchStrategy[tuple[Record, ...]]:
    leaves = st.lists(records(libxc.CpuidLeaf), min_size=1, max_size=3)
    msrs = st.lists(
        st.builds(libxc.MsrEntry, idx=st.integers(0, 0xFFFF_FFFF), val=st.integers(0, (1 << 64) - 1)),
        min_size=1,
        max_size=3,
    )
    cpuid = leaves.map(lambda entries: libxc.X86CpuidPolicy(leaves=array_of(libxc.CpuidLeaf, entries)))
    msr = msrs.map(lambda entries: libxc.X86MsrPolicy(msrs=array_of(libxc.MsrEntry, entries)))
    return st.tuples(st.none() | cpuid, st.none() | msr).map(_present)


def _present(items: Sequence[Record | None]) -> tuple[Record, ...]:
    return tuple(item for item in items if item is not None)


@cache
def _tsc() -> st.SearchStrategy[Record]:
    return st.builds(
        libxc.X86TscInfo,
        mode=st.sampled_from(TscMode),
        khz=st.integers(0, 0xFFFF_FFFF),
        nsec=st.integers(0, (1 << 64) - 1),
        incarnation=st.integers(0, 0xFFFF_FFFF),
    )


@cache
def _params() -> st.SearchStrategy[Record]:
    def param(entry: tuple[HvmParam, int]) -> libxc.HvmParamEntry:
        index, value = entry
        return libxc.HvmParamEntry(index=index, value=value % N_PAGES if index in PFN_PARAMS else value)

    entry = st.tuples(st.sampled_from(HvmParam), st.integers(0, (1 << 64) - 1)).map(param)
    chosen = st.lists(entry, min_size=1, max_size=4, unique_by=lambda entry: entry.index)
    return chosen.map(lambda entries: libxc.HvmParams(params=array_of(libxc.HvmParamEntry, entries)))


@cache
@st.composite
def _hvm_state(draw: st.DrawFn) -> tuple[Record, ...]:
    """Draw parameters and context in the specification's order, or in that in which Xen writes them."""
    params, context = draw(_params()), draw(_hvm_context())
    as_xen = draw(_YES_OR_NO)
    return (draw(_tsc()), context, params) if as_xen else (draw(_tsc()), params, context)


@cache
def _hvm_context() -> st.SearchStrategy[Record]:
    """Draw a context: its header, entries of any type, its end."""
    entry = st.tuples(st.integers(2, 31), st.integers(0, 3), st.binary(max_size=16))
    middle = st.lists(entry, max_size=3).map(
        lambda entries: b"".join(struct.pack("<HHI", code, i, len(body)) + body for code, i, body in entries)
    )
    return middle.map(lambda octets: libxc.HvmContext(hvm_ctx=HVM_HEADER + octets + HVM_END))


@st.composite
def guests(draw: st.DrawFn, type: GuestType, *, version: int, passes: int, resent: bool) -> Guest:
    """Draw a guest with ``passes`` states; ``resent``: each pass behind the first sends pages again."""
    static = draw(_policies()) if version >= 3 else ()
    if type is GuestType.HVM:
        pfns, kinds = range(N_PAGES), HVM_TYPES
        layout: tuple[Record, ...] = ()
        first = draw(_batches(pfns, kinds, min_size=1))
        states: list[tuple[Record, ...]] = [
            (draw(_tsc()), draw(_hvm_context()), draw(_params())) for _ in range(passes)
        ]
        if not resent:
            first = _each_pfn_once(first)
    else:
        width = draw(st.sampled_from((8, 4)))
        static = (_pv_info(width), *static)
        layout = (_p2m(),)
        pfns, kinds = range(PV_EXTRA, N_PAGES), HVM_TYPES
        first = (_pv_pages(width), *_each_pfn_once(draw(_batches(pfns, kinds, min_size=0))))
        states = [draw(_pv_state(width)) for _ in range(passes)]
    if version >= 3:
        static = (*static, libxc.StaticDataEnd())
    again = tuple(draw(_batches(pfns, kinds, min_size=0)) if resent else () for _ in range(passes - 1))
    return Guest(type, static, layout, first, again, tuple(states))


def _each_pfn_once(batches: Sequence[Batch]) -> tuple[Batch, ...]:
    """Leave PFNs out that an earlier batch has, and batches that have nothing left."""
    seen: set[int] = set()
    kept = []
    for batch in batches:
        own = tuple(page for page in batch.pages if page[0] not in seen)
        seen.update(page[0] for page in own)
        if own:
            kept.append(Batch(own))
    return tuple(kept)


# PV guests


def _pv_info(width: int) -> Record:
    return libxc.X86PvInfo(guest_width=width, pt_levels=PV_LAYOUTS[width].pt_levels)


def _p2m() -> Record:
    return libxc.X86PvP2mFrames(p2m_start_pfn=0, p2m_end_pfn=N_PAGES - 1, p2m_pfns=array_of(8, [P2M]))


def _pv_pages(width: int) -> Batch:
    """Return the pages that hold a PV guest together."""
    top = PageType.L4TAB_PIN if width == 8 else PageType.L3TAB_PIN
    start_info = bytearray(PAGE)
    layout = PV_LAYOUTS[width].start_info
    layout.nr_pages.set(start_info, N_PAGES)
    layout.store_mfn.set(start_info, STORE)
    layout.console_mfn.set(start_info, CONSOLE)
    kinds = {TOP_TABLE: top, USER_TABLE: top}
    pages = tuple((pfn, kinds.get(pfn, PageType.NOTAB), 0) for pfn in range(GDT + 1))
    return Batch(pages, {START_INFO: bytes(start_info)})


_YES_OR_NO, _OCTET, _ONE_OR_TWO = st.booleans(), st.integers(0, 255), st.integers(1, 2)
_VCPU_PARTS: tuple[tuple[type[libxc.VcpuRecord], st.SearchStrategy[bytes]], ...] = (
    (libxc.X86PvVcpuExtended, st.binary(min_size=1, max_size=128)),
    (libxc.X86PvVcpuXsave, st.binary(min_size=16, max_size=64)),
    (libxc.X86PvVcpuMsrs, st.binary(min_size=16, max_size=16)),
)


@cache
@st.composite
def _pv_state(draw: st.DrawFn, width: int) -> tuple[Record, ...]:
    state: list[Record] = [draw(_tsc()), libxc.SharedInfo(shared_info=_shared_info(width))]
    for vcpu_id in range(draw(_ONE_OR_TWO)):
        state.append(_vcpu(width, vcpu_id, draw(_OCTET)))
        for cls, context in _VCPU_PARTS:
            if draw(_YES_OR_NO):
                state.append(cls(vcpu_id=vcpu_id, context=draw(context)))
    return tuple(state)


def _shared_info(width: int) -> bytes:
    page = bytearray(PAGE)
    PV_LAYOUTS[width].shared_info.max_pfn.set(page, N_PAGES)
    return bytes(page)


def _vcpu(width: int, vcpu_id: int, fill: int) -> Record:
    layout = PV_LAYOUTS[width]
    where = layout.vcpu_context
    context = bytearray(where.size)
    context[: where.flags.offset] = bytes([fill]) * where.flags.offset  # the FPU's registers
    where.flags.set(context, CONTEXT_ONLINE)
    where.edx.set(context, START_INFO)
    where.gdt_ents.set(context, 512)
    where.gdt_frames[0].set(context, GDT)
    where.ctrlreg[3].set(context, layout.pfn_to_cr3(TOP_TABLE))
    if width == 8:
        where.ctrlreg[1].set(context, USER_TABLE << 12 | 1)
    return libxc.X86PvVcpuBasic(vcpu_id=vcpu_id, context=bytes(context))
