"""A QEMU machine to restore to: one like the saved one, started with ``-incoming defer``.

Pages go straight into the RAM that the machine shares; when the stream is complete, QEMU loads its device
state by its own incoming migration. From then on the machine is paused, until `start`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from migstream.bitmap import PfnBitmap
from migstream.errors import FormatError, GuestError, UnsettledError
from migstream.guests.page_book import PageBook
from migstream.guests.protocols import PAGE_SHIFT, RestoredRings
from migstream.guests.qemu import device_state
from migstream.guests.qemu.client import QmpClient, QmpCommandError, QmpLostError
from migstream.guests.qemu.machine import check_same, look_at, run_state
from migstream.guests.qemu.ram_file import RamFile
from migstream.records import Record
from migstream.records.libxc import GuestType, Origin
from migstream.records.libxl import EmulatorContext

__all__ = ["QemuTarget"]

LOAD_S = 60.0  # loading takes milliseconds; a QEMU that is not done by then never will be
POLL_S = 0.05  # to ask whether QEMU is still there, if it tells nothing


class QemuTarget(PageBook):
    """The machine behind the QMP socket at ``path``, as a `RestoreTarget`; it `TakesEmulator`, and `Starts`.

    ``pid`` is QEMU's process where the socket does not tell. Close it, or use it as a context manager.
    """

    def __init__(self, path: str, *, pid: int | None = None) -> None:
        """Connect, and look whether the machine waits for a migration. Raises `GuestError`."""
        with ExitStack() as opened:
            self.qmp = opened.enter_context(QmpClient(path))
            state = run_state(self.qmp)
            if state != "inmigrate":
                raise GuestError(
                    f"{path}: QEMU's machine is in the state {state!r} and takes no guest; start it with "
                    "-incoming defer, and restore to it once"
                )
            # While QEMU waits, this only means: do not run by yourself when the guest is complete.
            self.qmp.execute("stop")
            self.qmp.execute(
                "migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}]
            )
            self._incoming = os.memfd_create("migstream-device-state")
            opened.callback(os.close, self._incoming)
            # Given beforehand: a guest that stands still meanwhile should not wait for it.
            self.qmp.give_fd(self._incoming, "migstream")
            self.machine = look_at(self.qmp)
            self._ram = opened.enter_context(
                RamFile(pid or self.qmp.peer_pid, self.machine.address, self.machine.ram.size, writable=True)
            )
            self._opened = opened.pop_all()
        super().__init__(self.machine.ram.max_pfn + 1)
        self._origin: Origin | None = None
        self._loaded = False

    @property
    def guest_type(self) -> GuestType:
        """HVM."""
        return GuestType.HVM

    @property
    def vcpu_limit(self) -> int:
        """The machine's processors."""
        return self.machine.vcpus

    def apply(self, record: Record) -> None:
        """Take ORIGIN, refuse one of another machine, and clear the memory of this one.

        All other records are of Xen's domains, and refused.
        """
        if not isinstance(record, Origin):
            raise GuestError(f"a QEMU machine has no use for {record.type}: the stream is of a Xen domain")
        try:
            check_same(self.machine, record)
        except FormatError as exc:
            raise GuestError(f"ORIGIN does not say what it is of: {exc.message}") from exc
        if self._origin is None:
            # The stream has no page for what is zeros. Cleared now, and not when the guest waits for it.
            self._ram.clear(0, self.machine.ram.size >> PAGE_SHIFT)
        self._origin = record

    # Pages

    def populate(self, pfns: npt.NDArray[np.uint64]) -> None:
        """Note that the stream brings ``pfns``. Raises `GuestError` for what is no RAM of the machine."""
        self._check_origin()
        self.machine.ram.file_pages(pfns)
        super().populate(pfns)

    def pages(self, pfns: npt.NDArray[np.uint64]) -> Sequence[memoryview]:
        """Return the machine's own memory."""
        return self._ram.memory.views(self.machine.ram.file_pages(pfns))

    def take_run(self, first_pfn: int, count: int, type: int) -> memoryview:
        """Return the machine's own memory of a run of ordinary pages."""
        self._check_origin()
        file_page = self.machine.ram.file_page_of_run(first_pfn, count)
        if file_page is None:
            raise GuestError(
                f"PFNs {first_pfn:#x} to {first_pfn + count - 1:#x} are not all RAM of the QEMU machine, "
                f"which has {self.machine.ram}"
            )
        self.book_run(first_pfn, count, type)
        return self._ram.memory.run(file_page, count)

    def localise(self, level: int, page: memoryview) -> None:
        """Leave page tables alone: an HVM guest's are its own."""

    def clean_dirty_log(self, into: PfnBitmap) -> None:
        """Empty ``into``: the machine does not run before it is complete."""
        into.clear()

    def _check_origin(self) -> None:
        if self._origin is None:
            raise GuestError(
                "the stream names no origin (ORIGIN record), so it is of a Xen domain, whose processors and "
                "devices QEMU cannot take over; a memory image of it is made by restoring to raw:FILE"
            )

    # The end

    def complete(self) -> RestoredRings:
        """Do nothing more: all else has to wait for the emulator's state."""
        self._check_origin()
        return RestoredRings(None, None)

    def take_emulator(self, record: Record) -> None:
        """Let QEMU load its device state, and wait until it has. Raises `GuestError` with QEMU's reason."""
        if not isinstance(record, EmulatorContext) or self._loaded:
            return
        self._check_origin()
        with open(self._incoming, "wb", closefd=False) as incoming:
            incoming.write(device_state.fitted(record.emulator_ctx, self.machine))
        os.lseek(self._incoming, 0, os.SEEK_SET)  # QEMU reads where its copy of the descriptor stands
        try:
            self.qmp.execute("migrate-incoming", uri="fd:migstream")
            self._wait_until_loaded()
        except QmpCommandError as exc:
            raise GuestError(f"{exc}; start QEMU with -incoming defer") from exc
        except QmpLostError as exc:
            raise GuestError(
                f"{self.qmp.path}: QEMU ended while it loaded the device state, as it does when the state "
                "does not fit the machine; it says why on its standard error. Start both machines with "
                "the same devices, and restore again"
            ) from exc
        self._loaded = True

    def _wait_until_loaded(self) -> None:
        deadline = time.monotonic() + LOAD_S
        while (status := self.qmp.await_migration_event(POLL_S)) != "completed":
            if status not in (None, "failed"):
                continue  # on its way
            progress = self.qmp.query("query-migrate")
            status = str(progress.get("status"))
            if status == "completed":
                return
            if status == "failed":
                raise GuestError(
                    "QEMU could not load the device state: "
                    f"{progress.get('error-desc', 'it gives no reason')}; start both machines with the same "
                    "devices"
                )
            if time.monotonic() > deadline:
                raise GuestError(f"QEMU has not loaded the device state in {LOAD_S:g} s; it is {status!r}")

    def start(self) -> None:
        """Let the machine run.

        Raises `GuestError` if it is not complete, or QEMU refuses, and `UnsettledError` if it may have run.
        """
        if not self._loaded:
            raise GuestError("the stream brought no device state (EMULATOR_CONTEXT) to run the guest with")
        try:
            self.qmp.execute("cont")
            state = "running" if self.qmp.running else run_state(self.qmp)
        except QmpLostError as exc:
            raise UnsettledError(f"{exc}; whether its machine runs is not known") from exc
        if state != "running":
            raise UnsettledError(f"QEMU's machine was started, and is in the state {state!r}")

    def close(self) -> None:
        """Disconnect; the machine stays as it is. Closing twice is harmless."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
