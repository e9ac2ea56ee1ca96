"""A QEMU that is none: a thread of this process that answers QMP, with RAM of this process for a machine's.

It says what QEMU 7.2 says (the texts of its human monitor were taken from one), as far as migstream asks.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

__all__ = ["DEVICES", "FakeQemu", "Refused"]

DEVICES = b"QEVM\0\0\0\3" + b"\4the devices\0"
BIOS = bytes(range(256)) * 16 + bytes(4096)

MTREE = """\
FlatView #0
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan

FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): ram
  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem
  00000000000c0000-00000000000fffff (prio 0, rom): ram @00000000000c0000
  0000000000100000-{last:016x} (prio 0, ram): ram @0000000000100000
  00000000ffffe000-00000000ffffffff (prio 0, rom): pc.bios
"""
RAMBLOCK = """\
              Block Name    PSize              Offset               Used              Total
                     ram    4 KiB  0x0000000000000000 0x{size:016x} 0x{size:016x}
    /rom@etc/acpi/tables    4 KiB  0x0000000010080000 0x0000000000020000 0x0000000000200000
                 pc.bios    4 KiB  0x0000000010000000 0x0000000000002000 0x0000000000002000
"""
SETTINGS = """\
globals:
store-global-state: on
only-migratable: off
send-configuration: {configuration}
send-section-footer: {footer}
"""


class Refused(Exception):
    """What a command answers with instead of a value."""


class FakeQemu:
    """Listens at ``path``. ``answers`` are values for commands, or functions of their arguments.

    ``status`` is the run state, ``commands`` what was asked, in order, and ``loaded`` the device state that a
    migration brought.
    """

    def __init__(
        self, folder: Path, *, mib: int = 4, status: str = "running", settings: tuple[str, str] = ("on", "on")
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.path = str(folder / "qmp")
        self.status = status
        self.commands: list[str] = []
        self.loaded: bytes | None = None
        self.migration: dict[str, str] = {}
        self._fds: list[int] = []
        self._connection: socket.socket | None = None
        fd = os.memfd_create("fake-ram")
        os.ftruncate(fd, mib << 20)
        self._mapping = mmap.mmap(fd, mib << 20)
        os.close(fd)
        self.memory = np.frombuffer(self._mapping, np.uint8).reshape(-1, 4096)
        self._bios = np.frombuffer(BIOS, np.uint8).copy()
        size = mib << 20
        self.answers: dict[str, Any] = {
            "qmp_capabilities": {},
            "query-version": {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": "Fake"},
            "query-status": lambda _: {"status": self.status, "running": self.status == "running"},
            "query-migrate": lambda _: self.migration,
            "query-memory-size-summary": {"base-memory": size, "plugged-memory": 0},
            "query-kvm": {"enabled": False},
            "query-cpus-fast": [{"qom-path": "/machine/cpu"}],
            "qom-get": lambda given: self.properties[given["path"], given["property"]],
            "human-monitor-command": lambda given: self.texts[given["command-line"]],
            "stop": lambda _: self.become("paused" if self.status == "running" else self.status),
            "cont": lambda _: self.become("running"),
            "migrate-set-capabilities": {},
            "add-fd": {"fdset-id": 3, "fd": 9},
            "getfd": {},
            "remove-fd": {},
            "xen-save-devices-state": lambda _: self._save(),
            "migrate-incoming": lambda _: self._load(),
        }
        self.properties: dict[tuple[str, str], object] = {
            ("/machine", "type"): "pc-i440fx-7.2-machine",
            ("/machine", "memory-backend"): "/objects/ram",
            ("/objects/ram", "share"): True,
            ("/machine/cpu", "type"): "qemu64-x86_64-cpu",
        }
        address, bios = self.memory.ctypes.data, self._bios.ctypes.data
        self.texts: dict[str, str] = {
            "gpa2hva 0": f"Host virtual address for 0x0 (ram) is {address:#x}\r\n",
            "gpa2hva 0xffffe000": f"Host virtual address for 0x0 (pc.bios) is {bios:#x}\r\n",
            "info mtree -f": MTREE.format(last=size - 1).replace("\n", "\r\n"),
            "info ramblock": RAMBLOCK.format(size=size).replace("\n", "\r\n"),
            "info migrate": SETTINGS.format(configuration=settings[0], footer=settings[1]),
        }
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def become(self, status: str) -> dict[str, object]:
        """Change to the run state ``status``, with the event that tells of it."""
        was, self.status = self.status == "running", status
        if was != (status == "running"):
            self._tell({"event": "STOP" if was else "RESUME"})
        return {}

    def _tell(self, event: dict[str, object]) -> None:
        if self._connection is not None:
            stamped = {**event, "timestamp": {"seconds": 0, "microseconds": 0}}
            self._connection.sendall(json.dumps(stamped).encode() + b"\r\n")

    def _save(self) -> dict[str, object]:
        os.write(self._fds[-1], DEVICES)
        return {}

    def _load(self) -> dict[str, object]:
        self.loaded = os.read(self._fds[-1], 1 << 20)
        self.migration = {"status": "completed"}
        self._tell({"event": "MIGRATION", "data": {"status": "active"}})
        self.become("paused")
        self._tell({"event": "MIGRATION", "data": self.migration})
        return {}

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                self._connection = connection
                self._talk(connection)
            self._connection = None
            for fd in self._fds:
                os.close(fd)
            self._fds = []

    def _talk(self, connection: socket.socket) -> None:
        connection.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\r\n')
        octets = b""
        while True:
            received, fds, _, _ = socket.recv_fds(connection, 1 << 16, 4)
            self._fds += fds
            if not received:
                return
            octets += received
            while b"\n" in octets or octets.rstrip().endswith(b"}"):
                line, _, octets = octets.partition(b"\n")
                message = json.loads(line)
                answer = self._answer(message["execute"], message.get("arguments", {}))
                if answer is None:
                    return
                connection.sendall(json.dumps({**answer, "id": message.get("id")}).encode() + b"\r\n")

    def _answer(self, command: str, arguments: dict[str, object]) -> dict[str, object] | None:
        self.commands.append(command)
        found: object | Callable[[dict[str, object]], object] = self.answers[command]
        try:
            return {"return": found(arguments) if callable(found) else found}
        except Refused as exc:
            return {"error": {"class": "GenericError", "desc": str(exc)}}
        except ConnectionAbortedError:  # QEMU ends
            return None
