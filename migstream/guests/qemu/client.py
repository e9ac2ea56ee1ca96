"""QMP, synchronously: a face over the `qemu.qmp` library, whose asyncio loop runs in a thread of its own.

A command takes about a millisecond, most of it the library's. So whether the machine runs is not asked again
and again but followed by QEMU's events, and whoever waits for something waits for its event.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from migstream.errors import GuestError

if TYPE_CHECKING:
    from qemu.qmp import QMPClient

__all__ = ["QmpClient", "QmpCommandError", "QmpLostError"]

T = TypeVar("T")

_CHANGES = {"STOP": False, "RESUME": True}  # events -> whether the machine runs from there on
GREETING_S = 5.0  # QEMU greets at once, unless somebody else is connected: it serves one client a socket
ANSWER_S = 60.0  # the slowest command writes the device state, in milliseconds
_UCRED = struct.Struct("iII")  # pid, uid, gid: struct ucred of socket(7)


class QmpCommandError(GuestError):
    """QEMU refused a command; ``reason`` is what it says."""

    def __init__(self, command: str, reason: str) -> None:
        super().__init__(f"QEMU refuses {command}: {reason}")
        self.reason = reason


class QmpLostError(GuestError):
    """QEMU closed the QMP connection: it has ended, or it hangs."""


class QmpClient:
    """A connection to the QMP socket at ``path``. Close it, or use it as a context manager.

    ``peer_pid`` is the process that made the socket: QEMU, unless something else opened it for QEMU.
    Methods may be called from any thread.
    """

    def __init__(self, path: str, *, greeting_s: float = GREETING_S) -> None:
        """Connect. Raises `GuestError`, also where the library is not installed."""
        try:
            from qemu.qmp import EventListener, QMPClient, QMPError
        except ImportError as exc:
            raise GuestError(
                "QEMU machines need the library qemu.qmp: pip install 'migstream[qemu]'"
            ) from exc
        self.path = path
        sock = _connect(path)
        self.peer_pid: int = _UCRED.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        )[0]
        self._client: QMPClient = QMPClient("migstream")
        # What it cannot do, it raises; its log would tell the user the same a second time.
        self._client.logger.disabled = True
        self._running: bool | None = None  # as far as was asked and heard
        self._changes = EventListener(tuple(_CHANGES))
        self._migrations = EventListener("MIGRATION")
        self._client.register_listener(self._changes)
        self._client.register_listener(self._migrations)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="qmp", daemon=True)
        self._thread.start()
        try:
            self._run(self._client.connect(sock), greeting_s)
        except TimeoutError:
            self._stop_loop()
            raise GuestError(
                f"{path}: QEMU does not greet within {greeting_s:g} s: it serves one client a socket, so "
                "another save or monitor of this machine is connected, or QEMU hangs; end that one, or give "
                "QEMU a second -qmp socket"
            ) from None
        except (QMPError, OSError, EOFError) as exc:
            self._stop_loop()
            raise GuestError(f"{path} does not speak QMP: {exc}; name the socket of QEMU's -qmp") from exc
        except BaseException:
            self._stop_loop()
            raise

    def execute(self, command: str, **arguments: object) -> object:
        """Run ``command``; in the names of arguments, ``_`` stands for ``-``. Return what QEMU returns.

        Raises `QmpCommandError` with QEMU's own text, `QmpLostError`.
        """
        return self._execute(command, self._call(command, arguments, None))

    def query(self, command: str) -> dict[str, object]:
        """Run ``command``, whose answer is an object."""
        answer = self.execute(command)
        if not isinstance(answer, dict):
            raise GuestError(f"QEMU answers {command} with {type(answer).__name__}, not with an object")
        return answer

    @property
    def running(self) -> bool:
        """Whether the machine runs: as QEMU says when asked first, and by its events from there on.

        An event counts as soon as the next answer has come. Raises `QmpLostError` when QEMU is gone.
        """
        from qemu.qmp import Runstate

        if self._running is None:
            self._running = bool(self.query("query-status").get("running"))
        if self._client.runstate is not Runstate.RUNNING:
            raise self._lost("it told whether its machine runs")
        for event in self._changes.clear():
            self._running = _CHANGES[str(event["event"])]
        return self._running

    def await_migration_event(self, timeout_s: float) -> str | None:
        """Return the status in the next MIGRATION event, ``None`` if none comes within ``timeout_s``.

        There are such events where the migration capability ``events`` is on.
        """
        try:
            event = self._run(self._migrations.get(), timeout_s)
        except TimeoutError:
            return None
        data = event.get("data")
        return str(data.get("status")) if isinstance(data, dict) else None

    def monitor(self, line: str) -> str:
        """Run a line of QEMU's human monitor: what QMP has no command for."""
        return str(self.execute("human-monitor-command", command_line=line)).replace("\r\n", "\n")

    def property(self, path: str, name: str) -> object:
        """Return the property ``name`` of the object at ``path`` in QEMU's tree."""
        return self.execute("qom-get", path=path, property=name)

    def give_fd(self, fd: int, name: str) -> None:
        """Give QEMU a copy of ``fd``, which it knows by ``name`` from here on."""
        self._execute("getfd", self._call("getfd", {"fdname": name}, fd))

    @contextmanager
    def lent_fd(self, fd: int) -> Iterator[str]:
        """Lend QEMU a copy of ``fd``; the value is the file name under which its commands open it."""
        answer = self._execute("add-fd", self._call("add-fd", {}, fd))
        number = answer["fdset-id"] if isinstance(answer, dict) else answer
        try:
            yield f"/dev/fdset/{number}"
        finally:
            with suppress(GuestError):  # QEMU drops it when the connection ends, at the latest
                self.execute("remove-fd", fdset_id=number)

    def close(self) -> None:
        """Close the connection. Closing twice is harmless."""
        if self._thread.is_alive():
            # What QEMU did to the connection does not matter any more.
            with suppress(Exception):
                self._run(self._client.disconnect(), GREETING_S)
            self._stop_loop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _call(self, command: str, arguments: dict[str, object], fd: int | None) -> object:
        if fd is not None:
            self._client.send_fd_scm(fd)
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        return await self._client.execute(command, named or None)

    def _execute(self, command: str, call: Coroutine[None, None, object]) -> object:
        from qemu.qmp import ExecuteError, QMPError

        try:
            return self._run(call, ANSWER_S)
        except ExecuteError as exc:
            raise QmpCommandError(command, str(exc)) from None
        except TimeoutError:
            raise QmpLostError(
                f"{self.path}: QEMU does not answer {command} within {ANSWER_S:g} s; it hangs"
            ) from None
        except (QMPError, OSError, EOFError, AssertionError) as exc:
            raise self._lost(f"{command} was done") from exc

    def _lost(self, before: str) -> QmpLostError:
        return QmpLostError(
            f"{self.path}: QEMU is gone, its connection closed before {before}; QEMU's standard error may "
            "say why"
        )

    def _run(self, call: Coroutine[None, None, T], timeout_s: float) -> T:
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(call, timeout_s), self._loop).result()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _connect(path: str) -> socket.socket:
    """Return a socket connected to ``path``. Raises `GuestError` that says what is wrong with it."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(GREETING_S)
        sock.connect(path)
        sock.settimeout(None)
    except OSError as exc:
        sock.close()
        remedy = _REMEDIES.get(type(exc), "name the socket of QEMU's -qmp")
        raise GuestError(f"{path}: {exc.strerror or exc}; {remedy.format(path=path)}") from exc
    return sock


_REMEDIES: dict[type[OSError], str] = {
    FileNotFoundError: "start QEMU with -qmp unix:{path},server=on,wait=off",
    ConnectionRefusedError: "the QEMU that made this socket has ended, or it is no socket; start it again",
    PermissionError: "run migstream as the user that QEMU runs as, or as root",
    TimeoutError: "too many clients wait for this socket; QEMU serves one at a time",
}
