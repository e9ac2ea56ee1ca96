"""The receiving end of a migration between hosts; `send` has the theory of both.

One caller is listened to at a time, for a few seconds: who offers no migration in that time, or cannot be
taken, is told so, reported and forgotten. The first whose offer fits is accepted, and nobody else until the
end.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from migstream.engines.restore import RestoreResult
from migstream.errors import GuestError, MigstreamError
from migstream.guests.protocols import RestoreTarget, Starts
from migstream.records.libxc import GuestType
from migstream.transport.address import TcpAddress
from migstream.transport.errors import ConnectionLostError, ProtocolError, TlsError
from migstream.transport.framing import ChunkReader
from migstream.transport.link import Link
from migstream.transport.messages import (
    MAGIC,
    VERSION,
    Accept,
    Checksum,
    Compression,
    Failed,
    Framing,
    Go,
    GuestState,
    Loaded,
    Offer,
    Refuse,
    Running,
    text,
)
from migstream.transport.pump import incoming
from migstream.transport.tls import TLS_HINT, secured

__all__ = ["ReceiveResult", "receive"]

HANDSHAKE_S = 10.0  # for a caller to say what it wants


@dataclass
class ReceiveResult:
    """What became of the guest, and what the restore did."""

    restore: RestoreResult
    state: GuestState
    warnings: list[str] = field(default_factory=list)


def receive(
    listener: socket.socket,
    open_target: Callable[[GuestType], AbstractContextManager[RestoreTarget]],
    restore: Callable[[RestoreTarget, int], RestoreResult],
    *,
    context: ssl.SSLContext | None = None,
    timeout_s: float | None = None,
    paused: bool = False,
    ignored: Callable[[str, MigstreamError], None] = lambda peer, error: None,
    accepted: Callable[[str], None] = lambda peer: None,
) -> ReceiveResult:
    """Take one migration from ``listener``, which is closed as soon as there is one.

    ``open_target`` makes the guest, of the type that the sender offers; ``restore`` reads the stream from a
    descriptor into it. The guest is started when the sender has given it up, if it is one that `Starts` and
    not to stay ``paused``. ``context`` is `tls.load`'s. ``ignored`` hears of callers who brought no
    migration, and why; ``accepted`` of the one who does. ``timeout_s`` bounds each wait for the sender.

    Raises what ``open_target`` and ``restore`` raise, and `ConnectionLostError`, `DeadlineError`,
    `ProtocolError` or `TlsError` for the connection; the guest then does not run, and is discarded, unless
    the error says otherwise.
    """
    link, offer, peer = _accept(listener, context, timeout_s, ignored)
    with link:
        accepted(peer)
        reception = _Reception(link, offer)
        try:
            with open_target(GuestType(offer.guest_type)) as target:
                return reception.run(target, restore, paused=paused)
        except BaseException as exc:
            # Where the guest may run, only silence is true: it leaves the source suspended.
            if not reception.may_run:
                link.say_last(Failed(reason=text(_reason(exc))))
            raise


class _Reception:
    """One migration coming in. ``may_run``: whether the guest may have started here."""

    def __init__(self, link: Link, offer: Offer) -> None:
        self.link = link
        self.offer = offer
        self.may_run = False

    def run(
        self,
        target: RestoreTarget,
        restore: Callable[[RestoreTarget, int], RestoreResult],
        *,
        paused: bool,
    ) -> ReceiveResult:
        link, offer = self.link, self.offer
        link.send(Accept())
        reader = None
        if offer.framing == Framing.CHUNKS:
            reader = ChunkReader(
                compression=Compression(offer.compression), checksum=Checksum(offer.checksum)
            )
        with incoming(link, reader) as fd:
            restored = restore(target, fd)
        link.send(Loaded(pages=restored.pages, warnings=text("\n".join(restored.warnings))))
        link.receive(Go, "the sender was to give the guest up")
        result = ReceiveResult(restored, self._start(target, paused=paused))
        try:
            link.send(Running(state=result.state))
        except MigstreamError as exc:  # the guest is here all the same
            result.warnings.append(f"the sender may not know that the guest has arrived: {exc}")
        return result

    def _start(self, target: RestoreTarget, *, paused: bool) -> GuestState:
        self.may_run = True
        if not isinstance(target, Starts):
            return GuestState.COMPLETE
        if paused:
            return GuestState.PAUSED
        try:
            target.start()
        except GuestError:
            self.may_run = False  # it does not: the sender may have it back
            raise
        return GuestState.RUNNING


def _accept(
    listener: socket.socket,
    context: ssl.SSLContext | None,
    timeout_s: float | None,
    ignored: Callable[[str, MigstreamError], None],
) -> tuple[Link, Offer, str]:
    """Return the first caller who offers what can be taken; close the listener."""
    while True:
        sock, name = listener.accept()
        peer = _name(name)
        try:
            link, offer = _hear(sock, context, peer, timeout_s)
        except (MigstreamError, OSError) as exc:
            sock.close()
            ignored(peer, exc if isinstance(exc, MigstreamError) else ConnectionLostError(_reason(exc)))
        except BaseException:
            sock.close()
            raise
        else:
            listener.close()
            return link, offer, peer


def _name(name: tuple[str, int] | str) -> str:
    """Return what a caller is called: over a Unix socket, callers have no names."""
    return str(TcpAddress(*name[:2])) if isinstance(name, tuple) else "this host"


def _hear(
    sock: socket.socket, context: ssl.SSLContext | None, peer: str, timeout_s: float | None
) -> tuple[Link, Offer]:
    """Return what a caller offers. Raises `MigstreamError` for who brings no migration that can be taken."""
    peer = f"the sender at {peer}"
    if context is not None:
        sock = _secured(sock, context, peer)
    link = Link(sock, peer=peer, timeout_s=timeout_s)
    try:
        with link.within(HANDSHAKE_S):
            offer = link.receive(Offer, "an offer was awaited")
        if reason := _refusal(offer, is_tls=link.is_tls):
            raise ProtocolError(reason)
    except MigstreamError as exc:
        if not isinstance(exc, ConnectionLostError):
            link.say_last(Refuse(reason=text(str(exc))))
        link.sock.close()
        raise
    return link, offer


def _secured(sock: socket.socket, context: ssl.SSLContext, peer: str) -> ssl.SSLSocket:
    """Shake hands; but tell a migstream without TLS, in its own words, that this is wanted."""
    sock.settimeout(HANDSHAKE_S)
    try:
        first = sock.recv(len(MAGIC), socket.MSG_PEEK)
    except OSError as exc:
        raise ConnectionLostError(f"{peer} said nothing for {HANDSHAKE_S:g} s") from exc
    if first == MAGIC:
        error = TlsError(f"TLS is wanted here: {TLS_HINT}")
        Link(sock, peer=peer, timeout_s=None).say_last(Refuse(reason=text(str(error))))
        raise error
    return secured(sock, context, peer, server=True)


def _refusal(offer: Offer, *, is_tls: bool) -> str:
    """Return why ``offer`` cannot be taken, nothing if it can."""
    if offer.version != VERSION:
        return f"it offers version {offer.version} of the protocol, this end has {VERSION}: update the older"
    for what, value, known in (
        ("framing", offer.framing, Framing),
        ("compression", offer.compression, Compression),
        ("checksum", offer.checksum, Checksum),
        ("guest type", offer.guest_type, GuestType),
    ):
        if value not in {int(member) for member in known}:
            names = ", ".join(f"{member.value} {member.name}" for member in known)
            return f"it offers the {what} {value}, which this receiver has not: it has {names}"
    if offer.framing == Framing.BARE and (is_tls or offer.compression or offer.checksum):
        return "it offers a bare stream with compression, a checksum or TLS, which need chunks"
    return ""


def _reason(error: BaseException) -> str:
    """Return what the other end's user is to read."""
    if isinstance(error, OSError):
        file = f"{error.filename}: " if error.filename else ""
        return f"{file}{error.strerror or error}"
    return str(error) if isinstance(error, MigstreamError) else "it was interrupted"
