"""QEMU guests against a fake QEMU: what is asked, in which order, and what is refused with which words."""

from __future__ import annotations

import socket
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import migstream
from migstream.bitmap import PfnBitmap
from migstream.engines.machine import save_machine
from migstream.engines.restore import restore
from migstream.engines.save import save
from migstream.errors import GuestError, MigstreamError
from migstream.guests.model import ModelGuest
from migstream.guests.qemu.client import QmpClient
from migstream.guests.qemu.source import QemuSource
from migstream.guests.qemu.target import QemuTarget
from migstream.guests.registry import open_source
from migstream.records.libxc import GuestType
from migstream.records.page_types import PageType
from tests.fake_qemu import BIOS, DEVICES, FakeQemu, Refused

CONFIGURATION = b"\7\0\0\0\x0dpc-i440fx-7.2"
DESCRIPTION = b"\6\0\0\0\2{}"


def a_stream(qemu: FakeQemu, path: Path) -> Path:
    with QemuSource(qemu.path) as source, path.open("wb") as out:
        save_machine(source, out.fileno())
    return path


def refused_source(qemu: FakeQemu) -> str:
    with qemu, pytest.raises(GuestError) as caught:
        QemuSource(qemu.path)
    return str(caught.value)


# Save and restore


def test_memory_and_device_state_go_to_a_machine_alike(tmp_path: Path) -> None:
    with (
        FakeQemu(tmp_path / "source") as source,
        FakeQemu(tmp_path / "destination", status="inmigrate") as destination,
    ):
        source.memory[[0, 5, -1]] = [[1], [2], [3]]
        destination.memory[9] = 9  # left over from something; the stream has no page for it
        stream = a_stream(source, tmp_path / "stream")
        assert source.status == "paused"
        with migstream.open(stream) as opened:
            assert {finding.rule.id for finding in migstream.verify(opened).findings} == {
                "static-data-missing"
            }
        with QemuTarget(destination.path) as target, stream.open("rb") as octets:
            result = restore(target, octets.fileno())
            assert destination.status == "paused"
            target.start()
        assert result.pages == 3
        assert destination.status == "running"
        assert (source.memory == destination.memory).all()


def test_pages_of_zeros_are_left_out_of_the_first_pass_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tracked:
        name, why, copy = "scripted", "for the test", None

        def clean(self, into: PfnBitmap) -> None:
            into.clear()
            into.add(np.array([5], np.uint64))

        def close(self) -> None:
            pass

    monkeypatch.setattr("migstream.guests.qemu.source.track", lambda *_, **__: Tracked())
    looked_at = np.array([5, 6, 7], np.uint64)
    with FakeQemu(tmp_path / "source") as qemu:
        qemu.memory[5], qemu.memory[6, 3000], qemu.memory[7] = 1, 1, 0  # written to, all of them
        with QemuSource(qemu.path) as source:
            source.enable_dirty_log()
            assert source.page_types(looked_at).tolist() == [PageType.NOTAB, PageType.NOTAB, PageType.XTAB]
            qemu.memory[5] = 0
            source.clean_dirty_log(PfnBitmap(source.max_pfn + 1))
            # The target has what was in page 5 before, so that it is zeros now has to be told.
            assert source.page_types(looked_at).tolist() == [PageType.NOTAB, PageType.NOTAB, PageType.XTAB]


def test_the_device_state_is_taken_at_once_when_the_machine_stands_still(tmp_path: Path) -> None:
    with FakeQemu(tmp_path / "source") as qemu:
        a_stream(qemu, tmp_path / "stream")
    asked = qemu.commands[qemu.commands.index("stop") :]
    assert asked == ["stop", "xen-save-devices-state", "remove-fd"]  # nothing else is waited for


@pytest.mark.parametrize("settings", [("on", "on"), ("off", "on"), ("on", "off"), ("off", "off")])
def test_the_state_is_loaded_in_the_form_that_qemus_settings_ask_for(
    tmp_path: Path, settings: tuple[str, str]
) -> None:
    with (
        FakeQemu(tmp_path / "source", settings=("on", settings[1])) as source,
        FakeQemu(tmp_path / "destination", status="inmigrate", settings=settings) as destination,
    ):
        stream = a_stream(source, tmp_path / "stream")
        with QemuTarget(destination.path) as target, stream.open("rb") as octets:
            restore(target, octets.fileno())
    # The section ``ram`` with the BIOS: a FULL section of number ffffffff, instance 0, version 4; the sizes;
    # a page; a page of zeros that goes on with its block; the end.
    bios = (
        b"\4\xff\xff\xff\xff\3ram\0\0\0\0\0\0\0\4"
        + b"\0\0\0\0\0\0\x20\4"
        + b"\7pc.bios\0\0\0\0\0\0\x20\0"
        + (b"\0\0\0\0\0\0\0\x08" + b"\7pc.bios" + BIOS[:4096])
        + (b"\0\0\0\0\0\0\x10\x22" + b"\0")
        + b"\0\0\0\0\0\0\0\x10"
        + (b"\x7e\xff\xff\xff\xff" if settings[1] == "on" else b"")
    )
    configuration = CONFIGURATION if settings[0] == "on" else b""
    assert destination.loaded == DEVICES[:8] + configuration + bios + DEVICES[8:] + DESCRIPTION


