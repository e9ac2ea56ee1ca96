"""Where a QEMU machine's memory lies: QEMU's own texts, and what holds for every split."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migstream.errors import GuestError
from migstream.guests.qemu.ram_map import Block, RamMap, parse_blocks, parse_flat_view, parse_ram_map

GIB = 1 << 30

#: ``info mtree -f`` of QEMU 7.2, -machine q35 -m 5G -accel kvm, shortened.
FIVE_GIB = """\
FlatView #0
 AS "mch", root: bus master container
 Root memory region: (none)
  No rendered FlatView

FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): ram KVM
  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom KVM
  00000000000e0000-00000000000fffff (prio 0, rom): pc.bios @0000000000020000 KVM
  0000000000100000-000000007fffffff (prio 0, ram): ram @0000000000100000 KVM
  00000000fd000000-00000000fdffffff (prio 1, ram): vga.vram KVM
  00000000febf0400-00000000febf041f (prio 0, i/o): vga ioports remapped
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios KVM
  0000000100000000-00000001bfffffff (prio 0, ram): ram @0000000080000000 KVM

FlatView #2
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan
"""


def test_the_split_is_read_from_qemus_flat_view() -> None:
    assert parse_ram_map(parse_flat_view(FIVE_GIB), "ram", 5 * GIB) == RamMap(5 * GIB, 2 * GIB, 4 * GIB)


def test_a_region_with_spaces_in_its_name_and_one_under_kvm_are_read() -> None:
    regions = [(area.region, area.offset) for area in parse_flat_view(FIVE_GIB)]
    assert ("vga ioports remapped", 0) in regions
    assert ("pc.bios", 0x20000) in regions


def test_a_machine_without_memory_above_4_gib_has_one_piece() -> None:
    below = FIVE_GIB.replace(
        "  0000000100000000-00000001bfffffff (prio 0, ram): ram @0000000080000000 KVM\n", ""
    )
    assert parse_ram_map(parse_flat_view(below), "ram", 2 * GIB) == RamMap(2 * GIB, 2 * GIB, 0)


def test_memory_in_a_third_place_is_refused() -> None:
    third = "  0000010000000000-000001003fffffff (prio 0, ram): ram @0000000140000000\n\nFlatView #2"
    areas = parse_flat_view(FIVE_GIB.replace("\nFlatView #2", third))
    with pytest.raises(GuestError, match="expected one part at 0 and one above 4 GiB"):
        parse_ram_map(areas, "ram", 6 * GIB)


def test_memory_of_another_name_is_nowhere() -> None:
    with pytest.raises(GuestError, match="lies at nowhere"):
        parse_ram_map(parse_flat_view(FIVE_GIB), "pc.ram", 5 * GIB)


def test_a_text_without_the_systems_memory_is_refused() -> None:
    with pytest.raises(GuestError, match="this QEMU is not supported"):
        parse_flat_view("unknown command: 'info mtree'")


def test_blocks_are_read_with_the_octets_in_use_also_where_newer_qemus_say_more() -> None:
    text = (
        "              Block Name    PSize              Offset               Used              Total"
        "                HVA  RO\n"
        "                     ram    4 KiB  0x0000000000000000 0x0000000140000000 0x0000000140000000\n"
        "    /rom@etc/acpi/tables    4 KiB  0x0000000141100000 0x0000000000020000 0x0000000000200000"
        " 0x00007f5d2b200000  ro\n"
        "   0000:00:02.0/vga.vram    2 MiB  0x0000000140080000 0x0000000001000000 0x0000000001000000\n"
    )
    assert parse_blocks(text) == [
        Block("ram", 5 * GIB),
        Block("/rom@etc/acpi/tables", 0x20000),
        Block("0000:00:02.0/vga.vram", 16 << 20),
    ]


@pytest.mark.parametrize(
    ("size", "below", "above"),
    [
        (0, 0, 0),
        (GIB, 0, GIB),
        (GIB, 2 * GIB, 0),
        (GIB, GIB, 4 * GIB),
        (2 * GIB, GIB, 0),
        (2 * GIB, GIB, GIB - 4096),
        (GIB + 1, GIB + 1, 0),
    ],
)
def test_no_machine_has_parts_of_pages_or_parts_that_overlap(size: int, below: int, above: int) -> None:
    with pytest.raises(GuestError, match="no machine has"):
        RamMap(size, below, above)


@st.composite
def maps(draw: st.DrawFn) -> RamMap:
    below, rest, gap = (draw(st.integers(low, 300)) for low in (1, 0, 0))
    above = below + gap if rest else 0
    return RamMap(below + rest << 12, below << 12, above << 12)


@given(maps())
def test_every_page_of_the_file_is_one_pfn_and_no_other_pfn_is_ram(ram: RamMap) -> None:
    pfns = np.arange(ram.max_pfn + 50, dtype=np.uint64)
    held = ram.holds(pfns)
    assert ram.file_pages(pfns[held]).tolist() == list(range(ram.size >> 12))
    assert held[ram.max_pfn]
    assert not held[ram.max_pfn + 1 :].any()
    for pfn in pfns[~held][:3]:
        with pytest.raises(GuestError, match="is no RAM of the QEMU machine"):
            ram.file_pages(np.array([pfn], np.uint64))


@given(maps(), st.integers(0, 700), st.integers(1, 50))
def test_a_run_is_in_the_file_where_its_pages_are(ram: RamMap, first: int, count: int) -> None:
    pfns = np.arange(first, first + count, dtype=np.uint64)
    start = ram.file_page_of_run(first, count)
    if start is None:
        assert not ram.holds(pfns).all() or ram.above_base == ram.below
    else:
        assert ram.file_pages(pfns).tolist() == list(range(start, start + count))
