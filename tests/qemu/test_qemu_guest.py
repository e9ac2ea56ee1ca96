"""QEMU machines as guests: where their memory lies, what goes along besides it, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from migstream.engines.machine import save_machine
from migstream.engines.restore import restore
from migstream.errors import GuestError, MigstreamError
from migstream.guests.qemu.ram_map import RamMap
from migstream.guests.qemu.source import QemuSource
from migstream.guests.qemu.target import QemuTarget
from tests.qemu.commands import run
from tests.qemu.conftest import Start
from tests.qemu.machine import ANONYMOUS, Machine, flags, machine, wait_until

GIB = 1 << 30
SMALL = flags(mib=64)

#: A machine without any flag of QEMU's migration: what docs/qemu.md shows.
PLAIN = [
    word.replace(",suppress-vmdesc=on", "")
    for before, word in zip(["", *SMALL], SMALL, strict=False)
    if "-global" not in (before, word)
]


def save(source: Machine, stream: Path, *, live: bool = False) -> None:
    with QemuSource(str(source.qmp)) as guest, stream.open("wb") as out:
        save_machine(guest, out.fileno(), live=live)


def load(stream: Path, destination: Machine, *, start: bool = False) -> None:
    with QemuTarget(str(destination.qmp)) as guest, stream.open("rb") as octets:
        restore(guest, octets.fileno())
        if start:
            guest.start()


def words(guest: Machine, address: int) -> str:
    """Return what the guest sees at a physical address."""
    return str(guest.command("human-monitor-command", **{"command-line": f"xp /4xw {address:#x}"}))


# Where memory lies


@pytest.mark.parametrize(
    ("machine_type", "expected"),
    [("pc", RamMap(5 * GIB, 3 * GIB, 4 * GIB)), ("q35", RamMap(5 * GIB, 2 * GIB, 4 * GIB))],
)
def test_memory_above_4_gib_has_its_own_pfns_and_comes_to_the_same_place(
    start: Start, tmp_path: Path, machine_type: str, expected: RamMap
) -> None:
    made_of = flags(machine_type, mib=5120)
    source = start("source", made_of, incoming=False)
    memory = source.memory()
    split = expected.below >> 12
    marked = [0, 0xA0, split - 1, split, len(memory) - 1]  # 0xa0 is SMRAM: no flat view shows it as RAM
    for page in marked:
        memory[page] = 1 + page % 251

    with QemuSource(str(source.qmp)) as guest:
        assert guest.machine.ram == expected
        assert guest.max_pfn == (4 * GIB + 5 * GIB - expected.below >> 12) - 1
    save(source, tmp_path / "stream")
    assert (tmp_path / "stream").stat().st_size < 64 << 20  # what was never touched is not sent

    destination = start("destination", made_of)
    load(tmp_path / "stream", destination)
    found = destination.memory()
    assert [int(found[page].min()) for page in marked] == [1 + page % 251 for page in marked]
    assert [int(found[page].max()) for page in marked] == [1 + page % 251 for page in marked]


def test_what_the_destination_had_in_pages_that_the_source_never_touched_is_cleared(
    start: Start, tmp_path: Path
) -> None:
    source, destination = start("source", SMALL, incoming=False), start("destination", SMALL)
    source.memory()[5] = 7
    save(source, tmp_path / "stream")
    destination.memory()[1000:1010] = 0xFF
    load(tmp_path / "stream", destination)
    assert (source.memory() == destination.memory()).all()


# What goes along


def test_machines_need_no_flags_of_qemus_migration(start: Start, tmp_path: Path) -> None:
    source, destination = start("source", PLAIN, incoming=False), start("destination", PLAIN)
    save(source, tmp_path / "stream")
    load(tmp_path / "stream", destination)
    assert destination.status == "paused"
    assert (tmp_path / "destination" / "log").read_text() == ""


@pytest.mark.parametrize("made_of", [PLAIN, SMALL], ids=["plain", "alike"])
def test_the_bios_goes_along_so_that_the_guest_can_reboot(
    start: Start, tmp_path: Path, made_of: list[str]
) -> None:
    source, destination = start("source", made_of, incoming=False), start("destination", made_of)
    reset_vector = words(source, 0xFFFF_FFF0)
    assert words(destination, 0xFFFF_FFF0) != reset_vector  # a QEMU that waits for a guest loads no BIOS
    save(source, tmp_path / "stream")
    load(tmp_path / "stream", destination)
    assert words(destination, 0xFFFF_FFF0) == reset_vector


def test_video_memory_goes_along(tmp_path: Path) -> None:
    made_of = [*SMALL, "-vga", "std"]
    with (
        machine(tmp_path / "source", made_of) as source,
        machine(tmp_path / "destination", [*made_of, "-incoming", "defer"]) as destination,
    ):

        def shows_text() -> bool:
            return re.search(r"0x[0-9a-f]*[1-9a-f]", words(source, 0xB8000).partition(":")[2]) is not None

        wait_until("the BIOS to write to the screen", shows_text)
        save(source, tmp_path / "stream", live=True)
        load(tmp_path / "stream", destination)
        for address in (0xB8000, 0xB8100):
            assert words(destination, address) == words(source, address)


# Running and standing still


def test_the_guest_runs_on_when_its_save_fails(source: Machine) -> None:
    with (
        QemuSource(str(source.qmp)) as guest,
        Path("/dev/full").open("wb", buffering=0) as full,
        pytest.raises(MigstreamError),
    ):
        save_machine(guest, full.fileno(), live=True)
    assert source.status == "running"
    assert source.tracked == []
    source.wait_for_count(source.count + 5)


def test_a_saved_machine_runs_on_when_it_is_told_to(source: Machine, tmp_path: Path) -> None:
    with QemuSource(str(source.qmp)) as guest, (tmp_path / "stream").open("wb") as out:
        save_machine(guest, out.fileno(), live=True)
        assert guest.suspended
        guest.resume()
        assert not guest.suspended
    source.wait_for_count(source.count + 5)


def test_a_restored_guest_stays_paused_until_it_is_started(
    source: Machine, destination: Machine, tmp_path: Path
) -> None:
    save(source, tmp_path / "stream", live=True)
    with QemuTarget(str(destination.qmp)) as guest, (tmp_path / "stream").open("rb") as octets:
        restore(guest, octets.fileno())
        assert destination.status == "paused"
        guest.start()
    assert destination.status == "running"


def test_a_destination_without_the_flag_s_is_left_paused_too(tmp_path: Path) -> None:
    with (
        machine(tmp_path / "source", [*SMALL, "-S"]) as source,
        machine(tmp_path / "destination", [*SMALL, "-incoming", "defer"]) as destination,
    ):
        save(source, tmp_path / "stream")
        load(tmp_path / "stream", destination)
        assert destination.status == "paused"


# Refusals


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(MigstreamError) as caught:
        action()
    return str(caught.value)


@pytest.mark.parametrize(
    ("made_of", "expected"),
    [
        (
            flags(mib=128),
            "128 MiB, the saved one had 64 MiB: start this one with -object memory-backend-memfd",
        ),
        (
            flags("q35", mib=64),
            "q35-7.2, the saved one had pc-i440fx-7.2: start this one with -machine pc-i440",
        ),
        ([*SMALL, "-smp", "2"], "processors numbering 2, the saved one had 1: start this one with -smp 1"),
        ([*SMALL, "-cpu", "max"], "of the type max-x86_64-cpu, the saved one had qemu64-x86_64-cpu"),
        (
            [*SMALL, "-global", "migration.send-section-footer=on"],
            "start this one with -global migration.send-section-footer=off",
        ),
    ],
    ids=["memory", "machine type", "processors", "cpu", "section footers"],
)
def test_another_machine_is_refused_before_the_first_page(
    start: Start, tmp_path: Path, made_of: list[str], expected: str
) -> None:
    source = start("source", SMALL, incoming=False)
    source.memory()[0] = 0xAB
    save(source, tmp_path / "stream")
    destination = start("destination", made_of)
    assert expected in refusal(lambda: load(tmp_path / "stream", destination))
    assert not destination.memory().any()


def test_a_machine_that_does_not_wait_for_a_guest_takes_none(start: Start) -> None:
    machine = start("other", SMALL, incoming=False)
    assert "start it with -incoming defer" in refusal(lambda: QemuTarget(str(machine.qmp)))


def test_a_machine_that_waits_for_a_guest_has_none_to_save(destination: Machine) -> None:
    assert "it waits for a migration itself" in refusal(lambda: QemuSource(str(destination.qmp)))


@pytest.mark.parametrize(
    "backend",
    [ANONYMOUS, "memory-backend-memfd,id=ram,size={mib}M,share=off"],
    ids=["anonymous", "private"],
)
def test_memory_that_nobody_else_can_see_is_refused_with_the_flags_that_help(
    start: Start, backend: str
) -> None:
    machine = start("other", flags(mib=64, backend=backend), incoming=False)
    said = refusal(lambda: QemuSource(str(machine.qmp)))
    assert "-object memory-backend-memfd,id=ram,size=64M,share=on -machine memory-backend=ram" in said


def test_other_devices_at_the_destination_end_it_and_the_error_says_where_to_look(
    start: Start, tmp_path: Path
) -> None:
    source = start("source", [*SMALL, "-device", "virtio-rng-pci"], incoming=False)
    save(source, tmp_path / "stream")
    destination = start("destination", SMALL)
    assert "Start both machines with the same devices" in refusal(
        lambda: load(tmp_path / "stream", destination)
    )


def test_a_machine_is_saved_once_at_a_time(start: Start, tmp_path: Path) -> None:
    second = tmp_path / "second.qmp"
    made_of = [*SMALL, "-qmp", f"unix:{second},server=on,wait=off"]
    machine = start("source", made_of, incoming=False)
    with QemuSource(str(machine.qmp)):
        assert "QEMU does not greet" in refusal(lambda: QemuSource(str(machine.qmp)))
        assert "is being saved, migrated or restored already" in refusal(lambda: QemuSource(str(second)))
    QemuSource(str(second)).close()


def test_a_qemu_that_died_is_told_as_such(start: Start) -> None:
    machine = start("source", SMALL, incoming=False)
    with QemuSource(str(machine.qmp)) as guest:
        machine.kill()
        with pytest.raises(GuestError, match="QEMU is gone"):
            guest.suspend()


def test_the_last_complete_checkpoint_is_what_the_destination_gets(
    source: Machine, destination: Machine, tmp_path: Path
) -> None:
    stream = tmp_path / "stream"
    saved = run("save", f"qemu:{source.qmp}", str(stream), "--type", "remus", "--checkpoints", "3")
    assert saved.code == 0, saved
    assert source.status == "running"
    assert source.tracked == []
    restored = run("restore", str(stream), f"qemu:{destination.qmp}", "--type", "remus")
    assert restored.code == 0, restored
    assert "failed over to checkpoint 3" in restored.out
    destination.wait_for_count(10)


@pytest.mark.parametrize("name", ["send-configuration", "store-global-state"])
def test_other_settings_of_qemus_migration_need_not_be_the_same(
    start: Start, tmp_path: Path, name: str
) -> None:
    source = start("source", PLAIN, incoming=False)
    destination = start("destination", [*PLAIN, "-global", f"migration.{name}=off"])
    save(source, tmp_path / "stream")
    load(tmp_path / "stream", destination)
    assert destination.status == "paused"
