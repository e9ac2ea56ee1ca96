"""extract: what is written, left out and said, what is refused; real captures against Xen's own dumps."""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zstandard
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

import migstream
from migstream.cli.extract import command
from migstream.extract import ImageFormat, PageTables, Selection, extract_memory
from migstream.guests.xen_core import CoreFile
from migstream.io.seekable import seekable
from migstream.page_index import PageIndex
from migstream.records.libxc import GuestType
from tests import build
from tests.streams import CHECKPOINT, END, STATIC_DATA_END, TAIL, TSC, PvGuest, page, page_data, pages, stream

PAGE = 4096
XTAB, XALLOC, BROKEN = 0xF, 0xE, 0xD
CAPTURES = build.SHARED / "streams"
needs_captures = pytest.mark.skipif(
    not CAPTURES.is_dir(), reason="the captures of real Xen are not beside the checkout"
)

SMALL = stream(
    STATIC_DATA_END,
    pages(1, [1, 2, 3]),
    page_data([(2, 0), (9, XALLOC), (10, XTAB), (11, BROKEN), (12, XTAB)], page(9)),
    *TAIL,
    END,
)


def run(*argv: str | Path, input: bytes | None = None) -> Result:
    return CliRunner().invoke(command, [str(arg) for arg in argv], input=input)


def given_file(path: Path, octets: bytes) -> Path:
    path.write_bytes(octets)
    return path


def test_a_raw_image_has_each_page_at_its_place_and_holes_between(tmp_path: Path) -> None:
    source = given_file(tmp_path / "in", SMALL)
    result = run(source, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out").read_bytes() == bytes(PAGE) + page(1) + page(9) + page(3)
    assert "3 pages (12.0 KiB); left out: 1 BROKEN, 1 XALLOC, 2 XTAB" in result.stderr


def test_counts_are_told_as_json(tmp_path: Path) -> None:
    result = run(given_file(tmp_path / "in", SMALL), tmp_path / "out", "--json")
    assert json.loads(result.stdout) == {
        "memory": {
            "pages": 3,
            "left_out": {"BROKEN": 1, "XALLOC": 1, "XTAB": 2},
            "page_tables": 0,
            "vcpus": 0,
        },
        "checkpoints": 0,
        "void_octets": 0,
        "error": None,
    }


def test_pages_far_apart_leave_a_sparse_file(tmp_path: Path) -> None:
    source = given_file(tmp_path / "in", stream(STATIC_DATA_END, pages(0xFFFFF, [5]), END))
    assert run(source, tmp_path / "out").exit_code == 0
    status = (tmp_path / "out").stat()
    assert status.st_size == 4 << 30
    assert status.st_blocks * 512 < 1 << 20


def test_a_range_of_pfns_starts_at_its_first(tmp_path: Path) -> None:
    source = given_file(tmp_path / "in", SMALL)
    assert run(source, tmp_path / "out", "--pfn", "0x2..3").exit_code == 0
    assert (tmp_path / "out").read_bytes() == page(9) + page(3)
    result = run(source, tmp_path / "none", "--pfn", "9..20")
    assert result.exit_code == 1
    assert "no page with content" in result.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("text", ["5", "3..2", "..", "a..b", "-1..2"])
def test_a_malformed_range_is_wrong_usage(text: str, tmp_path: Path) -> None:
    result = run(given_file(tmp_path / "in", SMALL), tmp_path / "out", f"--pfn={text}")
    assert result.exit_code == 2
    assert "expected A..B" in result.stderr


def test_page_tables_stay_as_they_are_or_are_left_out(tmp_path: Path) -> None:
    guest = PvGuest(tables={5: [6], 6: [7]})
    octets = stream(
        *(guest.info(), STATIC_DATA_END, guest.p2m_frames(), guest.memory(), TSC, guest.basic(), END),
        guest=GuestType.PV,
    )
    source = given_file(tmp_path / "in", octets)
    result = run(source, tmp_path / "out")
    assert "4 of them are page tables of a PV guest, with PFNs in their entries" in result.stderr
    assert (tmp_path / "out").read_bytes()[5 * PAGE : 5 * PAGE + 8] == struct.pack("<Q", 6 << 12 | 7)
    result = run(source, tmp_path / "out", "--page-tables", "omit")
    assert "left out: 1 L1TAB, 1 L2TAB, 1 L3TAB, 1 L4TAB_PIN" in result.stderr
    assert (tmp_path / "out").read_bytes()[5 * PAGE : 9 * PAGE] == bytes(4 * PAGE)


def test_device_model_and_config_are_written_as_they_lie_in_the_stream(tmp_path: Path) -> None:
    config = b'{"c_info": {}}\0'
    head = b"Xen saved domain, xl format\n \0 \r" + struct.pack("<IIII", 0x01020304, 3, 0, 4 + len(config))
    emulator = build.record(build.EMULATOR_CONTEXT, struct.pack("<II", 2, 0) + b"QEVM state")
    image = stream(STATIC_DATA_END, pages(0, [1]), END)
    octets = head + struct.pack("<I", len(config)) + config
    octets += build.libxl(build.record(build.LIBXC_CONTEXT), image, emulator, build.record(0))
    source = given_file(tmp_path / "in", octets)
    result = run(source, "--device-model", tmp_path / "qemu", "--config", tmp_path / "json")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "qemu").read_bytes() == b"QEVM state"
    assert (tmp_path / "json").read_bytes() == b'{"c_info": {}}'
    xapi = given_file(
        tmp_path / "xapi", build.xapi(build.segment(0xF0) + image, build.segment(0xF00, b"QEMU"))
    )
    result = run(xapi, "--device-model", tmp_path / "qemu", "--config", tmp_path / "xenops")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "qemu").read_bytes() == b"QEMU"
    assert (tmp_path / "xenops").read_bytes() == build.XENOPS
    bare = given_file(tmp_path / "bare", image)
    for option, reason in (("--device-model", "EMULATOR_CONTEXT"), ("--config", "no config")):
        result = run(bare, option, tmp_path / "absent")
        assert result.exit_code == 1
        assert reason in result.stderr
        assert not (tmp_path / "absent").exists()


