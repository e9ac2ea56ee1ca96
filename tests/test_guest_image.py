"""Raw memory images, and guests by name."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migstream.bitmap import PfnBitmap
from migstream.errors import GuestError
from migstream.guests import registry
from migstream.guests.compare import differing_pfns
from migstream.guests.image import Holes, ImageSource, ImageTarget
from migstream.guests.kind import GuestSpecError, parse_size
from migstream.guests.model import ModelGuest
from migstream.guests.protocols import PAGE_SIZE, RestoreTarget, SaveSource
from migstream.records import libxc
from migstream.records.libxc import GuestType
from migstream.records.page_types import PageType
from tests.guests import carry, pfns, run

BOTH = pytest.mark.parametrize("guest_type", list(GuestType))
PAGES = 300


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """Eight pages: data, zeros that are stored, then a hole of four pages, then two of data."""
    path = tmp_path / "sparse.img"
    with path.open("wb") as image:
        image.write(b"a" * PAGE_SIZE + bytes(PAGE_SIZE))
        image.seek(6 * PAGE_SIZE)
        image.write(b"b" * 2 * PAGE_SIZE)
    return path


# As a source


def test_an_image_is_ordinary_pages_and_a_guest_at_rest(sparse: Path) -> None:
    source: SaveSource = ImageSource(sparse)
    assert (source.guest_type, source.max_pfn, source.suspended) == (GuestType.HVM, 7, True)
    assert source.page_types(run(0, 8)).tolist() == [PageType.NOTAB] * 8
    (buffer,), waits = source.pages(run(0, 8), np.zeros(8, np.uint8))
    assert bytes(buffer) == sparse.read_bytes()
    assert not waits.any()
    assert [record.type for record in source.state_records()] == ["X86_TSC_INFO"]
    assert source.static_records() == source.layout_records() == []
    source.suspend()
    source.resume()
    assert source.suspended


@pytest.mark.parametrize(("holes", "left_out"), [(Holes.FILE, [2, 3, 4, 5]), (Holes.ZERO, [1, 2, 3, 4, 5])])
def test_holes_are_left_out_on_request(sparse: Path, holes: Holes, left_out: list[int]) -> None:
    source = ImageSource(sparse, holes=holes)
    types = source.page_types(run(0, 8))
    assert np.flatnonzero(types == PageType.XTAB).tolist() == left_out
    assert source.page_types(pfns(7, 3, 0)).tolist() == [PageType.NOTAB, PageType.XTAB, PageType.NOTAB]


def test_a_file_that_is_one_hole_has_no_pages(tmp_path: Path) -> None:
    path = tmp_path / "hole.img"
    path.touch()
    os.truncate(path, 5 * PAGE_SIZE)
    assert ImageSource(path, holes=Holes.FILE).page_types(run(0, 5)).tolist() == [PageType.XTAB] * 5


def test_a_page_half_in_a_hole_has_data(tmp_path: Path) -> None:
    path = tmp_path / "odd.img"
    path.touch()
    os.truncate(path, 64 * PAGE_SIZE)
    with path.open("r+b") as image:
        image.seek(20 * PAGE_SIZE + 100)
        image.write(b"x")
    types = ImageSource(path, holes=Holes.ZERO).page_types(run(0, 64))
    assert np.flatnonzero(types != PageType.XTAB).tolist() == [20]


def test_a_pv_image_says_its_shape(sparse: Path) -> None:
    source = ImageSource(sparse, GuestType.PV)
    assert source.static_records() == [libxc.X86PvInfo(guest_width=8, pt_levels=4)]
    (p2m,) = source.layout_records()
    assert isinstance(p2m, libxc.X86PvP2mFrames)
    assert (p2m.p2m_start_pfn, p2m.p2m_end_pfn, list(p2m.p2m_pfns)) == (0, 7, [0])


@pytest.mark.parametrize("size", [0, 1, PAGE_SIZE - 1, PAGE_SIZE + 1])
def test_a_file_that_is_not_whole_pages_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "odd.img"
    path.write_bytes(bytes(size))
    with pytest.raises(GuestError, match=f"{size} octets; .* whole pages of 4096"):
        ImageSource(path)


def test_an_image_has_no_dirty_log_and_says_what_to_do(sparse: Path) -> None:
    source = ImageSource(sparse)
    for ask in (source.enable_dirty_log, lambda: source.clean_dirty_log(PfnBitmap(8))):
        with pytest.raises(GuestError, match="without --live"):
            ask()
    with pytest.raises(GuestError, match="without --live"):
        source.peek_dirty_log(PfnBitmap(8))
    source.disable_dirty_log()


def test_an_image_is_not_written_to(sparse: Path) -> None:
    (buffer,), _ = ImageSource(sparse).pages(pfns(0), np.zeros(1, np.uint8))
    assert buffer.readonly


# As a target


def model(guest_type: GuestType = GuestType.HVM) -> ModelGuest:
    guest = ModelGuest.booted(PAGES, guest_type)
    guest.suspend()
    return guest


@BOTH
def test_a_guests_memory_lies_in_the_image_at_its_pfns(tmp_path: Path, guest_type: GuestType) -> None:
    source = model(guest_type)
    path = tmp_path / "memory.img"
    with ImageTarget(path, guest_type, max_pages=1 << 20) as image:
        target: RestoreTarget = image
        carry(source, target)
        rings = target.complete()
        assert rings == source.complete()
        assert np.array_equal(target.page_types(run(0, PAGES)), source.page_types(run(0, PAGES)))
        assert [type(r) for r in image.records] == [
            type(r) for r in [*source.static_records(), *source.layout_records(), *source.state_records()]
        ]
    assert os.listdir(tmp_path) == ["memory.img"]
    found = np.fromfile(path, np.uint64).reshape(-1, 512)
    everything = run(0, PAGES)
    types = source.page_types(everything)
    for pfn, number in zip(everything.tolist(), types.tolist(), strict=True):
        kind = PageType(number)
        if not kind.has_data:
            assert pfn >= len(found) or not found[pfn].any()
        elif kind.page_table_level and guest_type is GuestType.PV:
            (table,), _ = source.pages(pfns(pfn), types[pfn : pfn + 1])
            assert bytes(table) == found[pfn].tobytes(), "page tables name PFNs"
        else:
            assert np.array_equal(found[pfn], source.memory.words[pfn])


def test_an_image_restored_is_an_image_to_save(tmp_path: Path) -> None:
    source = ModelGuest.booted(PAGES, holes=False)
    source.suspend()
    with ImageTarget(tmp_path / "memory.img", max_pages=PAGES) as image:
        carry(source, image)
        image.complete()
    back = ModelGuest.empty(PAGES, GuestType.HVM)
    carry(ImageSource(tmp_path / "memory.img"), back)
    assert differing_pfns(source, back).tolist() == []


def test_the_file_ends_after_the_last_page_and_holes_take_no_room(tmp_path: Path) -> None:
    path = tmp_path / "memory.img"
    with ImageTarget(path, max_pages=1 << 24) as image:
        image.populate(pfns(0, 9999))
        image.pages(pfns(9999))[0][:4] = b"last"
        image.complete()
    found = path.stat()
    assert found.st_size == 10_000 * PAGE_SIZE
    assert found.st_blocks * 512 < 1 << 20
    assert path.read_bytes()[9999 * PAGE_SIZE :][:4] == b"last"


def test_what_is_not_completed_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "memory.img"
    path.write_bytes(b"old")
    with ImageTarget(path, max_pages=PAGES) as image:
        carry(model(), image)
        assert len(os.listdir(tmp_path)) == 2, "written beside its name"
        assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["memory.img"]
    assert path.read_bytes() == b"old"


def test_a_target_that_is_forgotten_leaves_nothing(tmp_path: Path) -> None:
    ImageTarget(tmp_path / "memory.img", max_pages=PAGES).populate(pfns(3))
    gc.collect()
    assert os.listdir(tmp_path) == []


def test_a_target_that_the_interpreter_ends_with_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from migstream.guests.image import ImageTarget; "
        "kept = ImageTarget(sys.argv[1], max_pages=9); sys.exit(3)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "x.img"], check=False).returncode == 3
    assert os.listdir(tmp_path) == []


def test_a_restore_without_a_page_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "memory.img"
    path.write_bytes(b"old")
    with ImageTarget(path, max_pages=PAGES) as image, pytest.raises(GuestError, match="no page"):
        image.complete()
    assert path.read_bytes() == b"old"


def test_completing_again_after_a_checkpoint_shows_in_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "memory.img"
    with ImageTarget(path, max_pages=100) as image:
        image.populate(pfns(1))
        image.complete()
        image.populate(pfns(5))
        image.pages(pfns(5))[0][:3] = b"new"
        image.complete()
    assert path.read_bytes()[5 * PAGE_SIZE :][:3] == b"new"
    assert path.stat().st_size == 6 * PAGE_SIZE
    assert os.listdir(tmp_path) == ["memory.img"]


def test_a_link_to_an_image_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    link = tmp_path / "current.img"
    link.symlink_to(tmp_path / "images" / "memory.img")
    with ImageTarget(link, max_pages=100) as image:
        image.populate(pfns(0))
        image.complete()
    assert link.is_symlink()
    assert (tmp_path / "images" / "memory.img").stat().st_size == PAGE_SIZE


@pytest.mark.parametrize("ask", [ImageTarget.populate, ImageTarget.pages, ImageTarget.page_types])
def test_a_page_past_the_bound_is_refused(tmp_path: Path, ask: Callable[..., object]) -> None:
    with (
        ImageTarget(tmp_path / "memory.img", max_pages=100) as image,
        pytest.raises(GuestError, match="0x64 is past the guest's last, 0x63"),
    ):
        ask(image, pfns(100))


def test_a_page_without_memory_is_not_handed_out(tmp_path: Path) -> None:
    with ImageTarget(tmp_path / "memory.img", max_pages=100) as image:
        image.populate(pfns(4))
        with pytest.raises(GuestError, match="0x5 has no memory"):
            image.pages(pfns(4, 5))


def test_localising_leaves_a_page_table_as_it_is_and_bounds_it(tmp_path: Path) -> None:
    table = np.zeros(512, np.uint64)
    table[7] = 0x9063
    with ImageTarget(tmp_path / "memory.img", GuestType.PV, max_pages=100) as image:
        image.localise(1, table.data.cast("B"))
        assert table[7] == 0x9063
        assert image.populated(pfns(8, 9)).tolist() == [False, True]
        table[8] = 0x64063
        with pytest.raises(GuestError, match="entry 8 of an L1 page table"):
            image.localise(1, table.data.cast("B"))


def test_a_full_disk_is_an_error_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with ImageTarget(tmp_path / "memory.img", max_pages=100) as image:
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(
            GuestError, match=r"memory.img: no room for a page at offset 12288: No space left"
        ):
            image.populate(pfns(3))
    assert os.listdir(tmp_path) == []


def test_a_size_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="too large"):
        ImageTarget(tmp_path / "memory.img", max_pages=1 << 50)
    assert os.listdir(tmp_path) == []


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(GuestError, match="no regular file"):
            ImageTarget(path, max_pages=100)


def test_an_image_never_writes_to_itself(tmp_path: Path) -> None:
    dirty = PfnBitmap(100)
    dirty.add(pfns(1))
    with ImageTarget(tmp_path / "memory.img", max_pages=100) as image:
        image.clean_dirty_log(dirty)
    assert len(dirty) == 0


# Guests by name


@pytest.mark.parametrize(
    ("text", "octets"),
    [
        ("4096", 4096),
        ("4096K", 4 << 20),
        ("64M", 64 << 20),
        ("2G", 2 << 30),
        ("1t", 1 << 40),
        ("0001k", 1024),
    ],
)
def test_sizes(text: str, octets: int) -> None:
    assert parse_size(text) == octets


@given(st.text(max_size=30))
def test_a_size_is_right_or_refused_with_an_example(text: str) -> None:
    try:
        said = str(parse_size(text))
    except GuestSpecError as exc:
        said = str(exc)
    assert said.isdigit() or said.endswith(("such as 64M", "one is 64M"))


@pytest.mark.parametrize(
    "text", ["", "M", "64Q", "-1M", "1.5G", "0", "0K", "64 M", "64MM", "9" * 40, "\u0664K"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(GuestSpecError):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no guest"),
        ("memory.img", "model:SIZE .* or raw:FILE"),
        ("modle:64M", "no kind of guest 'modle'.*model:64M"),
        ("model:", "needs SIZE behind it, such as model:64M"),
        ("raw:,holes=zero", "needs FILE behind it, such as raw:memory.img"),
        ("model:64M,sed=3", "no option 'sed'; .* seed=3"),
        ("model:64M,seed=3,seed=4", "seed= is given twice"),
        ("model:64M,seed=x", "seed=x does not fit model: expected a whole number, such as seed=3"),
        ("model:64M,seed=-1", "such as seed=3"),
        ("model:64M,holes=maybe", "expected yes or no, such as holes=no"),
        ("model:64M,suspend=never", "one of obey, refuse, ignore, such as suspend=refuse"),
        ("model:64M,guest-type=arm", "expected pv or hvm, such as guest-type=pv"),
        ("model:64M,working-set=big", "working-set=big .* expected a size, such as working-set=16M"),
        ("model:5000", "not whole pages"),
        ("model:64X", "such as 64M"),
        ("model:4K", "at least 64 pages"),
        ("model:1M,vcpus=33", "1 to 32 processors"),
    ],
)
def test_a_string_that_names_no_guest_is_refused_with_an_example(text: str, said: str) -> None:
    with pytest.raises(GuestError, match=said), registry.open_source(text):
        pass


def test_a_model_is_made_as_its_options_say() -> None:
    with registry.open_source("model:1M,guest-type=pv,seed=3,vcpus=3,holes=no") as source:
        expected = ModelGuest.booted(256, GuestType.PV, seed=3, vcpus=3, holes=False)
        assert isinstance(source, ModelGuest)
        assert differing_pfns(source, expected).tolist() == []
        assert source.state() == expected.state()
    with registry.open_target("model:1M,guest-type=pv,seed=3") as target:
        assert (target.guest_type, target.max_pfn) == (GuestType.PV, 255)
        assert isinstance(target, ModelGuest)
        assert target.frames is not None
        assert source.frames is not None
        assert target.frames.mfn(9) != source.frames.mfn(9), "another host"


def test_the_callers_guest_type_holds_where_no_option_says_otherwise() -> None:
    with registry.open_source("model:1M", GuestType.PV) as source:
        assert source.guest_type is GuestType.PV
    with registry.open_target("model:1M,guest-type=hvm", GuestType.PV) as target:
        assert target.guest_type is GuestType.HVM


def test_a_busy_model_runs_until_it_is_left() -> None:
    with registry.open_source("model:1M,busy=100000,working-set=512K") as source:
        assert isinstance(source, ModelGuest)
        while source.ticks == 0:
            time.sleep(0.001)
    ticks = source.ticks
    time.sleep(0.05)
    assert source.ticks == ticks


@pytest.mark.parametrize(("option", "said"), [("refuse", "refused"), ("ignore", "did not answer")])
def test_a_model_can_be_told_not_to_suspend(option: str, said: str) -> None:
    with registry.open_source(f"model:1M,suspend={option}") as source, pytest.raises(GuestError, match=said):
        source.suspend()


def test_a_raw_guest_is_a_file_whose_name_may_have_commas(tmp_path: Path) -> None:
    path = tmp_path / "a,b.img"
    with registry.open_target(f"raw:{path},max=1M") as target:
        assert target.max_pfn == 255
        target.populate(pfns(2))
        target.complete()
    with registry.open_source(f"raw:{path},holes=zero", GuestType.PV) as source:
        assert source.guest_type is GuestType.PV
        assert source.page_types(run(0, 3)).tolist() == [PageType.XTAB] * 3


def test_a_raw_target_left_early_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(GuestError), registry.open_target(f"raw:{tmp_path}/x.img,max=1M") as target:
        target.populate(pfns(256))
    assert os.listdir(tmp_path) == []


def test_every_kind_is_described_with_all_its_options_and_without_numpy() -> None:
    code = (
        "import sys; from migstream.guests.registry import describe; "
        "print(describe()); print('numpy' in sys.modules)"
    )
    *lines, numpy = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert numpy == "False"
    for name in registry.MODULES:
        kind = registry.kind(name)
        assert kind.name == name
        assert any(line.strip().startswith(f"{name}:{kind.what}  ") for line in lines)
        for option in kind.options:
            assert any(line.strip().startswith(f",{option.name}={option.example}  ") for line in lines)
            assert registry.parse(f"{kind.example},{option.name}={option.example}").options
