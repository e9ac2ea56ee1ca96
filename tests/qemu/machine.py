"""QEMU machines with the tiny guest: started as docs/qemu.md says, looked at from outside, ended."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from qemu.qmp import ConnectError
from qemu.qmp.legacy import QEMUMonitorProtocol, QMPReturnValue

from tests.qemu.image import Image

__all__ = ["ANONYMOUS", "MIB", "TURN", "Machine", "boot_flags", "counts", "flags", "machine", "wait_until"]

MIB = 256  # the memory of a machine unless a test asks for another
TURN = 25  # counts in which the guest writes, and checks, its whole working set

#: The stream of QEMU's device state without what differs between two machines that are alike.
ALIKE = ("send-configuration", "store-global-state", "send-section-footer")
SHARED = "memory-backend-memfd,id=ram,size={mib}M,share=on"
ANONYMOUS = "memory-backend-ram,id=ram,size={mib}M"


def flags(machine_type: str = "pc", mib: int = MIB, backend: str = SHARED) -> list[str]:
    """Return the flags that make a machine: the same for a source and for its destination."""
    return [
        *("-machine", f"{machine_type},memory-backend=ram,suppress-vmdesc=on"),
        *("-object", backend.format(mib=mib)),
        *("-m", f"{mib}M"),
        *("-accel", "tcg", "-cpu", "qemu64"),
        *("-nodefaults", "-display", "none", "-no-reboot"),
        *(word for name in ALIKE for word in ("-global", f"migration.{name}=off")),
    ]


def wait_until(what: str, holds: Callable[[], bool], timeout_s: float = 60) -> None:
    """Wait until ``holds()``. Raises `TimeoutError` that names ``what``."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(0.02)


class Machine:
    """A QEMU process: ``pid``, its QMP socket ``qmp`` for migstream, and a second one of our own."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.process = process
        self.pid = process.pid
        self.qmp = folder / "qmp"
        self._serial = folder / "serial"
        self._log = folder / "log"
        self._monitor = QEMUMonitorProtocol(str(folder / "monitor"))
        try:
            wait_until("QEMU's monitor", self._listens)
        except BaseException:
            self.end()
            raise

    def _listens(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"QEMU ended at once: {self._log.read_text()}")
        if not (self._serial.parent / "monitor").exists():
            return False
        with contextlib.suppress(ConnectError, OSError):  # the socket is there before QEMU listens at it
            self._monitor.connect()
            return True
        return False

    def command(self, name: str, **arguments: object) -> QMPReturnValue:
        """Run a QMP command over the second monitor; raises `qemu.qmp.ExecuteError`."""
        return self._monitor.cmd(name, **arguments)

    @property
    def status(self) -> str:
        """QEMU's run state: ``running``, ``paused``, ``inmigrate``."""
        found = self.command("query-status")
        assert isinstance(found, dict)
        return str(found["status"])

    def save(self, path: Path) -> None:
        """Move the guest into a file by QEMU's own migration; it is stopped here from then on."""
        self.command("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
        self.command("migrate", uri=f"exec:cat > {path}")
        self.wait_for_migration()

    def load(self, path: Path) -> None:
        """Take a guest over that `save` has written; it is paused."""
        self.command("migrate-incoming", uri=f"exec:cat {path}")
        self.wait_for_migration()

    def wait_for_migration(self) -> None:
        """Wait until QEMU's own migration is over. Raises `RuntimeError` if it has failed."""
        wait_until("QEMU's migration", lambda: self._migration() in {"completed", "failed"})
        if self._migration() == "failed":
            raise RuntimeError(f"QEMU's own migration failed: {self._log.read_text()}")

    def _migration(self) -> str:
        found = self.command("query-migrate")
        assert isinstance(found, dict)
        return str(found.get("status", ""))

    def events(self) -> list[tuple[str, float]]:
        """Return the QMP events since the last call: name and the host's time in seconds since the epoch."""
        found = self._monitor.get_events()
        self._monitor.clear_events()
        return [
            (str(event["event"]), event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6)
            for event in found
        ]

    @property
    def serial(self) -> str:
        """What the guest has printed so far. Raises `AssertionError` when it has found corruption."""
        printed = self._serial.read_text(errors="replace").replace("\r", "")
        assert "CORRUPT" not in printed, printed[printed.index("CORRUPT") :]
        return printed

    @property
    def count(self) -> int:
        """The guest's counter as last printed, 0 before that; ten a second of the guest's time."""
        return max(counts(self.serial), default=0)

    def wait_for_count(self, count: int, timeout_s: float = 120) -> None:
        """Wait until the guest has counted to ``count``."""
        wait_until(f"the guest to count to {count}", lambda: self.count >= count, timeout_s)

    def memory(self) -> npt.NDArray[np.uint8]:
        """Return the machine's RAM itself, uint8[n_pages, 4096]: it changes while the machine runs."""
        for name in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(name).startswith("/memfd:memory-backend-memfd"):
                    with name.open("r+b") as file:
                        mapping = mmap.mmap(file.fileno(), 0)
                    return np.frombuffer(mapping, np.uint8).reshape(-1, mmap.PAGESIZE)
        raise LookupError(f"QEMU {self.pid} has no RAM in a memfd")

    @property
    def tracked(self) -> list[str]:
        """What of a dirty tracker is left at the process: descriptors of userfaultfd, a tracer."""
        links = []
        for name in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                links.append(os.readlink(name))
        status = Path(f"/proc/{self.pid}/status").read_text()
        maps = Path(f"/proc/{self.pid}/smaps").read_text()
        return [
            *(link for link in links if "userfaultfd" in link),
            *re.findall(r"^TracerPid:\t[1-9].*", status, re.MULTILINE),
            *re.findall(r"^VmFlags:.* u[wm] .*", maps, re.MULTILINE),
        ]

    def kill(self) -> None:
        """End the process as a fault does: by SIGKILL, at once."""
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError, EOFError):
            self._monitor.close()
        self.kill()


def counts(printed: str) -> list[int]:
    """Return the counter's values in what a guest has printed."""
    return [int(n) for n in re.findall(r"^COUNT (\d+)$", printed, re.MULTILINE)]


@contextlib.contextmanager
def machine(folder: Path, options: Sequence[str]) -> Iterator[Machine]:
    """Start QEMU with ``options``, its files in ``folder``; end it on leaving."""
    folder.mkdir(parents=True)
    command = [
        "qemu-system-x86_64",
        *options,
        *("-qmp", f"unix:{folder}/qmp,server=on,wait=off"),
        *("-qmp", f"unix:{folder}/monitor,server=on,wait=off"),
        *("-serial", f"file:{folder}/serial"),
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    started = Machine(process, folder)
    try:
        yield started
    finally:
        started.end()


def boot_flags(image: Image, *, rate: int = 10) -> list[str]:
    """Return the flags that boot the tiny guest; ``rate``: MiB that it writes a second."""
    words = f"console=ttyS0 quiet panic=-1 random.trust_cpu=on dirty_rate={rate}"
    return ["-kernel", str(image.kernel), "-initrd", str(image.initramfs), "-append", words]
