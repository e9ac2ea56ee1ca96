"""inspect and verify against cat, start-up against the bare interpreter, and resident memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.streams import write_hvm_image
from bench.timing import Row, compare, shell

__all__ = ["rows"]

MIGSTREAM = f"{Path(sys.executable).parent}/migstream"


def rows(*, quick: bool = False) -> list[Row]:
    """Measure; ``quick`` on 64 MiB instead of 8 GiB."""
    size = 64 << 20 if quick else 8 << 30
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        path = Path(folder) / "large.img"
        write_hvm_image(path, size)
        subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)  # into the page cache
        found = [_seeking(command, path) for command in ("inspect", "verify")]
        found.append(_pipe(path))
        found += [_memory(command, path) for command in ("inspect", "verify")]
    return [*found, _startup()]


def _seeking(command: str, path: Path) -> Row:
    ours, reference, ratio = compare(shell(f"{MIGSTREAM} {command} {path}"), shell(f"cat {path}"))
    size = f"{path.stat().st_size / (1 << 30):.1f} GiB"
    what = f"`{command}` of {size} against `cat FILE >/dev/null`, times as fast"
    return Row(what, f"{ours:.2f} s", f"{reference:.2f} s", ratio, 4)


def _pipe(path: Path) -> Row:
    ours, reference, ratio = compare(
        shell(f"cat {path} | {MIGSTREAM} verify -"), shell(f"cat {path} | cat"), runs=3
    )
    what = "`cat FILE \\| verify -` against `cat FILE \\| cat >/dev/null`, times as fast"
    return Row(what, f"{ours:.2f} s", f"{reference:.2f} s", ratio, 0.7)


def _memory(command: str, path: Path) -> Row:
    ours = _peak_kib([MIGSTREAM, command, str(path)])
    bare = _peak_kib([sys.executable, "-c", "import numpy"])
    what = f"`{command}`: peak memory over the interpreter with numpy, MiB"
    return Row(what, f"{ours / 1024:.0f} MiB", f"{bare / 1024:.0f} MiB", (ours - bare) / 1024, 64, False)


def _peak_kib(command: list[str]) -> int:
    """Return the peak resident memory of ``command``, measured in a process that has no other children."""
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    shown = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, check=True, text=True)
    return int(shown.stdout)


def _startup() -> Row:
    ours, reference, ratio = compare(
        shell(f"{MIGSTREAM} --help"), shell(f"{sys.executable} -c pass"), runs=15
    )
    what = "`migstream --help` against `python3 -c pass`, times as long"
    return Row(what, f"{1000 * ours:.0f} ms", f"{1000 * reference:.0f} ms", 1 / ratio, 5, False)
