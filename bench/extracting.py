"""extract against cp, and the memory that it takes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.streams import BATCH, PAGE, write_hvm_image
from bench.timing import Row, compare, shell

__all__ = ["rows"]

MIGSTREAM = f"{Path(sys.executable).parent}/migstream"


def rows(*, quick: bool = False) -> list[Row]:
    """Measure; ``quick`` on 64 MiB instead of 4 GiB."""
    size = 64 << 20 if quick else 4 << 30
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        source, small = Path(folder) / "stream", Path(folder) / "small"
        write_hvm_image(source, size)
        write_hvm_image(small, BATCH * PAGE)
        return [_raw(source, size), _memory(source, small, size)]


def _raw(source: Path, size: int) -> Row:
    out = source.with_name("out")
    ours, reference, ratio = compare(
        shell(f"rm -f {out}; {MIGSTREAM} extract {source} {out} 2>/dev/null"),
        shell(f"rm -f {out}; cp --reflink=never {source} {out}"),
    )
    out.unlink()
    what = f"`extract` raw of {size / (1 << 30):.2g} GiB against `cp --reflink=never`, times as fast"
    return Row(what, f"{ours:.2f} s", f"{reference:.2f} s", ratio, 0.7)


def _memory(source: Path, small: Path, size: int) -> Row:
    """Compare the peak of a large guest with that of a guest of one batch."""
    peaks = [_peak_octets(path, source.with_name("out")) for path in (small, source)]
    a_page = (peaks[1] - peaks[0]) / (size // PAGE - BATCH)
    what = f"`extract` raw of {size / (1 << 30):.2g} GiB: octets of memory a page"
    return Row(what, f"{peaks[1] >> 20} MiB", f"{peaks[0] >> 20} MiB", a_page, 16, False)


def _peak_octets(source: Path, out: Path) -> int:
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True, stderr=subprocess.DEVNULL)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    )
    command = [sys.executable, "-c", code, MIGSTREAM, "extract", str(source), str(out)]
    shown = subprocess.run(command, capture_output=True, check=True, text=True)
    out.unlink()
    return int(shown.stdout) * 1024