def test_a_machine_whose_device_state_cannot_be_had_runs_on(tmp_path: Path) -> None:
    def fails(_: object) -> object:
        raise Refused("State blocked by a device")

    with FakeQemu(tmp_path / "source") as qemu:
        qemu.answers["xen-save-devices-state"] = fails
        with pytest.raises(GuestError, match="refuses xen-save-devices-state: State blocked by a device"):
            a_stream(qemu, tmp_path / "stream")
        assert qemu.status == "running"


def test_a_machine_that_somebody_lets_go_on_in_the_meantime_is_not_saved(tmp_path: Path) -> None:
    with FakeQemu(tmp_path / "source") as qemu, QemuSource(qemu.path) as source:
        source.suspend()
        assert source.suspended
        qemu.become("running")
        source.qmp.query("query-version")  # an event counts when the answer behind it has come
        assert not source.suspended
        with pytest.raises(GuestError, match="went on while it was saved"):
            source.emulator_records()


# Streams that no QEMU takes


def target_refuses(tmp_path: Path, stream: Path) -> str:
    with FakeQemu(tmp_path / "destination", status="inmigrate") as qemu, QemuTarget(qemu.path) as target:
        with stream.open("rb") as octets, pytest.raises(MigstreamError) as caught:
            restore(target, octets.fileno())
        assert not qemu.memory.any()
        assert "migrate-incoming" not in qemu.commands
    return str(caught.value)


def test_a_stream_of_a_xen_domain_is_refused(tmp_path: Path) -> None:
    stream = tmp_path / "stream"
    with stream.open("wb") as out:
        save(ModelGuest.booted(64, GuestType.HVM), out.fileno())
    assert "a QEMU machine has no use for X86_CPUID_POLICY" in target_refuses(tmp_path, stream)


def test_a_stream_without_an_origin_is_refused(tmp_path: Path) -> None:
    stream, memory = tmp_path / "stream", tmp_path / "memory"
    memory.write_bytes(b"x" * 8192)
    with stream.open("wb") as out, open_source(f"raw:{memory}") as source:
        save(source, out.fileno())
    assert "the stream names no origin" in target_refuses(tmp_path, stream)


def test_a_machine_with_less_memory_is_refused_before_the_first_page(tmp_path: Path) -> None:
    with FakeQemu(tmp_path / "source", mib=8) as source:
        source.memory[:] = 1
        stream = a_stream(source, tmp_path / "stream")
    said = target_refuses(tmp_path, stream)
    assert "memory of 4 MiB, the saved one had 8 MiB" in said
    assert "size=8M,share=on" in said


def test_a_state_that_qemu_cannot_load_is_told_with_its_reason(tmp_path: Path) -> None:
    with (
        FakeQemu(tmp_path / "source") as source,
        FakeQemu(tmp_path / "destination", status="inmigrate") as destination,
    ):
        stream = a_stream(source, tmp_path / "stream")
        destination.answers["migrate-incoming"] = {}
        destination.migration = {"status": "failed", "error-desc": "Unknown section 'rng'"}
        with (
            QemuTarget(destination.path) as target,
            stream.open("rb") as octets,
            pytest.raises(GuestError, match="Unknown section 'rng'; start both machines with the same dev"),
        ):
            restore(target, octets.fileno())


def test_a_qemu_that_ends_over_the_state_is_told_as_such(tmp_path: Path) -> None:
    def ends(_: object) -> object:
        raise ConnectionAbortedError

    with (
        FakeQemu(tmp_path / "source") as source,
        FakeQemu(tmp_path / "destination", status="inmigrate") as destination,
    ):
        stream = a_stream(source, tmp_path / "stream")
        destination.answers["migrate-incoming"] = ends
        with (
            QemuTarget(destination.path) as target,
            stream.open("rb") as octets,
            pytest.raises(GuestError, match="QEMU ended while it loaded the device state"),
        ):
            restore(target, octets.fileno())


