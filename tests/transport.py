"""What the tests of migrations between hosts share: both ends in one process, and a wire that can be cut."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from migstream.engines.machine import save_machine
from migstream.engines.policies import PrecopyPolicy
from migstream.engines.restore import RestoreResult, restore
from migstream.engines.save import SaveCallbacks
from migstream.errors import MigstreamError
from migstream.guests.model import ModelGuest
from migstream.guests.protocols import RestoreTarget
from migstream.records.libxc import GuestType
from migstream.transport.address import Address, TcpAddress, listen
from migstream.transport.receive import ReceiveResult, receive
from migstream.transport.send import SendResult, send
from migstream.transport.tls import Tls

LOOPBACK = TcpAddress("127.0.0.1", 0)
JOIN_S = 20.0  # a test that hangs fails by then


class StartingGuest(ModelGuest):
    """A model that runs once it is restored, and says so."""

    started = False
    start_fails: BaseException | None = None

    def start(self) -> None:
        if self.start_fails is not None:
            raise self.start_fails
        self.started = True


@dataclass
class Receiver:
    """A receiver in a thread: what it returned or raised, and whom it ignored."""

    address: Address
    result: ReceiveResult | None = None
    error: BaseException | None = None
    ignored: list[str] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)


@contextlib.contextmanager
def receiving(
    target: RestoreTarget,
    address: Address = LOOPBACK,
    *,
    context: ssl.SSLContext | None = None,
    timeout_s: float | None = None,
    paused: bool = False,
    opening: Callable[[], None] = lambda: None,
    restoring: Callable[[RestoreTarget, int], RestoreResult] | None = None,
) -> Iterator[Receiver]:
    """Receive into ``target`` while the block runs; at its end the receiver has ended."""

    @contextlib.contextmanager
    def open_target(_: GuestType) -> Iterator[RestoreTarget]:
        opening()
        yield target

    with listen(address) as (listener, bound):
        receiver = Receiver(bound)

        def run() -> None:
            try:
                receiver.result = receive(
                    listener,
                    open_target,
                    restoring or partial(restore, timeout_s=timeout_s),
                    context=context,
                    timeout_s=timeout_s,
                    paused=paused,
                    ignored=lambda peer, error: receiver.ignored.append(str(error)),
                    accepted=receiver.accepted.append,
                )
            except BaseException as exc:
                receiver.error = exc

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield receiver
        finally:
            thread.join(JOIN_S)
            if thread.is_alive():  # a receiver that nobody called: wake it up
                with contextlib.suppress(OSError):
                    listener.shutdown(socket.SHUT_RDWR)
                thread.join(JOIN_S)
            assert not thread.is_alive(), "the receiver hangs"


def sending(
    source: ModelGuest,
    address: Address,
    *,
    policy: PrecopyPolicy | None = None,
    level: int | None = None,
    checksum: bool = False,
    tls: Tls | None = None,
    timeout_s: float | None = None,
) -> SendResult:
    """Migrate ``source`` live to ``address``."""
    return send(
        source,
        address,
        lambda fd, suspend: save_machine(
            source,
            fd,
            live=True,
            timeout_s=timeout_s,
            callbacks=SaveCallbacks(suspend=suspend, precopy_policy=policy),
        ),
        level=level,
        checksum=checksum,
        tls=tls,
        timeout_s=timeout_s,
    )


def attempt(source: ModelGuest, address: Address, **options: object) -> SendResult | MigstreamError:
    """Return what `sending` returns or raises."""
    try:
        return sending(source, address, **options)  # type: ignore[arg-type]  # its own keywords
    except MigstreamError as exc:
        return exc


def connected(address: Address) -> socket.socket:
    """Return a connection to a TCP address, to say anything over it."""
    assert isinstance(address, TcpAddress)
    return socket.create_connection((address.host, address.port))


@contextlib.contextmanager
def wire(
    to: Address,
    *,
    forth: int | None = None,
    back: int | None = None,
    damage: int | None = None,
) -> Iterator[TcpAddress]:
    """A connection to ``to`` that is cut by the octet behind so many of either direction.

    ``damage`` is the offset, in the direction of the stream, of an octet that arrives changed.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def carry() -> None:
            near, _ = listener.accept()
            with near, connected(to) as far:
                _carry(near, far, {near: forth, far: back}, damage)

        thread = threading.Thread(target=carry)
        thread.start()
        try:
            yield TcpAddress(*listener.getsockname())
        finally:
            thread.join(JOIN_S)
            assert not thread.is_alive(), "the wire hangs"


def _carry(
    near: socket.socket, far: socket.socket, left: dict[socket.socket, int | None], damage: int | None
) -> None:
    """Move octets both ways until an end closes, or the budget of a direction is exceeded."""
    at = 0
    while True:
        for sock in select.select([near, far], [], [], JOIN_S)[0]:
            budget = left[sock]
            try:
                octets = bytearray(sock.recv(1 << 16))
                if sock is near:
                    if damage is not None and at <= damage < at + len(octets):
                        octets[damage - at] ^= 1
                    at += len(octets)
                (far if sock is near else near).sendall(octets[:budget])
            except OSError:
                if sock is near:  # the far end has gone: its last words come before that, as on a real wire
                    with contextlib.suppress(OSError):
                        near.sendall(far.recv(1 << 16)[: left[far]])
                return
            if not octets or (budget is not None and len(octets) > budget):
                return
            if budget is not None:
                left[sock] = budget - len(octets)
