"""Whole streams that are sound, by construction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

import hypothesis.strategies as st

from migstream.fuzzing.tree import Record as Node
from migstream.records import ByteOrder, Record, envelopes, libxc, libxl, xl
from migstream.records.fields import ORDER_CHAR
from migstream.records.libxc import GuestType
from migstream.testing.guests import N_PAGES, Batch, Guest, guests
from migstream.testing.octets import StreamOctets

__all__ = ["LAYERS", "N_PAGES", "streams"]

Kind = Literal["plain", "live", "remus", "colo"]
GuestName = Literal["pv", "hvm"]
LayerName = Literal["libxc", "libxl", "xl", "libvirt", "xapi"]

#: What may be around a stream of each kind, and may be drawn where none is asked for.
LAYERS: dict[Kind, tuple[LayerName, ...]] = {
    "plain": ("libxc", "libxl", "xl", "libvirt", "xapi"),
    "live": ("libxc", "libxl", "xl", "libvirt", "xapi"),
    "remus": ("libxc", "libxl"),
    "colo": ("libxc", "libxl"),
}
MAX_ROUNDS = 3  # passes of a live save, checkpoints of the others

_AROUND = {kind: st.sampled_from(layers) for kind, layers in LAYERS.items()}
_GUEST: st.SearchStrategy[GuestName] = st.sampled_from(("hvm", "pv"))
_VERSION = st.sampled_from((3, 2))
_ROUNDS = st.integers(1, MAX_ROUNDS)
_CONTROL_IDS = st.lists(st.sampled_from(libxl.CheckpointStateId), max_size=2)
_WITH_END = st.booleans()


@st.composite
def streams(
    draw: st.DrawFn,
    guest: GuestName | None = None,
    kind: Kind = "plain",
    layer: LayerName | None = None,
    *,
    order: ByteOrder = "little",
    version: Literal[2, 3] | None = None,
) -> StreamOctets:
    """Draw the octets of a stream that `migstream.verification` finds sound and any restore has to take.

    ``guest``, ``layer`` (the outermost) and ``version`` (of the libxc image) are drawn where not given.
    ``kind``: ``plain`` sends each page once; ``live`` sends pages again, pass by pass; ``remus`` and
    ``colo`` have checkpoints, and may end at one without an END; ``colo`` has libxl's CHECKPOINT_STATE too.
    Of ``order`` big no restore on x86 takes a stream, and verify says so, but nothing else.

    The guest has `N_PAGES` PFNs at most. Raises `ValueError` for a layer that such a stream never has.
    """
    if layer is not None and layer not in LAYERS[kind]:
        raise ValueError(f"a {kind} stream stands in {' or '.join(LAYERS[kind])}, not in {layer}")
    around = draw(_AROUND[kind]) if layer is None else layer
    name = draw(_GUEST) if guest is None else guest
    number = draw(_VERSION) if version is None else version
    rounds = 1 if kind == "plain" else draw(_ROUNDS)
    type = GuestType[name.upper()]
    drawn = draw(guests(type, version=number, passes=rounds, resent=kind != "plain"))
    bare = around in ("libxc", "xapi")
    emulators = b"" if type is GuestType.PV or bare else draw(_emulator(order))
    image = _headers(type, number, order)
    if kind in ("plain", "live"):
        octets = image + _one_state(drawn, order) + _record(libxc.End(), order)
        octets += b"" if bare else emulators + _record(libxl.LibxlEnd(), order)
    else:
        octets = image + draw(_checkpointed(drawn, emulators, order, bare=bare, colo=kind == "colo"))
    if not bare:
        header = libxl.LibxlHeader(options=libxl.BIG_ENDIAN if order == "big" else 0)
        octets = header.build("big") + _record(libxl.LibxcContext(), order) + octets
    return StreamOctets(_ENVELOPES[around](octets, order) if around in _ENVELOPES else octets)


def _record(record: Record, order: ByteOrder) -> bytes:
    return Node.of(record.layer, record.code, record.build(order), order).build()


def _records(records: Sequence[Record], order: ByteOrder) -> bytes:
    return b"".join(_record(record, order) for record in records)


def _pages(batches: Sequence[Batch], order: ByteOrder) -> bytes:
    code, char = libxc.PageData.code, ORDER_CHAR[order]
    return b"".join(Node.of("libxc", code, batch.octets(char), order).build() for batch in batches)


def _headers(type: GuestType, version: int, order: ByteOrder) -> bytes:
    image = libxc.ImageHeader(version=version, options=libxc.BIG_ENDIAN if order == "big" else 0)
    return image.build("big") + libxc.DomainHeader(type=type, xen_major=4, xen_minor=17).build(order)


def _start(guest: Guest, order: ByteOrder) -> bytes:
    """Return everything up to the first pass; the static data of version 2 have no end of their own."""
    static = _records(guest.static, order)
    return static + _records(guest.layout, order) + _pages(guest.first, order)


def _one_state(guest: Guest, order: ByteOrder) -> bytes:
    passes = b"".join(_pages(batches, order) for batches in guest.again)
    return _start(guest, order) + passes + _records(guest.states[-1], order)


@st.composite
def _checkpointed(
    draw: st.DrawFn, guest: Guest, emulators: bytes, order: ByteOrder, *, bare: bool, colo: bool
) -> bytes:
    octets = _start(guest, order)
    for number, state in enumerate(guest.states):
        if number:
            octets += _pages(guest.again[number - 1], order)
        octets += _records(state, order) + _record(libxc.Checkpoint(), order)
        if not bare:
            octets += emulators + _record(libxl.CheckpointEnd(), order)
            if colo:
                told = draw(_CONTROL_IDS)
                octets += _records([libxl.CheckpointState(control_id=id) for id in told], order)
    if draw(_WITH_END):
        octets += _record(libxc.End(), order)
        octets += b"" if bare else _record(libxl.LibxlEnd(), order)
    return octets


_WORD = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_@", min_size=1, max_size=8)
_PAIRS = st.lists(st.tuples(_WORD, _WORD), max_size=3)
_DEVICE_STATE = st.binary(max_size=16)


@cache
@st.composite
def _emulator(draw: st.DrawFn, order: ByteOrder) -> bytes:
    """Draw xenstore data and the state of the guest's QEMU, or either, or none."""
    pairs = draw(_PAIRS)
    records: list[Record] = []
    if pairs:
        data = libxl.EmulatorXenstoreData.pack(pairs)
        records.append(libxl.EmulatorXenstoreData(emulator_id=2, index=0, data=data))
    state = draw(_DEVICE_STATE)
    if state:
        records.append(libxl.EmulatorContext(emulator_id=2, index=0, emulator_ctx=b"QEVM" + state))
    return _records(records, order)


# Envelopes

CONFIG = b'{"c_info": {"name": "guest"}}\0'
XML = b"<domain type='xen'><name>guest</name></domain>\0"
XENOPS = b"((time 20140101T00:00:00Z)(word_size 64))"


def _xl(content: bytes, order: ByteOrder) -> bytes:
    config = xl.SaveFileConfig(config=CONFIG).build(order)
    return xl.SaveFileHeader(optional_data_len=len(config)).build(order) + config + content


def _libvirt(content: bytes, order: ByteOrder) -> bytes:
    return envelopes.LibvirtHeader(xml_len=len(XML)).build("little") + XML + content


def _xapi(content: bytes, order: ByteOrder) -> bytes:
    segments = [Node.of("xapi", envelopes.Xenops.code, XENOPS), Node.of("xapi", envelopes.Libxc.code)]
    head = envelopes.XapiHeader().build("little") + b"".join(segment.build() for segment in segments)
    return head + content + Node.of("xapi", envelopes.EndOfImage.code).build()


_ENVELOPES: dict[LayerName, Callable[[bytes, ByteOrder], bytes]] = {
    "xl": _xl,
    "libvirt": _libvirt,
    "xapi": _xapi,
}