def test_a_pipe_and_compressed_input_are_copied_first_and_that_is_said(tmp_path: Path) -> None:
    packed = zstandard.ZstdCompressor().compress(SMALL)
    result = run(given_file(tmp_path / "in.zst", packed), tmp_path / "out")
    assert result.exit_code == 0
    assert "a copy of it was made" in result.stderr
    assert (tmp_path / "out").read_bytes() == bytes(PAGE) + page(1) + page(9) + page(3)


def test_the_state_at_a_checkpoint_can_be_asked_for(tmp_path: Path) -> None:
    octets = stream(STATIC_DATA_END, pages(0, [1]), *TAIL, CHECKPOINT, pages(0, [2]), *TAIL, CHECKPOINT)
    source = given_file(tmp_path / "in", octets + stream(pages(0, [3]))[40:])
    result = run(source, tmp_path / "last")
    assert result.exit_code == 0
    assert "the state at checkpoint 2; 4120 octets behind it do not count" in result.stderr
    assert (tmp_path / "last").read_bytes() == page(2)
    assert run(source, tmp_path / "first", "--checkpoint", "1").exit_code == 0
    assert (tmp_path / "first").read_bytes() == page(1)
    assert "the stream has 2" in run(source, tmp_path / "third", "--checkpoint", "3").stderr


# Bad input


