"""Legacy streams that are cut, lie or are none: one error with its place, no memory for announced lengths."""

from __future__ import annotations

import struct
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migstream.errors import FormatError, StreamError, TruncatedError
from migstream.io.inputs import MemoryInput
from migstream.io.writer import StreamWriter
from migstream.legacy import LegacyReport, convert_legacy
from migstream.records.libxc import GuestType
from tests import legacy_streams as old
from tests.legacy_streams import PvGuest, Words, page

WIDTHS = pytest.mark.parametrize("width", [4, 8], ids=["32-bit toolstack", "64-bit toolstack"])


def attempt(legacy: bytes, guest: GuestType | None = None) -> LegacyReport:
    """Convert into nowhere."""
    with tempfile.TemporaryFile() as output:
        return convert_legacy(MemoryInput(legacy), StreamWriter(output.fileno()), guest=guest)


def small_hvm(width: int, qemu: bytes) -> bytes:
    """Return an HVM stream of allocated pages only, with chunks of every form."""
    words = Words(width)
    return (
        words.words(64)
        + old.tsc()
        + words.batch([0xE000_0000, 0xE000_0001])
        + old.mark(old.VERIFY_MODE)
        + old.vcpu_info(64, 1, 1)
        + old.param(old.IDENT_PT, 5)
        + old.toolstack(old.physmap(old.mapping(1, 2, 3, b"x\0", width)))
        + old.mark(old.LAST_CHECKPOINT)
        + old.mark(0)
        + old.hvm_tail()
        + qemu
    )


@WIDTHS
@pytest.mark.parametrize(
    "signature", [b"DeviceModelRecord0002", b"RemusDeviceModelState", b"QemuDeviceModelRecord"]
)
def test_an_hvm_stream_cut_anywhere_is_an_error_where_it_ends(width: int, signature: bytes) -> None:
    qemu = old.qemu(b"QEVM", signature)
    whole = small_hvm(width, qemu)
    assert attempt(whole).states == 1
    # Without QEMU's record an image is whole too; and nobody knows how long the record is that has no length.
    fine = {len(whole) - len(qemu)}
    if signature == b"QemuDeviceModelRecord":
        fine |= {len(whole) - left for left in range(1, 4)}
    for cut in range(len(whole)):
        if cut in fine:
            assert attempt(whole[:cut]).states == 1
            continue
        with pytest.raises(TruncatedError) as caught:
            attempt(whole[:cut])
        assert (caught.value.offset, caught.value.layer) == (cut, "legacy"), cut


@WIDTHS
def test_a_pv_stream_cut_anywhere_is_an_error_where_it_ends(width: int) -> None:
    guest = PvGuest(width, 4, xsave=24, unmapped=(8, 9))
    batch = Words(width).batch([0xE000_0000, 0xE000_0001])
    whole = guest.start() + old.tsc() + batch + old.mark(old.LAST_CHECKPOINT) + old.mark(0) + guest.tail()
    assert attempt(whole).states == 1
    # Every octet of structure, and every 50th of the contexts and pages.
    starts = [len(guest.start()) + at for at in range(-40, 100)]
    ends = range(len(whole) - 4096 - 30, len(whole) - 4096 + 10)
    vcpu = range(len(whole) - 4096 - 300, len(whole) - 4096 - 30)
    for cut in {*range(80), *range(80, len(whole), 50), *starts, *vcpu, *ends, len(whole) - 1}:
        with pytest.raises(TruncatedError) as caught:
            attempt(whole[:cut])
        assert (caught.value.offset, caught.value.layer) == (cut, "legacy"), cut


BODY = 8 + 4 + 16 + 8192  # where the chunks of `old.hvm` start
W = Words(8)


