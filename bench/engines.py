"""The engines against what the kernel does by itself: pages moved, memory held, bitmaps scanned."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from bench.timing import Row, compare, print_table, shell
from migstream.bitmap import PfnBitmap
from migstream.engines.restore import restore
from migstream.engines.save import save
from migstream.guests.memory import Memory
from migstream.guests.model import ModelGuest
from migstream.io import fd as fdio
from migstream.records.libxc import GuestType

__all__ = ["rows"]

PAGE = 4096
CHUNK = 4 << 20  # octets a readv of the reference asks for: as much as a record of 1024 pages holds


def rows(*, quick: bool = False) -> list[Row]:
    """Measure; ``quick`` on 64 MiB instead of 2 GiB, and a bitmap of 4 GiB instead of 1 TiB."""
    n_pages = (64 << 20 if quick else 2 << 30) // PAGE
    source = ModelGuest.booted(n_pages, holes=False, content=False)
    source.memory.words[:] = np.arange(512, dtype=np.uint64)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "stream"
        with path.open("wb") as file:
            save(source, file.fileno())
        found = [_pipe(source, path, touched=True), _pipe(source, path, touched=False)]
        found.append(_from_file(n_pages, path))
        found += _resident(folder, quick=quick)
    return [*found, _bitmap(1 << (20 if quick else 28))]


def _size(n_pages: int) -> str:
    gib = n_pages * PAGE / (1 << 30)
    return f"{gib / 1024:.3g} TiB" if gib >= 1024 else f"{gib:.3g} GiB"


def _pipe(source: ModelGuest, path: Path, *, touched: bool) -> Row:
    """Save and restore in two threads of this process, against two processes that only move the octets.

    ``touched``: the target's memory has been touched before, as a host does that claims a guest's memory
    first. If not, the kernel clears every page on the way, which cat's buffer never needs.
    """

    def migrate() -> float:
        source.resume()
        target = ModelGuest.empty(source.n_pages, GuestType.HVM)
        if touched:
            target.memory.words[:, 0] = 1
        readable, writable = os.pipe()
        started = time.perf_counter()
        sender = threading.Thread(target=save, args=(source, writable))
        sender.start()
        restore(target, readable)
        sender.join()
        seconds = time.perf_counter() - started
        os.close(readable)
        os.close(writable)
        return seconds

    ours, reference, ratio = compare(migrate, shell(f"cat {path} | cat"))
    memory = "memory touched before" if touched else "fresh memory"
    what = (
        f"model to pipe to model ({memory}), {_size(source.n_pages)}, against `cat FILE \\| cat >/dev/null`"
    )
    return Row(f"{what}, times as fast", f"{ours:.2f} s", f"{reference:.2f} s", ratio, 0.6)


def _from_file(n_pages: int, path: Path) -> Row:
    """Restore from a file in tmpfs, against plain readv into memory of the same kind, both fresh."""

    def ours() -> float:
        fd = os.open(path, os.O_RDONLY)
        target = ModelGuest.empty(n_pages, GuestType.HVM)
        started = time.perf_counter()
        restore(target, fd)
        seconds = time.perf_counter() - started
        os.close(fd)
        return seconds

    def reference() -> float:
        fd = os.open(path, os.O_RDONLY)
        octets = Memory.anonymous(n_pages).octets
        started = time.perf_counter()
        for at in range(0, len(octets), CHUNK):
            fdio.read_into(fd, [octets[at : at + CHUNK]])
        seconds = time.perf_counter() - started
        os.close(fd)
        return seconds

    seconds, reference_s, ratio = compare(ours, reference)
    what = f"restore from a file in tmpfs, {_size(n_pages)}, against readv into the same kind of memory"
    return Row(f"{what}, times as fast", f"{seconds:.2f} s", f"{reference_s:.2f} s", ratio, 0.7)


def _resident(folder: str, *, quick: bool) -> list[Row]:
    """Peak memory of a process that saves, and of one that restores, beyond guest and 3 bits a page."""
    mib = 64 if quick else 1024
    stream = f"{folder}/resident"
    booted = f"""
import numpy as np
from migstream.guests.model import ModelGuest
guest = ModelGuest.booted({mib << 8}, holes=False, content=False)
guest.memory.words[:] = 1
from migstream.engines.save import save
with open({stream!r}, "wb") as file:
    save(guest, file.fileno(), live=True)
"""
    restored = f"""
from migstream.guests.model import ModelGuest
from migstream.records.libxc import GuestType
from migstream.engines.restore import restore
with open({stream!r}, "rb") as file:
    restore(ModelGuest.empty({mib << 8}, GuestType.HVM), file.fileno())
"""
    return [_beyond_guest(name, code, mib) for name, code in (("live save", booted), ("restore", restored))]


def _beyond_guest(name: str, code: str, mib: int) -> Row:
    # Not getrusage: its maximum is handed down from this process, which is large.
    report = "print(next(line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line))"
    run = subprocess.run([sys.executable, "-c", code + report], capture_output=True, check=True, text=True)
    peak = int(run.stdout) / 1024
    allowed = mib + 3 * (mib << 8) / 8 / (1 << 20)
    what = f"{name} of {mib} MiB: peak memory beyond the guest and 3 bits a page, MiB"
    return Row(what, f"{peak:.0f} MiB", f"{allowed:.0f} MiB", peak - allowed, 64, False)


def _bitmap(n_pages: int) -> Row:
    """Go over a dirty bitmap with 1 % of its bits set, in batches, against numpy's own way."""
    bitmap = PfnBitmap(n_pages)
    bitmap.add(np.unique(np.random.default_rng(0).integers(0, n_pages, n_pages // 100, np.uint64)))
    bits = bitmap.octets

    def ours() -> float:
        started = time.perf_counter()
        for _ in bitmap.batches(1024):
            pass
        return time.perf_counter() - started

    def reference() -> float:
        started = time.perf_counter()
        np.flatnonzero(np.unpackbits(bits, bitorder="little"))
        return time.perf_counter() - started

    seconds, reference_s, ratio = compare(ours, reference)
    what = f"a pass over the dirty bitmap of {_size(n_pages)}, 1 % dirty, against flatnonzero(unpackbits)"
    return Row(f"{what}, times as fast", f"{1000 * seconds:.0f} ms", f"{1000 * reference_s:.0f} ms", ratio, 1)


def main() -> None:
    """Print the table; exit 1 when a target is missed, unless the run is only a quick one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: seconds instead of a minute")
    quick = parser.parse_args().quick
    table = rows(quick=quick)
    print_table(table)
    sys.exit(0 if quick or all(row.reached for row in table) else 1)


if __name__ == "__main__":
    main()