def test_a_damaged_stream_leaves_nothing_unless_a_part_will_do(tmp_path: Path) -> None:
    source = given_file(tmp_path / "in", stream(STATIC_DATA_END, pages(0, [1, 2]), pages(5, [3]))[:-10])
    old = given_file(tmp_path / "out", b"old")
    result = run(source, old)
    assert result.exit_code == 1
    assert f"offset {len(source.read_bytes())}" in result.stderr
    assert old.read_bytes() == b"old"
    result = run(source, old, "--partial")
    assert result.exit_code == 1
    assert old.read_bytes() == page(1) + page(2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_input_and_output_may_not_be_one_file(tmp_path: Path) -> None:
    source = given_file(tmp_path / "in", SMALL)
    os.link(source, tmp_path / "same")
    for argv in ((source, source), (source, tmp_path / "same"), (source, "--config", source)):
        result = run(*argv)
        assert result.exit_code == 1
        assert "the same file" in result.stderr
        assert source.read_bytes() == SMALL


def test_a_hostile_pfn_is_refused_and_max_memory_allows_more(tmp_path: Path) -> None:
    source = given_file(tmp_path / "in", stream(STATIC_DATA_END, pages((64 << 18) + 1, [1]), END))
    result = run(source, tmp_path / "out")
    assert result.exit_code == 1
    assert "--max-memory allows more" in result.stderr
    assert not (tmp_path / "out").exists()
    assert run(source, tmp_path / "out", "--format", "lime", "--max-memory", "65G").exit_code == 0
    assert run(source, tmp_path / "out", "--max-memory", "lots").exit_code == 2


@pytest.mark.skipif(sys.platform != "linux" or not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    result = run(given_file(tmp_path / "in", SMALL), "/dev/full", "--format", "lime")
    assert result.exit_code == 1
    assert "/dev/full: No space left on device" in result.stderr


def test_a_raw_image_needs_a_file_and_says_so(tmp_path: Path) -> None:
    result = run(given_file(tmp_path / "in", SMALL), "/dev/null")
    assert result.exit_code == 1
    assert "needs a regular file" in result.stderr


def test_nothing_to_write_is_wrong_usage(tmp_path: Path) -> None:
    assert run(given_file(tmp_path / "in", SMALL)).exit_code == 2


# Against an oracle


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(
            st.tuples(st.integers(0, 50), st.sampled_from([0, 0, 0, XTAB, XALLOC])), min_size=1, max_size=12
        ),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 20),
    st.integers(1, 40),
)
def test_a_raw_image_is_what_a_dictionary_of_pages_says(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[tuple[int, int]]], first: int, length: int
) -> None:
    expected: dict[int, bytes] = {}
    records = []
    fill = 0
    for batch in batches:
        content = b""
        for pfn, type in batch:
            expected.pop(pfn, None)
            if type == 0:
                fill += 1
                expected[pfn] = page(fill)
                content += page(fill)
        records.append(page_data(batch, content))
    chosen = {pfn: octets for pfn, octets in expected.items() if first <= pfn < first + length}
    folder = tmp_path_factory.mktemp("raw")
    source = given_file(folder / "in", stream(STATIC_DATA_END, *records, TSC, END))
    result = run(source, folder / "out", "--pfn", f"{first}..{first + length - 1}")
    if not chosen:
        assert result.exit_code == 1
        return
    image = bytearray((max(chosen) + 1 - first) * PAGE)
    for pfn, octets in chosen.items():
        image[(pfn - first) * PAGE : (pfn - first + 1) * PAGE] = octets
    assert (folder / "out").read_bytes() == image


