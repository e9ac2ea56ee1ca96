"""Saving the memory of processes: what the streams hold, and what is left behind in the process: nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner

from migstream.cli.group import group
from migstream.engines.restore import restore
from migstream.engines.save import SaveCallbacks, SaveResult, save
from migstream.errors import GuestError
from migstream.guests import registry
from migstream.guests.image import ImageTarget
from migstream.guests.kind import GuestSpecError
from migstream.guests.process import userfaultfd
from migstream.guests.process.mappings import Mapping, everything_writable, named, read_mappings, spans
from migstream.guests.process.source import ProcessSource
from migstream.guests.protocols import PAGE_SIZE
from migstream.io import reader
from migstream.records.libxc import Origin
from migstream.verification import verify
from tests.processes import (
    Child,
    child,
    is_untouched,
    status,
    tracked,
    wait_for,
    why_no_write_protection,
    why_not_traced,
)

pytestmark = pytest.mark.skipif(bool(why_not_traced()), reason=why_not_traced())

N_PAGES = 3000

Pages = npt.NDArray[np.uint8]


def source_of(process: Child) -> ProcessSource:
    memory = process.ranges[0]
    return ProcessSource(process.pid, spans([(memory.address, memory.end)]))


def saved(process: Child, path: Path, *, live: bool) -> tuple[SaveResult, Pages]:
    """Save to ``path``; return the result and the memory at the moment of suspension."""
    at_suspension: list[Pages] = []
    with source_of(process) as source, path.open("wb") as out:

        def suspend() -> int:
            source.suspend()
            at_suspension.append(process.memory().copy())
            return 1

        result = save(source, out.fileno(), live=live, callbacks=SaveCallbacks(suspend=suspend))
        assert source.suspended
        assert (process.memory() == at_suspension[0]).all()
    return result, at_suspension[0]


def restored(stream: Path, image: Path) -> Pages:
    with stream.open("rb") as data, ImageTarget(image, max_pages=N_PAGES) as target:
        restore(target, data.fileno())
    return np.frombuffer(image.read_bytes(), np.uint8).reshape(-1, PAGE_SIZE)


@pytest.fixture(params=["userfaultfd", "shadow"])
def tracker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = str(request.param)
    if name == "shadow":
        monkeypatch.setitem(userfaultfd.FEATURES, "WP_ASYNC", 1 << 62)
    elif why_no_write_protection():
        pytest.skip(why_no_write_protection())
    return name


@pytest.mark.parametrize("kind", ["private", "shared", "memfd"])
def test_a_busy_process_saved_live_is_what_it_was_at_suspension(
    kind: str, tracker: str, tmp_path: Path
) -> None:
    with child(N_PAGES, kind) as process:
        process.do("read_into", 0, N_PAGES)
        process.do("busy", 20)
        result, memory = saved(process, tmp_path / "stream", live=True)
        assert is_untouched(process.pid)
        process.do("write", 1)
    assert result.iterations > 0
    assert result.notes[0].startswith(f"writes were tracked by {tracker}: ")
    assert (restored(tmp_path / "stream", tmp_path / "image") == memory).all()


def test_a_stopped_save_tracks_nothing_and_is_exact(tmp_path: Path) -> None:
    with child(N_PAGES) as process:
        process.do("busy", 20)
        result, memory = saved(process, tmp_path / "stream", live=False)
        assert is_untouched(process.pid)
    assert (result.pages, result.notes) == (N_PAGES, [])
    assert (restored(tmp_path / "stream", tmp_path / "image") == memory).all()


def test_the_stream_is_sound_and_says_where_the_memory_was(tmp_path: Path) -> None:
    with child(64) as process, ProcessSource(process.pid) as source:
        path = tmp_path / "stream"
        with path.open("wb") as out:
            save(source, out.fileno())
        with reader.open(path) as stream:
            assert verify(stream).sound(strict=True)
        (origin,) = source.static_records()
        assert isinstance(origin, Origin)
        properties = origin.properties
        assert properties["pid"] == str(process.pid)
        where = {mapping.start: mapping for mapping in everything_writable(read_mappings(process.pid))}
        for each in source.ranges:
            mapping = where[each.address]
            shown = f"{each} {mapping.permissions} {mapping.name}".rstrip()
            assert properties[f"pfn {each.first_pfn:#x}"] == shown


def test_all_that_a_process_can_write_is_saved_unless_something_is_named() -> None:
    with child(64) as process:
        with ProcessSource(process.pid) as source:
            starts = [each.address for each in source.ranges]
            assert any(each.address <= process.address < each.end for each in source.ranges)
            assert starts == sorted(starts)
            assert source.max_pfn == sum(each.n_pages for each in source.ranges) - 1
        with ProcessSource(process.pid, named("[heap]")) as source:
            (heap,) = [each for each in read_mappings(process.pid) if each.name == "[heap]"]
            assert [(each.address, each.end) for each in source.ranges] == [(heap.start, heap.end)]


def test_pages_of_a_shared_file_are_not_copied() -> None:
    with child(64, "memfd") as process, source_of(process) as source:
        if source._views[0] is None:
            pytest.skip("mappings of other processes may not be opened here")
        first, last = np.array([3, 4, 9], np.uint64), np.array([0], np.uint64)
        views = [*source.pages(first, source.page_types(first))[0]]
        source.pages(last, source.page_types(last))
        process.do("write", 3, 9)
        memory = process.memory()
        assert b"".join(views) == memory[[3, 4, 9]].tobytes()  # what it writes now shows


def test_mapped_and_copied_ranges_come_in_the_order_of_pfns() -> None:
    with child(64, "memfd") as process, ProcessSource(process.pid) as source:
        pfns = np.arange(0, source.max_pfn + 1, 3, dtype=np.uint64)
        source.suspend()
        octets = b"".join(source.pages(pfns, source.page_types(pfns))[0])
        with open(f"/proc/{process.pid}/mem", "rb", buffering=0) as memory:
            whole = b"".join(os.pread(memory.fileno(), each.length, each.address) for each in source.ranges)
    expected = np.frombuffer(whole, np.uint8).reshape(-1, PAGE_SIZE)[::3]
    assert octets == expected.tobytes()


# Memory that does not stay


@pytest.mark.parametrize("live", [False, True], ids=["stopped", "live"])
def test_memory_unmapped_during_a_save_is_an_error_and_the_process_runs_on(
    live: bool, tracker: str, tmp_path: Path
) -> None:
    with child(N_PAGES) as process, source_of(process) as source, (tmp_path / "s").open("wb") as out:
        process.do("unmap", 100, 1)
        with pytest.raises(GuestError, match=r"no readable memory at 0x|the memory 0x.* cannot be"):
            save(source, out.fileno(), live=live)
        source.close()
        assert is_untouched(process.pid)
        process.do("write", 1)


def test_memory_mapped_during_a_save_of_everything_is_an_error() -> None:
    with child(N_PAGES) as process, ProcessSource(process.pid) as source:
        process.do("grow", 500)
        with pytest.raises(GuestError, match=r"mapped or unmapped memory while .*kill -STOP"):
            source.suspend()
        assert not source.suspended
        assert is_untouched(process.pid)


# Killed


def tracers_of(pid: int) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            arguments = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
            if b"migstream.guests.process.tracing_child" in arguments and str(pid).encode() in arguments:
                found.append(entry.name)
    return found


def left_alone(pid: int) -> bool:
    return is_untouched(pid) and not tracers_of(pid)


MIGSTREAM = """
import sys, time
from migstream.guests.process.mappings import spans
from migstream.guests.process.source import ProcessSource
pid, start, end = map(int, sys.argv[1:4])
source = ProcessSource(pid, spans([(start, end)]))
def over_and_over():
    while True:
        source.enable_dirty_log(); source.suspend(); source.resume()
