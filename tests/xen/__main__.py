"""Ask the real ``xl restore`` whether it accepts streams that migstream wrote.

Copies the emulated Xen host beside the project (``../shared/xenlab``, its README says what it is) into the
build folder, builds it there from Debian packages if it is not built (root, about two minutes), makes the
streams below from real captures, and restores each (about half a minute a stream). Needs Debian's
qemu-system-x86, seabios, ipxe-qemu, mmdebstrap, cpio, zstd, busybox-static, libxen-dev and gcc.

    make test-xen
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import migstream

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
STREAMS = SHARED / "streams"
LAB = ROOT / "build" / "xenlab"
MADE = ROOT / "build" / "xen-streams"

#: Pages that a real restore rewrites itself: a PV guest's p2m list, start_info and xenstore ring, 4 to 6 in
#: the captured guests; the store and console rings of PVH and HVM.
REWRITTEN = {"pv": 6, "pvh": 2, "hvm": 2}
TRIES = 2  # an emulated guest may reboot by itself while it is being looked at


def rewritten(name: str, out: Path) -> None:
    """Write a capture again, every record decoded and built anew."""
    with migstream.open(STREAMS / f"{name}.xl.zst") as stream, out.open("wb") as file:
        migstream.copy_stream(stream, migstream.StreamWriter(file.fileno()), rebuild=True)


def convert(name: str, out: Path, *options: str) -> None:
    """Convert a capture by the command, as a user does."""
    _migstream("convert", str(STREAMS / f"{name}.xl.zst"), str(out), "--to", "xl", *options)


def wrapped_again(name: str, out: Path) -> None:
    """Unwrap a capture to its libxc image, and wrap it again as an xl file with the same config."""
    image, config = out.with_suffix(".img"), out.with_suffix(".json")
    capture = str(STREAMS / f"{name}.xl.zst")
    _migstream("convert", capture, str(image), "--to", "libxc3")
    config.write_bytes(_migstream("inspect", "--config", capture))
    _migstream("convert", str(image), str(out), "--to", "xl", "--config", str(config))


def _migstream(*args: str) -> bytes:
    command = [sys.executable, "-c", "from migstream.cli import main; main()", *args]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout


#: The streams: name, whose first part is the kind of guest -> how it is made.
MAKERS: dict[str, Callable[[Path], None]] = {
    "pv-rewritten": lambda out: rewritten("tinypv-save-p", out),
    "pvh-rewritten": lambda out: rewritten("tinypvh-save-c", out),
    "hvm-rewritten": lambda out: rewritten("hvm16-save", out),
    "pv-batch-77": lambda out: convert("tinypv-save-p", out, "--batch", "77"),
    "pv-flattened-live": lambda out: convert("tinypv-migrate-live", out, "--flatten"),
    "pv-flattened-remus": lambda out: convert("tinypv-remus", out, "--flatten"),
    "pv-checkpoint-3": lambda out: convert("tinypv-remus", out, "--checkpoint", "3"),
    "pvh-wrapped-again": lambda out: wrapped_again("tinypvh-save-c", out),
}


def build_lab() -> None:
    """Copy and build the emulated host, unless that was done."""
    if not (LAB / "img" / "xen").exists():
        shutil.rmtree(LAB, ignore_errors=True)
        shutil.copytree(SHARED / "xenlab", LAB)
        subprocess.run(["chmod", "-R", "u+w", LAB], check=True)
        subprocess.run([LAB / "build-dom0.sh"], check=True)


def restore(paths: list[Path]) -> dict[str, str]:
    """Restore ``paths`` in one boot of the host; return what is wrong with each, by file name."""
    print(f"booting Xen to restore {len(paths)} streams ...", flush=True)
    run = subprocess.run(
        [LAB / "restore-test.sh", *paths], capture_output=True, text=True, check=False, env=os.environ
    )
    print(run.stdout, flush=True)
    wrong = {path.name: "the host said nothing of it" for path in paths}
    differ = 0
    for line in run.stdout.splitlines():
        if found := re.match(r"DOMCHECK .* differ (\d+) missing (\d+)(?: extra (\d+))?", line):
            differ = sum(int(n) for n in found.groups() if n)
        elif found := re.match(r"RESTORE-TEST (PASS|FAIL) .* (\S+)$", line):
            verdict, name = found.groups()
            allowed = REWRITTEN[name.split("-")[0]]
            if verdict == "PASS" and differ <= allowed:
                del wrong[name]
            else:
                wrong[name] = f"{verdict}, {differ} pages differ (a restore rewrites up to {allowed})"
    return wrong


def main() -> int:
    """Make, restore, judge; return 0 if real Xen took every stream."""
    if not STREAMS.exists():
        print("skipped: ../shared with its captures and its emulated Xen is absent")
        return 0
    MADE.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, make in MAKERS.items():
        paths.append(MADE / f"{name}.xl")
        make(paths[-1])
    build_lab()
    wrong = restore(paths)
    for _ in range(TRIES - 1):
        if wrong:
            wrong = restore([path for path in paths if path.name in wrong])
    for name, reason in wrong.items():
        print(f"{name}: {reason}")
    print(f"{len(paths) - len(wrong)} passed, {len(wrong)} failed")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
