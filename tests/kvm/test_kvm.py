"""The engines against a hypervisor's own dirty log. Skipped where /dev/kvm does not open; see __main__."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from migstream.bitmap import PfnBitmap
from migstream.engines.migrate import migrate
from migstream.engines.policies import max_iterations
from migstream.engines.restore import restore
from migstream.engines.save import ChannelError, SaveCallbacks, save
from migstream.guests.protocols import HasEmulator, TakesEmulator
from tests.kvm.guest import WINDOW_PFN, KvmGuest
from tests.kvm.vm import DEVICE, Exit

PAGES = 8192  # 32 MiB
WINDOW = 4096


def _why_not() -> str:
    try:
        os.close(os.open(DEVICE, os.O_RDWR))
    except OSError as exc:
        return f"{DEVICE} does not open here ({exc.strerror}): `make test-kvm` emulates a machine that has it"
    return ""


pytestmark = pytest.mark.skipif(bool(_why_not()), reason=_why_not())


@pytest.fixture
def make() -> Iterator[Callable[[], KvmGuest]]:
    """Makes a guest without memory, closed behind the test."""
    made: list[KvmGuest] = []

    def empty() -> KvmGuest:
        made.append(KvmGuest(PAGES))
        return made[-1]

    yield empty
    for guest in made:
        guest.close()


@pytest.fixture
def running() -> Iterator[KvmGuest]:
    guest = KvmGuest.booted(PAGES, WINDOW)
    yield guest
    guest.close()


def run_for(guest: KvmGuest, steps: int) -> None:
    """Let a suspended guest run ``steps`` at least, and suspend it."""
    wanted = guest.steps + steps
    while guest.steps < wanted:
        guest.resume()
        time.sleep(0.05)
        guest.suspend()
        assert guest.vm.last_exit is Exit.IO


def differing(source: KvmGuest, target: KvmGuest) -> list[int]:
    return np.flatnonzero((source.memory.words != target.memory.words).any(axis=1)).tolist()


def test_the_log_has_the_pages_that_were_written_and_no_others(running: KvmGuest) -> None:
    running.suspend()
    running.enable_dirty_log()
    before = running.memory.words.copy()
    run_for(running, 300)
    written = np.flatnonzero((running.memory.words != before).any(axis=1))
    log = PfnBitmap(PAGES)
    running.peek_dirty_log(log)
    logged = np.concatenate(list(log.batches()))
    assert set(written.tolist()) <= set(logged.tolist())
    # The vCPU marks page tables as accessed: those are written too, though nothing that a program reads.
    assert all(pfn >= WINDOW_PFN for pfn in set(logged.tolist()) - {0x10, 0x11, 0x12})
    assert len(logged) <= len(written) + 3
    running.clean_dirty_log(log)
    assert len(log) == len(logged)
    running.clean_dirty_log(log)
    assert len(log) == 0


def test_a_live_migration_moves_every_page_and_the_guest_runs_on(
    running: KvmGuest, make: Callable[[], KvmGuest]
) -> None:
    target = make()
    assert not isinstance(running, HasEmulator)
    assert not isinstance(target, TakesEmulator)
    callbacks = SaveCallbacks(precopy_policy=max_iterations(6))
    result = migrate(
        running,
        lambda fd, _: save(running, fd, live=True, callbacks=callbacks),
        lambda fd, _: restore(target, fd),
    )
    assert result.save.iterations > 1
    assert result.save.pages > PAGES  # some were written meanwhile, and sent again
    assert running.suspended
    assert differing(running, target) == []
    assert target.vm.state == running.vm.state

    moved_at = target.steps
    assert moved_at > 0
    run_for(target, 1000)
    assert target.steps > moved_at
    assert (target.window() == KvmGuest.replayed(target.steps, WINDOW)).all()


def test_a_guest_goes_on_at_the_source_when_the_receiver_fails(running: KvmGuest) -> None:
    readable, writable = os.pipe()
    os.close(readable)
    with pytest.raises(ChannelError):
        save(running, writable, live=True)
    os.close(writable)
    assert not running.suspended
    running.suspend()
    run_for(running, 1000)
    assert (running.window() == KvmGuest.replayed(running.steps, WINDOW)).all()
