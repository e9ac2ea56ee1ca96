"""Build the tiny guest: Debian's kernel, and busybox and our counter as an initramfs.

    python -m tests.qemu.image        # installs what it needs (root, Debian), and builds into build/qemu

What is there is kept: the kernel until ``make clean``, the initramfs until one of its sources changes.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CannotBuildError", "Image", "build", "install_packages", "kernel_tree", "pack_initramfs"]

FOLDER = Path(__file__).parents[2] / "build" / "qemu"
COUNTER = Path(__file__).with_name("counter.c")
BUSYBOX = Path("/bin/busybox")

#: What has to be there -> the Debian package that brings it.
PACKAGES = {
    "/usr/bin/qemu-system-x86_64": "qemu-system-x86",
    "/usr/bin/gcc": "gcc",
    "/usr/lib/x86_64-linux-gnu/libc.a": "libc6-dev",
    "/usr/bin/cpio": "cpio",
    str(BUSYBOX): "busybox-static",
    "/usr/bin/openssl": "openssl",  # certificates for a test
}

INIT = """\
#!/bin/busybox sh
busybox mount -t devtmpfs dev /dev
counter
busybox poweroff -f
"""


class CannotBuildError(Exception):
    """What is missing to build the guest, and how to get it."""


@dataclass(frozen=True)
class Image:
    """What QEMU boots: ``-kernel`` and ``-initrd``."""

    kernel: Path
    initramfs: Path


def install_packages() -> None:
    """Install the Debian packages that are missing. Raises `CannotBuildError` where that needs the user."""
    missing = [package for path, package in PACKAGES.items() if not Path(path).exists()]
    if not missing:
        return
    command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing]
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise CannotBuildError(
            f"the guest needs {', '.join(missing)}; on Debian, as root: {' '.join(command)}"
        )
    _run(["apt-get", "update", "-qq"])
    _run(command)


def build() -> Image:
    """Return the guest, built if it is not there yet. Raises `CannotBuildError`."""
    missing = [package for path, package in PACKAGES.items() if not Path(path).exists()]
    if missing:
        raise CannotBuildError(f"{', '.join(missing)} is not installed; `make test-qemu` as root does that")
    tree = kernel_tree()
    initramfs = FOLDER / "initramfs.gz"
    sources = (COUNTER, Path(__file__))
    if not initramfs.exists() or initramfs.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        with tempfile.TemporaryDirectory() as folder:
            counter = Path(folder) / "counter"
            _run(["gcc", "-O2", "-Wall", "-Werror", "-static", "-o", str(counter), str(COUNTER)])
            pack_initramfs(initramfs, INIT, {"bin/counter": counter})
    return Image(next(tree.glob("boot/vmlinuz-*")), initramfs)


def kernel_tree() -> Path:
    """Return the folder with ``boot/vmlinuz-*`` and ``lib/modules/*`` of Debian's kernel, not installed."""
    tree = FOLDER / "kernel"
    if tree.exists():
        return tree
    FOLDER.mkdir(parents=True, exist_ok=True)
    if os.geteuid() == 0:
        with contextlib.suppress(CannotBuildError):  # old lists name packages that may be gone, or not
            _run(["apt-get", "update", "-qq"])
    found = re.search(r"Depends: (linux-image-\S+)", _run(["apt-cache", "depends", "linux-image-amd64"]))
    if not found:
        raise CannotBuildError("apt knows no linux-image-amd64; on Debian, as root: apt-get update")
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        _run(["apt-get", "download", "-q", found[1]], cwd=folder)
        (package,) = Path(folder).glob("*.deb")
        unpacked = Path(folder) / "tree"
        _run(["dpkg-deb", "-x", str(package), str(unpacked)])
        unpacked.rename(tree)
    return tree


def pack_initramfs(path: Path, init: str, files: dict[str, Path]) -> None:
    """Write an initramfs whose ``/init`` is the script ``init``, and which holds busybox.

    ``files``: path in the initramfs -> the file that goes there, with its permissions.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("bin", "dev", "proc", "sys"):
            (root / name).mkdir()
        shutil.copy(BUSYBOX, root / "bin" / "busybox")
        for inside, file in files.items():
            (root / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, root / inside)
        (root / "init").write_text(init)
        (root / "init").chmod(0o755)
        names = b"".join(bytes(found.relative_to(root)) + b"\0" for found in sorted(root.rglob("*")))
        archive = subprocess.run(
            ["cpio", "--quiet", "--null", "--create", "--format=newc", "--owner=0:0"],
            cwd=root,
            input=names,
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
    unfinished = path.with_suffix(".part")
    unfinished.write_bytes(gzip.compress(archive, 1))
    unfinished.rename(path)


def _run(command: list[str], cwd: str | None = None) -> str:
    quietly = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    run = subprocess.run(command, cwd=cwd, env=quietly, capture_output=True, text=True, check=False)
    if run.returncode:
        raise CannotBuildError(
            f"{' '.join(command)}: exit status {run.returncode}: {run.stderr.strip()[-500:]}"
        )
    return run.stdout


def main() -> int:
    """Install, build, and say where the guest is."""
    try:
        install_packages()
        image = build()
    except CannotBuildError as exc:
        print(exc, file=sys.stderr)
        return 1
    print(f"the guest: {image.kernel.name} and {image.initramfs.name} in {FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