@pytest.mark.parametrize(
    ("chunk", "at", "message"),
    [
        (old.mark(1025), 0, "a batch of 1025 PFNs; at most 1024"),
        (old.mark(0x7FFF_FFFF), 0, "at most 1024"),
        (old.mark(-21), 0, "an id from -1 to -20; found -21"),
        (W.batch([0, 0x10_0000]), 4 + 8, "entry 1 is 0x100000: its PFN is not below p2m_size 0x100000"),
        (W.batch([0x5000_0000]), 4, "page types 5 to 8 are reserved"),
        (W.batch([0x8000_0000]), 4, "page types 5 to 8 are reserved"),
        (W.batch([0x1_0000_0000]), 4, "only the lower 32 bits are used"),
        (old.vcpu_info(-1), 4, "the highest vCPU id is -1, expected 0 to 4095"),
        (old.vcpu_info(4096), 4, "the highest vCPU id is 4096"),
        (struct.pack("<iI", old.TOOLSTACK, 0xFFFF_FFFF), 4, "4294967295 octets of toolstack data"),
        (old.toolstack(bytes(7)), 8, "toolstack data of 7 octets, expected at least 8"),
        (old.toolstack(struct.pack("<II", 2, 0)), 8, "version 2 of libxl's toolstack data"),
        (old.toolstack(struct.pack("<II", 1, 0xFFFF_FFFF)), 16, "mapping 0 of 4294967295 needs 28"),
        (old.toolstack(old.physmap(old.mapping(1, 2, 3, b"x\0", 4))), 44, "needs 6 octets, 2 are left"),
        (old.toolstack(old.physmap(old.mapping(1, 2, 3, b"xy", 8))), 44, "NUL at its end: b'xy'"),
        (old.toolstack(old.physmap(old.mapping(1, 2, 3, b"x\0y\0", 8))), 44, "NUL at its end"),
    ],
)
def test_a_chunk_that_lies_is_refused_with_its_place(chunk: bytes, at: int, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        attempt(old.hvm(8, chunk))
    assert (caught.value.offset, caught.value.layer) == (BODY + at, "legacy")
    assert caught.value.record is not None


@pytest.mark.parametrize(
    ("tail", "at", "message"),
    [
        (old.hvm_tail()[:24] + b"\xff\xff\xff\xff", 24, "the HVM context has 4294967295 octets"),
        (old.hvm_tail()[:24] + bytes(4), 24, "the HVM context is empty"),
        (
            old.hvm_tail(b"x") + b"DeviceModelRecord0002\xff\xff\xff\xff",
            29 + 21,
            "QEMU's state has 4294967295",
        ),
        (old.hvm_tail(b"x") + b"DeviceModelRecord0003\0\0\0\0", 29, "expected QEMU's record"),
    ],
)
def test_an_hvm_tail_that_lies_is_refused_with_its_place(tail: bytes, at: int, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        attempt(old.hvm(8, tail=tail))
    assert (caught.value.offset, caught.value.layer) == (BODY + 4 + at, "legacy")


def info(*blocks: tuple[bytes, bytes], total: int | None = None) -> PvGuest:
    """Return a guest with these blocks of extended info."""
    octets = b"".join(name + struct.pack("<I", len(data)) + data for name, data in blocks)
    length = len(octets) if total is None else total
    return PvGuest(8, 8, info=b"\xff" * 8 + struct.pack("<I", length) + octets)


CONTEXT = (b"vcpu", bytes(5168))
P2M = 20 + 8 + 5168 + 8  # where the p2m frames of a guest with vcpu and extv blocks are


@pytest.mark.parametrize(
    ("start", "at", "message"),
    [
        (info((b"vcpu", bytes(100))).start(), 24, "block 'vcpu' has 100 octets, expected 2800"),
        (info(CONTEXT, total=5000).start(), 24, "has 5168 octets; the extended info has 4992 left"),
        (info(CONTEXT, (b"xcnt", bytes(3))).start(), 20 + 8 + 5168 + 4, "block 'xcnt' has 3 octets"),
        (info(CONTEXT, (b"xcnt", b"\xff" * 4)).start(), 20 + 8 + 5168 + 8, "takes 4294967295 octets"),
        (info(CONTEXT, (b"xcnt", struct.pack("<I", 16))).start(), 20 + 8 + 5168 + 8, "takes 16 octets"),
        (PvGuest().start()[:P2M] + W.words(4, 1024), P2M + 8, "p2m frame 1 is PFN 0x400, not below"),
    ],
)
def test_a_pv_start_that_lies_is_refused_with_its_place(start: bytes, at: int, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        attempt(start + bytes(64))
    assert (caught.value.offset, caught.value.layer) == (at, "legacy")


@pytest.mark.parametrize(
    ("tail", "at", "message"),
    [
        (struct.pack("<I", 1025), 0, "1025 PFNs are unmapped, of a guest of 1024"),
        (struct.pack("<IQQ", 2, 9, 1024), 4 + 8, "unmapped PFN 0x400 is not below"),
        (bytes(4 + 5168 + 128 + 8) + struct.pack("<Q", 577), 4 + 5168 + 128 + 8, "has 577 octets; .* 576"),
    ],
)
def test_a_pv_tail_that_lies_is_refused_with_its_place(tail: bytes, at: int, message: str) -> None:
    guest = PvGuest(8, 8, xsave=576)
    head = guest.start() + guest.memory() + old.mark(0)
    with pytest.raises(FormatError, match=message) as caught:
        attempt(head + tail + bytes(64))
    assert (caught.value.offset, caught.value.layer) == (len(head) + at, "legacy")


def test_an_hvm_parameter_in_a_pv_stream_is_refused() -> None:
    with pytest.raises(FormatError, match="an HVM parameter in the stream of a PV guest"):
        attempt(PvGuest().stream(old.param(old.IDENT_PT, 1)))


@pytest.mark.parametrize("start", [b"LinuxGuestRecord", b"\xff" * 16, bytes(16), b"QEVM" + bytes(12)])
def test_what_is_no_legacy_stream_is_shown(start: bytes) -> None:
    with pytest.raises(FormatError, match="expected a legacy stream") as caught:
        attempt(start)
    assert start[:12].hex(" ") in str(caught.value)
    assert caught.value.offset == 0


@pytest.mark.parametrize("p2m_size", [0, 1, (1 << 28) + 1, (1 << 32) - 1])
def test_a_guest_of_no_possible_size_is_refused_whatever_the_caller_says(p2m_size: int) -> None:
    with pytest.raises(FormatError, match="p2m_size is") as caught:
        attempt(W.words(p2m_size) + bytes(16), GuestType.HVM)
    assert caught.value.field == "p2m_size"


@given(
    kind=st.sampled_from(["hvm", "pv"]),
    width=st.sampled_from([4, 8]),
    changes=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 200),
)
@settings(max_examples=300, deadline=None)
def test_damage_gives_a_stream_or_one_error_with_its_place(
    kind: str, width: int, changes: list[tuple[int, int]], cut: int
) -> None:
    guest = PvGuest(width, 4, extended=False)
    hvm = old.hvm(width, W.batch([2], page(3)), old.tsc())
    octets = bytearray(small_hvm(width, old.qemu()) if kind == "hvm" else guest.stream())
    octets = bytearray(hvm) if kind == "hvm" and cut % 2 else octets
    for at, value in changes:
        octets[at % len(octets)] = value
    octets = octets[: len(octets) - (cut if cut < 20 else 0)]
    try:
        attempt(bytes(octets))
    except StreamError as exc:
        place = exc.offset, exc.layer
        assert place[0] is not None
        assert 0 <= place[0] <= len(octets)
        assert place[1] == "legacy"
