"""Run the tests of this folder where there is a /dev/kvm: in an emulated machine, if this one has none.

QEMU emulates an AMD processor with its virtualisation, so that Debian's kernel offers /dev/kvm in it. That
machine sees this one's files, read only, and runs pytest from them.

    make test-kvm
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.kvm.vm import DEVICE
from tests.qemu.image import CannotBuildError, install_packages, kernel_tree, pack_initramfs

ROOT = Path(__file__).parents[2]
TESTS = ["-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider", "tests/kvm"]
MODULES = ("virtio_pci", "9pnet_virtio", "9p", "kvm_amd")
DONE = "exit status of pytest: "
TIMEOUT_S = 600  # it takes about two minutes

INIT = """\
#!/bin/busybox sh
busybox mount -t proc proc /proc
busybox mount -t devtmpfs dev /dev
for module in {modules}; do busybox insmod /modules/$module.ko; done
busybox mkdir /host
busybox mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=1048576,cache=loose host /host
busybox mount -t proc proc /host/proc
busybox mount -t devtmpfs dev /host/dev
busybox mkdir /host/dev/shm
busybox mount -t tmpfs tmpfs /host/dev/shm
busybox chroot /host /bin/sh -c {command}
busybox poweroff -f
"""


def modules(tree: Path) -> dict[str, Path]:
    """Return the kernel modules wanted and those that they depend on, in the order of loading."""
    files = {path.stem.replace("-", "_"): path for path in tree.glob("lib/modules/*/kernel/**/*.ko")}
    wanted: dict[str, Path] = {}

    def add(name: str) -> None:
        depends = re.search(rb"\0depends=([^\0]*)\0", files[name].read_bytes())
        for other in depends[1].decode().replace("-", "_").split(",") if depends else ():
            if other:
                add(other)
        wanted.setdefault(name, files[name])

    for name in MODULES:
        add(name)
    return wanted


def emulate() -> int:
    """Boot the machine and run the tests in it; return pytest's exit status, or 1 if it never ended."""
    install_packages()
    tree = kernel_tree()
    needed = modules(tree)
    words = [sys.executable, *TESTS]
    settings = {"PATH": os.environ["PATH"], "TMPDIR": "/dev/shm", "PYTHONDONTWRITEBYTECODE": "1"}
    assignments = [f"{name}={value}" for name, value in settings.items()]
    command = (
        f"cd {shlex.quote(str(ROOT))} && {shlex.join(['env', '-i', *assignments, *words])}; echo {DONE}$?"
    )
    with tempfile.TemporaryDirectory() as folder:
        initramfs = Path(folder) / "initramfs.gz"
        init = INIT.format(modules=" ".join(needed), command=shlex.quote(command))
        pack_initramfs(initramfs, init, {f"modules/{name}.ko": path for name, path in needed.items()})
        machine = [
            *("qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "1G"),
            *("-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"),
            *("-kernel", str(next(tree.glob("boot/vmlinuz-*"))), "-initrd", str(initramfs)),
            *("-append", "console=ttyS0 quiet panic=-1"),
            *("-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"),
        ]
        run = subprocess.run(
            machine,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
        )
    print(run.stdout)
    ended = re.search(rf"^{DONE}(\d+)", run.stdout, re.MULTILINE)
    return int(ended[1]) if ended else 1


def main() -> int:
    """Run the tests, here or in the emulated machine."""
    if os.access(DEVICE, os.R_OK | os.W_OK):
        return subprocess.run([sys.executable, *TESTS], cwd=ROOT, check=False).returncode
    try:
        return emulate()
    except CannotBuildError as exc:
        print(exc, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
