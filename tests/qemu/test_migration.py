"""A running QEMU machine moved by migstream: it counts on in the second machine, and no page differs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.qemu.commands import receiving, run
from tests.qemu.machine import TURN, Machine, counts


def differing(source: Machine, destination: Machine) -> list[int]:
    """PFNs of the pages that differ: both machines are paused."""
    return np.flatnonzero((source.memory() != destination.memory()).any(axis=1)).tolist()


def check_counts_on(source: Machine, destination: Machine) -> None:
    """The guest goes on in ``destination``: no count is missing or said twice, and its memory is sound."""
    destination.wait_for_count(source.count + TURN)
    found = counts(source.serial + destination.serial)
    assert found == list(range(found[0], found[-1] + 1))


@pytest.mark.parametrize("options", [[], ["--compress", "--checksum"]], ids=["bare", "compressed"])
def test_a_guest_counts_on_at_a_receiver_without_a_gap(
    source: Machine, destination: Machine, tmp_path: Path, options: list[str]
) -> None:
    address = tmp_path / "socket"
    with receiving(address, destination.qmp, "--paused") as receiver:
        sent = run("migrate", f"qemu:{source.qmp}", f"unix:{address}", *options, "--json")
        assert sent.code == 0, sent
        received = receiver.wait()
        assert received.code == 0, received
    assert source.status == "paused"
    assert source.tracked == []
    assert destination.status == "paused"
    assert differing(source, destination) == []
    report = sent.result
    assert report["destination"] == "paused"
    assert report["pages"] >= np.count_nonzero(source.memory().any(axis=1))
    assert {"passes", "octets", "dirty_rate", "bandwidth", "downtime_s"} <= set(report)
    destination.command("cont")
    check_counts_on(source, destination)


def test_the_receiver_lets_the_guest_run_once_it_is_given_up(
    source: Machine, destination: Machine, tmp_path: Path
) -> None:
    address = tmp_path / "socket"
    with receiving(address, destination.qmp) as receiver:
        sent = run("migrate", f"qemu:{source.qmp}", f"unix:{address}")
        assert sent.code == 0, sent
        assert receiver.wait().code == 0
    assert destination.status == "running"
    assert source.status == "paused"
    check_counts_on(source, destination)


def test_a_guest_moves_to_a_machine_of_the_same_host(source: Machine, destination: Machine) -> None:
    moved = run("migrate", f"qemu:{source.qmp}", f"qemu:{destination.qmp}")
    assert moved.code == 0, moved
    assert source.status == "paused"
    assert source.tracked == []
    if destination.status == "paused":
        destination.command("cont")
    check_counts_on(source, destination)


def test_a_captured_stream_is_sound_shows_its_passes_and_restores(
    source: Machine, destination: Machine, tmp_path: Path
) -> None:
    stream = tmp_path / "stream"
    saved = run("save", f"qemu:{source.qmp}", str(stream), "--live", "--json")
    assert saved.code == 0, saved
    passes = [json.loads(line) for line in saved.out.splitlines() if '"pass"' in line]
    assert len(passes) > 1
    assert source.status == "paused"
    assert source.tracked == []

    sound = run("verify", str(stream))
    assert sound.code == 0, sound
    shown = run("inspect", "--json", str(stream))
    assert shown.code == 0, shown
    assert "PAGE_DATA" in shown.out

    restored = run("restore", str(stream), f"qemu:{destination.qmp}")
    assert restored.code == 0, restored
    if destination.status == "running":
        check_counts_on(source, destination)
    else:
        assert differing(source, destination) == []
        destination.command("cont")
        check_counts_on(source, destination)
