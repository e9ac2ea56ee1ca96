"""The test machines themselves: what the other tests here stand on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.qemu.machine import TURN, Machine, counts


def test_a_guest_runs_on_from_the_booted_state(source: Machine) -> None:
    first = source.count
    source.wait_for_count(first + 5)
    assert source.status == "running"
    assert source.tracked == []


def test_a_guest_moved_by_qemu_itself_counts_on_without_a_gap(
    source: Machine, destination: Machine, tmp_path: Path
) -> None:
    source.wait_for_count(TURN + 5)
    source.save(tmp_path / "state")
    destination.load(tmp_path / "state")
    last = source.count
    destination.command("cont")
    destination.wait_for_count(last + TURN)
    found = counts(source.serial + destination.serial)
    assert found == list(range(found[0], found[-1] + 1))


def test_the_guest_finds_a_page_that_was_brought_in_an_older_state(
    source: Machine, destination: Machine, tmp_path: Path
) -> None:
    older = source.memory().copy()
    source.wait_for_count(source.count + 5)
    source.save(tmp_path / "state")
    destination.load(tmp_path / "state")
    newer = destination.memory().view(np.uint64)
    # Pages of the working set: each word is the one before plus the pattern's odd constant.
    differing = (newer != older.view(np.uint64)).any(axis=1)
    written = np.flatnonzero(differing & (np.diff(newer) == np.uint64(0x9E3779B97F4A7C15)).all(axis=1))
    assert len(written) > 100
    destination.memory()[written[-1]] = older[written[-1]]
    destination.command("cont")
    with pytest.raises(AssertionError, match=r"CORRUPT page \d+ word 0: expected"):
        destination.wait_for_count(source.count + TURN)
