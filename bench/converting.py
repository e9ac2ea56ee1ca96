"""convert against cp, and the memory that flattening takes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.streams import PAGE, write_hvm_image
from bench.timing import Row, compare, shell

__all__ = ["rows"]

MIGSTREAM = f"{Path(sys.executable).parent}/migstream"
PASSES = 5


def rows(*, quick: bool = False) -> list[Row]:
    """Measure; ``quick`` on 64 MiB instead of 4 GiB."""
    size = 64 << 20 if quick else 4 << 30
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        return [_libxc2_to_libxc3(Path(folder), size), _flatten_memory(Path(folder), size)]


def _libxc2_to_libxc3(folder: Path, size: int) -> Row:
    source, out = folder / "version3", folder / "out"
    write_hvm_image(source, size)
    old = folder / "version2"
    convert = f"{MIGSTREAM} convert --to"
    shell(f"{convert} libxc2 {source} {old}")()
    source.unlink()
    ours, reference, ratio = compare(
        shell(f"rm -f {out}; {convert} libxc3 {old} {out}"),
        shell(f"rm -f {out}; cp --reflink=never {old} {out}"),
    )
    out.unlink()
    old.unlink()
    gib = f"{size / (1 << 30):.2g} GiB"
    what = f"`convert --to libxc3` of {gib} against `cp --reflink=never`, times as fast"
    return Row(what, f"{ours:.2f} s", f"{reference:.2f} s", ratio, 0.8)


def _flatten_memory(folder: Path, size: int) -> Row:
    """Compare the peak of five passes with that of a quarter of the guest: what is fixed cancels out."""
    small, large, out = folder / "small", folder / "large", folder / "out"
    write_hvm_image(small, size // 4, passes=PASSES, sparse=True)
    write_hvm_image(large, size, passes=PASSES, sparse=True)
    peaks = [_peak_octets(path, out) for path in (small, large)]
    more = (size - size // 4) // PAGE
    a_page = (peaks[1] - peaks[0]) / more
    what = f"`convert --flatten` of {PASSES} passes over {size / (1 << 30):.2g} GiB: octets of memory a page"
    large.unlink()
    small.unlink()
    return Row(what, f"{peaks[1] >> 20} MiB", f"{peaks[0] >> 20} MiB", a_page, 16, False)


def _peak_octets(source: Path, out: Path) -> int:
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    )
    command = [MIGSTREAM, "convert", "--to", "libxc3", "--flatten", str(source), str(out)]
    shown = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, check=True, text=True)
    out.unlink()
    return int(shown.stdout) * 1024