# Machines that are refused


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        ("inmigrate", "it waits for a migration itself"),
        ("postmigrate", "let it go on here first"),
        ("shutdown", "its guest has shut down"),
        ("suspended", "wake it first"),
        ("internal-error", "only a running or paused machine can be saved"),
    ],
)
def test_a_machine_in_another_state_is_not_saved(tmp_path: Path, status: str, remedy: str) -> None:
    said = refused_source(FakeQemu(tmp_path, status=status))
    assert f"in the state '{status}'" in said
    assert remedy in said


def test_a_running_machine_takes_no_guest(tmp_path: Path) -> None:
    with FakeQemu(tmp_path) as qemu, pytest.raises(GuestError, match="start it with -incoming defer"):
        QemuTarget(qemu.path)
    assert "stop" not in qemu.commands


def test_memory_that_is_not_shared_is_refused_with_the_flags_that_help(tmp_path: Path) -> None:
    qemu = FakeQemu(tmp_path)
    qemu.properties["/objects/ram", "share"] = False
    assert "size=4M,share=on -machine memory-backend=ram -m 4M" in refused_source(qemu)


def test_memory_of_several_backends_is_refused(tmp_path: Path) -> None:
    qemu = FakeQemu(tmp_path)
    qemu.properties["/machine", "memory-backend"] = ""
    assert "without memdev= for NUMA nodes" in refused_source(qemu)


def test_memory_that_only_qemu_says_is_shared_is_refused(tmp_path: Path) -> None:
    qemu = FakeQemu(tmp_path)
    private = np.zeros(4 << 20, np.uint8)
    qemu.texts["gpa2hva 0"] = f"Host virtual address for 0x0 (ram) is {private.ctypes.data:#x}"
    assert "anonymous memory, which no other process can see" in refused_source(qemu)


def test_hot_plugged_memory_is_refused(tmp_path: Path) -> None:
    qemu = FakeQemu(tmp_path)
    qemu.answers["query-memory-size-summary"] = {"base-memory": 4 << 20, "plugged-memory": 1}
    assert "give all by -m" in refused_source(qemu)


def test_a_device_that_forbids_migration_is_named(tmp_path: Path) -> None:
    qemu = FakeQemu(tmp_path)
    qemu.migration = {"blocked-reasons": "x"}
    qemu.answers["query-migrate"] = {"blocked-reasons": ["VFIO device does not support migration"]}
    assert "VFIO device does not support migration; start it without" in refused_source(qemu)


def test_memory_that_cannot_be_carried_is_named(tmp_path: Path) -> None:
    qemu = FakeQemu(tmp_path)
    qemu.texts["info ramblock"] += (
        "    0000:00:02.0/vga.vram    4 KiB  0x0000000140080000 0x0000000001000000 0x0000000001000000\r\n"
    )
    assert "'0000:00:02.0/vga.vram': it would be lost" in refused_source(qemu)


# Sockets


def test_a_socket_that_is_not_there_is_named_with_qemus_option(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match=f"{tmp_path}/none.*start QEMU with -qmp unix:{tmp_path}/none"):
        QmpClient(f"{tmp_path}/none")


def test_a_socket_that_nobody_listens_at_is_named(tmp_path: Path) -> None:
    abandoned = socket.socket(socket.AF_UNIX)
    abandoned.bind(f"{tmp_path}/socket")
    abandoned.close()
    with pytest.raises(GuestError, match="the QEMU that made this socket has ended"):
        QmpClient(f"{tmp_path}/socket")


def test_a_qemu_that_serves_another_client_is_told_as_such(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(f"{tmp_path}/socket")
        silent.listen()
        with pytest.raises(GuestError, match="it serves one client a socket"):
            QmpClient(f"{tmp_path}/socket", greeting_s=0.1)


def test_a_socket_of_something_else_is_told_as_such(tmp_path: Path) -> None:
    def chat(listener: socket.socket) -> None:
        with listener.accept()[0] as connection:
            connection.sendall(b"220 mail.example ESMTP\r\n")

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/socket")
        listener.listen()
        thread = threading.Thread(target=chat, args=(listener,))
        thread.start()
        with pytest.raises(GuestError, match="does not speak QMP"):
            QmpClient(f"{tmp_path}/socket")
        thread.join()


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qemu.qmp", None)
    with pytest.raises(GuestError, match=r"pip install 'migstream\[qemu\]'"):
        QmpClient(f"{tmp_path}/socket")


def test_another_process_than_the_named_one_is_told_as_such(tmp_path: Path) -> None:
    with FakeQemu(tmp_path) as qemu, pytest.raises(GuestError, match="name QEMU's process by pid="):
        QemuSource(qemu.path, pid=1)