steps = {"track": source.enable_dirty_log, "stop": source.suspend, "loop": over_and_over}
for step in sys.argv[4:]:
    if step == "loop": print("there", flush=True)
    steps[step]()
print("there", flush=True)
time.sleep(60)
"""


@contextlib.contextmanager
def migstream(process: Child, *steps: str) -> Iterator[subprocess.Popen[bytes]]:
    bounds = [str(process.address), str(process.ranges[0].end)]
    started = subprocess.Popen(
        [sys.executable, "-c", MIGSTREAM, str(process.pid), *bounds, *steps], stdout=subprocess.PIPE
    )
    try:
        out = started.stdout
        assert out is not None
        assert out.readline() == b"there\n"
        yield started
    finally:
        started.kill()
        started.communicate()


@pytest.mark.parametrize("steps", ["track", "stop", "track stop"])
def test_a_killed_migstream_leaves_the_process_running_and_untracked(steps: str, tracker: str) -> None:
    with child(N_PAGES) as process:
        with migstream(process, *steps.split()) as killed:
            if "track" in steps and not why_no_write_protection():
                assert tracked(process.pid)
            if "stop" in steps:
                assert status(process.pid, "State")["State"][0] == "t"
            killed.send_signal(signal.SIGKILL)
            killed.wait()
            wait_for(lambda: left_alone(process.pid), "the process is left alone")
        process.do("write", 1, 2, 3)


def test_a_migstream_killed_at_any_moment_leaves_the_process_running_and_untracked() -> None:
    with child(64) as process:
        process.do("busy", 20)
        for n in range(6):
            with migstream(process, "loop") as killed:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    killed.wait(0.005 * n + 0.0007)
                killed.send_signal(signal.SIGKILL)
                killed.wait()
                wait_for(lambda: left_alone(process.pid), "the process is left alone")
            process.do("write", n)


def test_a_killed_tracer_lets_the_process_run_and_is_noticed() -> None:
    with child(64) as process, source_of(process) as source:
        source.suspend()
        (tracer,) = tracers_of(process.pid)
        os.kill(int(tracer), signal.SIGKILL)
        wait_for(lambda: is_untouched(process.pid), "the process runs")
        process.do("write", 1)
        assert not source.suspended
        with pytest.raises(GuestError, match="was killed; the process is stopped no longer"):
            source.resume()
        source.suspend()
        assert source.suspended


def test_a_process_that_ends_while_it_is_saved_is_an_error(tracker: str, tmp_path: Path) -> None:
    with child(N_PAGES) as process, source_of(process) as source, (tmp_path / "s").open("wb") as out:

        def suspend() -> int:
            process.kill()
            source.suspend()
            return 1

        with pytest.raises(GuestError, match="has ended, or there never was one"):
            save(source, out.fileno(), live=True, callbacks=SaveCallbacks(suspend=suspend))


# By name


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(group, arguments)
    return result.exit_code, result.output


def test_save_on_the_command_line_shows_how_writes_were_tracked(tracker: str, tmp_path: Path) -> None:
    with child(64) as process:
        code, output = run("save", process.spec, str(tmp_path / "stream"), "--live")
        assert is_untouched(process.pid)
        assert code == 0, output
        assert f"note: writes were tracked by {tracker}: " in output
        code, output = run("migrate", process.spec, f"raw:{tmp_path / 'image'}")
        assert code == 0, output
        assert (tmp_path / "image").read_bytes() == process.memory().tobytes()


SPECS = {
    "process:no": "is no process number",
    "process:0": "is no process number",
    "process:1,range=5-6": "whole pages",
    "process:1,range=2000-1000": "whole pages",
    "process:1,range=1000-3000+2000-4000": "none may overlap",
    "process:1,range=all": "hexadecimal bounds",
    "process:1,range=1000-2000,mapping=[heap]": "not both",
    "process:2147483647": "there is no process 2147483647",
}


@pytest.mark.parametrize("spec", SPECS)
def test_a_bad_name_is_refused_with_a_reason(spec: str) -> None:
    with pytest.raises((GuestSpecError, GuestError), match=SPECS[spec]), registry.open_source(spec):
        pass


def test_migstream_does_not_save_itself() -> None:
    with pytest.raises(GuestError, match="cannot save itself"):
        ProcessSource(os.getpid())


def test_ranges_and_mappings_that_are_not_there_are_named() -> None:
    with child(64) as process:
        with pytest.raises(GuestError, match=r"no writable mapping called 'x'; it has .*\[heap\]"):
            ProcessSource(process.pid, named("x"))
        with pytest.raises(GuestError, match="no readable memory at 0x1000, in the range 0x1000-0x3000"):
            ProcessSource(process.pid, spans([(0x1000, 0x3000)]))


def test_devices_are_no_memory_and_neighbours_are_one_range() -> None:
    def mapping(start: int, end: int, name: str = "", offset: int = 0, inode: int = 0) -> Mapping:
        return Mapping(start, end, "rw-s" if inode else "rw-p", offset, ("00:01", inode), name)

    found = everything_writable(
        [
            mapping(0x1000, 0x2000),
            mapping(0x2000, 0x4000, "[heap]"),
            mapping(0x5000, 0x6000, "/dev/dri/card0", 0, 5),
            mapping(0x6000, 0x7000, "/dev/shm/x", 0, 6),
            mapping(0x7000, 0x8000, "/dev/shm/x", 0x1000, 6),
            mapping(0x8000, 0x9000, "/dev/shm/x", 0x5000, 6),
            mapping(0x9000, 0xA000, "anon_inode:[io_uring]", 0, 7),
        ]
    )
    assert [(each.start, each.end) for each in found] == [
        (0x1000, 0x4000),
        (0x6000, 0x8000),
        (0x8000, 0x9000),
    ]