def test_long_runs_and_short_ones_mix(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    memory = rng.integers(0, 256, (600, PAGE), np.uint8)
    late = rng.permutation(600)[:100]
    fresh = rng.integers(0, 256, (100, PAGE), np.uint8)
    records = [
        page_data([(i, 0) for i in range(600)], memory.tobytes()),
        page_data([(int(p), 0) for p in late], fresh.tobytes()),
    ]
    memory[late] = fresh
    source = given_file(tmp_path / "in", stream(STATIC_DATA_END, *records, TSC, END))
    assert run(source, tmp_path / "out").exit_code == 0
    assert (tmp_path / "out").read_bytes() == memory.tobytes()


# The captures of real Xen


def unpacked(name: str, folder: Path) -> Path:
    path = folder / name
    with (CAPTURES / f"{name}.zst").open("rb") as packed, path.open("wb") as out:
        zstandard.ZstdDecompressor().copy_stream(packed, out)
    return path


def core_pages(path: Path) -> tuple[CoreFile, npt.NDArray[np.uint8]]:
    with path.open("rb") as file:
        core = CoreFile.open(file.fileno())
    octets = np.memmap(path, np.uint8, "r", offset=core.pages_offset, shape=(len(core.pfns) * PAGE,))
    return core, octets.reshape(-1, PAGE)


def table_with_pfns(table: npt.NDArray[np.uint8], to_pfn: dict[int, int], level: int) -> npt.NDArray[Any]:
    """Return a page table of a PV guest with PFNs in place of machine frames, as a save has it."""
    entries = table.view(np.uint64).copy()
    if level == 4:
        entries[256:272] = 0  # Xen's own, which a stream does not have
    frames = (entries >> np.uint64(12)) & np.uint64((1 << 40) - 1)
    for i in np.flatnonzero(entries & np.uint64(1)):
        entry = int(entries[i])
        pfn = to_pfn.get(int(frames[i]))
        # A frame that is not the guest's is Xen's, such as shared info: a stream has no entry for it.
        entries[i] = 0 if pfn is None else entry & ~(((1 << 40) - 1) << 12) | pfn << 12
    return entries.view(np.uint8)


@needs_captures
@pytest.mark.parametrize("name", ["tinypv-save-p", "linux-pv-save-p"])
def test_the_memory_of_a_capture_equals_xens_own_dump_of_it(name: str, tmp_path: Path) -> None:
    source, dump = unpacked(f"{name}.xl", tmp_path), unpacked(f"{name}.core", tmp_path)
    core, dumped = core_pages(dump)
    assert core.frames is not None
    assert (np.diff(core.pfns) > 0).all()
    with migstream.open(source) as opened, seekable(opened) as found, (tmp_path / "raw").open("wb") as out:
        index = PageIndex.of(found.stream)
        extract_memory(found, index, out.fileno(), ImageFormat.RAW)
    memory = np.memmap(tmp_path / "raw", np.uint8, "r").reshape(-1, PAGE)
    types = index.lookup(core.pfns).types
    levels = np.where((types & 7 <= 4) & (types < 0xD), types & 7, 0)
    plain = levels == 0
    assert (memory[core.pfns[plain]] == dumped[plain]).all()
    to_pfn = dict(zip(core.frames.tolist(), core.pfns.tolist(), strict=True))
    assert np.count_nonzero(~plain) >= 5
    for i in np.flatnonzero(~plain):
        expected = table_with_pfns(np.array(dumped[i]), to_pfn, int(levels[i]))
        assert (memory[core.pfns[i]] == expected).all(), hex(int(core.pfns[i]))
    assert sum(index.count_by_type().values()) == len(core.pfns)


@needs_captures
def test_a_core_written_from_a_capture_has_the_shape_of_xens_own(tmp_path: Path) -> None:
    source, dump = unpacked("tinypv-save-p.xl", tmp_path), unpacked("tinypv-save-p.core", tmp_path)
    assert run(source, tmp_path / "core", "--format", "xen-core").exit_code == 0
    ours, xens = (tmp_path / "core").read_bytes(), dump.read_bytes()
    assert len(ours) == len(xens)
    assert ours[: 0x240 + 12] == xens[: 0x240 + 12]  # the header, the sections, the first notes
    version = 0x240 + 16
    assert ours[version : version + 16] == xens[version : version + 16]  # Xen 4.17
    assert ours[version + 1280 :][:24] == xens[version + 1280 :][:24]  # the version of the format
    assert ours[-0x48:] == xens[-0x48:]  # the names of the sections


@needs_captures
@pytest.mark.parametrize("format", ["raw", "elf", "xen-core", "lime"])
@pytest.mark.parametrize(
    ("name", "n_pages", "vcpus"),
    [("hvm32-rich-save-c", 8204, 1), ("tinypvb8-xsave-save-c2", 2032, 1), ("tinypv-remus", 1024, 1)],
)
def test_every_capture_comes_out_in_every_format(
    name: str, n_pages: int, vcpus: int, format: str, tmp_path: Path
) -> None:
    result = run(CAPTURES / f"{name}.xl.zst", tmp_path / "out", "--format", format, "--json")
    assert result.exit_code == 0, result.output
    memory = json.loads(result.stdout)["memory"]
    assert memory["pages"] == n_pages
    assert memory["vcpus"] == (vcpus if format in ("elf", "xen-core") else 0)
    assert (tmp_path / "out").stat().st_size >= n_pages * PAGE


@needs_captures
def test_the_device_model_of_a_capture_is_qemus(tmp_path: Path) -> None:
    assert run(CAPTURES / "hvm16-save.xl.zst", "--device-model", tmp_path / "qemu").exit_code == 0
    assert (tmp_path / "qemu").read_bytes()[:4] == b"QEVM"


def test_a_selection_without_page_tables_names_their_types() -> None:
    assert Selection(page_tables=PageTables.OMIT).omit == {1, 2, 3, 4, 9, 10, 11, 12}
