"""The sending end of a migration between hosts.

Theory of operation. The guest has one owner at any moment, whatever breaks:

    connect, TLS, OFFER, ACCEPT     the source owns the guest
    the stream                      it runs here until the save engine suspends it
    LOADED                          complete at the destination, which does not run it
    GO                              from here on the destination owns it
    RUNNING                         done

What fails before GO has left lets the guest run on here, and the receiver, who has no GO, discards its own.
Behind GO only the receiver's own word, FAILED, gives it back. A connection that breaks between GO and
RUNNING leaves the guest suspended here, because nobody can know: `HandoverError`. It never runs twice.

The order is that of ``xl migrate`` (tools/xl/xl_migrate.c); its banner and reports are not used.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from migstream.engines.save import SaveResult
from migstream.errors import GuestError, MigstreamError
from migstream.guests.protocols import SaveSource
from migstream.text import decode
from migstream.transport.address import Address, TcpAddress, connect
from migstream.transport.errors import (
    ConnectionLostError,
    HandoverError,
    ProtocolError,
    RemoteError,
    TlsError,
)
from migstream.transport.framing import ChunkWriter
from migstream.transport.link import Link
from migstream.transport.messages import (
    Accept,
    Checksum,
    Compression,
    Framing,
    Go,
    GuestState,
    Loaded,
    Offer,
    Running,
)
from migstream.transport.pump import outgoing
from migstream.transport.tls import Tls, load, secured

__all__ = ["Saver", "SendResult", "send"]

ANSWER_S = 60.0  # for the receiver to accept, who may have to open a guest first

#: What writes the stream: called with the descriptor, and with what suspends the guest, which has to be
#: `SaveCallbacks.suspend`: downtime counts from its call.
Saver = Callable[[int, Callable[[], int]], SaveResult]


@dataclass(frozen=True)
class SendResult:
    """What a migration did, as the sender knows it.

    ``wire_octets`` went over the connection, TLS's own aside; ``downtime_s`` passed between the request to
    suspend the guest and the word that it runs at the destination; ``state`` is what became of it there.
    ``warnings`` are those of both ends.
    """

    save: SaveResult
    state: GuestState
    pages_received: int
    wire_octets: int
    seconds: float
    downtime_s: float
    warnings: list[str]

    def to_json(self) -> dict[str, object]:
        """Return the fields of the save, overridden by those of the migration."""
        return {
            **self.save.to_json(),
            "destination": self.state.name.lower(),
            "pages_received": self.pages_received,
            "wire_octets": self.wire_octets,
            "seconds": self.seconds,
            "downtime_s": self.downtime_s,
            "warnings": self.warnings,
        }


def send(
    source: SaveSource,
    address: Address,
    save: Saver,
    *,
    level: int | None = None,
    checksum: bool = False,
    tls: Tls | None = None,
    timeout_s: float | None = None,
) -> SendResult:
    """Migrate ``source`` to the receiver at ``address``; at the end it is suspended for good.

    ``level`` compresses the stream by zstd, ``checksum`` guards it by CRC-32C, ``tls`` encrypts all.
    ``timeout_s`` bounds each wait for the other end; without it a dead host is noticed in half a minute.

    Raises `HandoverError` where the guest was given up but may not run, and it stays suspended. On any
    other error it runs on: `RemoteError` with the receiver's reason, `ConnectionLostError`, `TlsError`,
    `ProtocolError`, `DeadlineError`, and what ``save`` raises.
    """
    started = time.monotonic()
    stopped_at = 0.0

    def suspend() -> int:
        nonlocal stopped_at
        stopped_at = time.monotonic()
        source.suspend()
        return 1

    ran_before = not source.suspended
    given_up = False
    try:
        with _link(address, tls, timeout_s) as link:
            _offer(link, source, level=level, checksum=checksum)
            framed = link.is_tls or checksum or level is not None
            writer = ChunkWriter(level=level, checksum=checksum) if framed else None
            with outgoing(link, writer) as fd:
                saved = save(fd, suspend)
            loaded = link.receive(Loaded, "the guest was loaded there")
            given_up = True  # beforehand: an interrupt may come between the two
            try:
                link.send(Go())
            except MigstreamError:
                given_up = False  # not a whole GO has left
                raise
            running = _running(link)
            ended = time.monotonic()
    except BaseException as exc:
        # Behind GO only the receiver's own word gives the guest back: it does not run there, and never will.
        if ran_before and (not given_up or isinstance(exc, RemoteError)):
            _resume(source, exc)
        raise
    return SendResult(
        saved,
        GuestState(running.state),
        loaded.pages,
        link.sent if writer is not None else link.sent + saved.octets,
        ended - started,
        ended - (stopped_at or started),
        saved.warnings + decode(loaded.warnings).splitlines(),
    )


def _resume(source: SaveSource, failure: BaseException) -> None:
    """Let the guest run on; say so with ``failure`` if that is not possible."""
    try:
        if source.suspended:
            source.resume()
    except GuestError as exc:
        if str(exc) != str(failure):
            raise GuestError(f"{failure}; and the guest could not be resumed here: {exc}") from failure


def _link(address: Address, tls: Tls | None, timeout_s: float | None) -> Link:
    """Connect, and shake hands if there is to be TLS."""
    peer = f"the destination at {address}"
    context = None if tls is None else load(tls, server=False)
    name = (tls.name if tls else None) or (address.host if isinstance(address, TcpAddress) else None)
    if context is not None and name is None:
        raise TlsError(
            f"{address} has no host name that a certificate could be checked against: give --tls-name"
        )
    sock = connect(address, timeout_s)
    try:
        if context is not None:
            sock = secured(sock, context, peer, server=False, name=name)
        return Link(sock, peer=peer, timeout_s=timeout_s)
    except BaseException:
        sock.close()
        raise


def _offer(link: Link, source: SaveSource, *, level: int | None, checksum: bool) -> None:
    compression = Compression.NONE if level is None else Compression.ZSTD
    guard = Checksum.CRC32C if checksum else Checksum.NONE
    framed = link.is_tls or compression or guard
    offer = Offer(
        framing=Framing.CHUNKS if framed else Framing.BARE,
        compression=compression,
        checksum=guard,
        guest_type=source.guest_type,
    )
    with link.within(link.timeout_s or ANSWER_S):
        try:
            link.send(offer)
            link.receive(Accept, "the migration was offered")
        except ConnectionLostError as exc:
            raise link.explained(exc) from exc


def _running(link: Link) -> Running:
    """Return the receiver's last word. Whatever but FAILED comes instead: `HandoverError`."""
    try:
        running = link.receive(Running, "the guest was started there")
        if running.state not in set(GuestState):
            raise ProtocolError(f"{link.peer} says that the guest is in state {running.state}, which is none")
        return running
    except RemoteError:
        raise
    except (MigstreamError, KeyboardInterrupt) as exc:
        raise HandoverError(
            f"the guest was handed over, but {link.peer} has not said that it runs: "
            f"{str(exc) or 'interrupted'}. It stays suspended "
            "here, so that it never runs twice. Look there: if it runs, end it here; if it does not, "
            "destroy it there and resume it here"
        ) from exc
