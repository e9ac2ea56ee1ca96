"""A running QEMU machine moved by migstream, and by QEMU itself: how long it takes, how long it stands still.

The machines of tests/qemu: Debian's kernel and busybox, 256 MiB, emulated, and a loop that writes 10 MB/s.
Downtime is measured in the same way for both: from QEMU's STOP event at the source to its RESUME event at
the destination, by this host's clock. The time in all is that of the migration: QEMU's own is a command to a
process that runs already, so the start of ours, until it offers the guest to the receiver, is told apart.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from bench.timing import Row
from tests.qemu.commands import receiving, run
from tests.qemu.image import build, install_packages
from tests.qemu.machine import TURN, Machine, boot_flags, flags, machine, wait_until

__all__ = ["rows"]

RUNS = 5
UNLIMITED = 1 << 40  # octets a second


@dataclass(frozen=True)
class Moved:
    """What one migration took, in seconds; ``start_s`` passed before it."""

    total_s: float
    downtime_s: float
    start_s: float = 0.0


class Lab:
    """Pairs of machines: a guest that runs, and where it is to go."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = count()
        self._made_of = [*flags(), *boot_flags(build())]
        self._state = folder / "state"
        with machine(folder / "boot", self._made_of) as guest:
            guest.wait_for_count(TURN)
            guest.save(self._state)

    @contextmanager
    def pair(self) -> Iterator[tuple[Machine, Machine, Path]]:
        """Start a pair; the third is a free path for a socket between the two."""
        folder = self._folder / str(next(self._numbers))
        waiting = ["-incoming", "defer"]
        with ExitStack() as stack:
            source, destination = (
                stack.enter_context(machine(folder / name, [*self._made_of, *waiting, *paused]))
                for name, paused in (("source", ["-S"]), ("destination", []))
            )
            source.load(self._state)
            source.command("cont")
            source.wait_for_count(source.count + TURN // 2)
            source.events()
            yield source, destination, folder / "socket"

    def by_migstream(self) -> Moved:
        """Move a guest by the commands that a user gives."""
        with self.pair() as (source, destination, path), receiving(path, destination.qmp) as receiver:
            started = time.time()
            sent = run("migrate", f"qemu:{source.qmp}", f"unix:{path}", "--json")
            assert sent.code == 0, sent
            assert receiver.wait().code == 0
            moved = _moved(started, source, destination)
            migration_s = float(sent.result["seconds"])
            return Moved(migration_s, moved.downtime_s, moved.total_s - migration_s)

    def by_qemu(self, bandwidth: int | None) -> Moved:
        """Move a guest by QEMU's own command, limited to ``bandwidth``; `None`: what it does by itself."""
        with self.pair() as (source, destination, path):
            if bandwidth is not None:
                source.command("migrate-set-parameters", **{"max-bandwidth": bandwidth})
            destination.command("migrate-incoming", uri=f"unix:{path}")
            started = time.time()
            source.command("migrate", uri=f"unix:{path}")
            source.wait_for_migration()
            return _moved(started, source, destination)


def _moved(started: float, source: Machine, destination: Machine) -> Moved:
    wait_until("the guest to run at its destination", lambda: destination.status == "running")
    stopped, resumed = (
        dict(guest.events())[name] for guest, name in ((source, "STOP"), (destination, "RESUME"))
    )
    return Moved(resumed - started, resumed - stopped)


def rows(*, quick: bool = False) -> list[Row]:
    """Measure; ``quick`` once each."""
    install_packages()
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        ways: list[Callable[[], Moved]] = [
            lab.by_migstream,
            lambda: lab.by_qemu(UNLIMITED),
            lambda: lab.by_qemu(None),
        ]
        rounds = [[way() for way in ways] for _ in range(1 if quick else RUNS)]
    start_s = statistics.median(turn[0].start_s for turn in rounds)
    found = []
    for index, limit in ((1, "no bandwidth limit"), (2, "its own limit of 128 MiB/s")):
        for what, field, target, note in (
            ("time in all", "total_s", 1.3, f" (and {_ms(start_s)} to start)"),
            ("time stopped", "downtime_s", 1.5, ""),
        ):
            pairs = [(getattr(turn[0], field), getattr(turn[index], field)) for turn in rounds]
            ours, reference = (statistics.median(values) for values in zip(*pairs, strict=True))
            name = (
                f"a QEMU machine of 256 MiB moved: {what}, against QEMU's migrate with {limit}, times as long"
            )
            ratio = statistics.median(a / b for a, b in pairs)
            found.append(Row(name, _ms(ours) + note, _ms(reference), ratio, target, higher_is_better=False))
    return found


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms"
