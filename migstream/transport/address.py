"""Where migrations come in: ``HOST:PORT``, ``[IPV6]:PORT`` or ``unix:PATH``."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from migstream.transport.errors import AddressError, ConnectionLostError

__all__ = ["Address", "TcpAddress", "UnixAddress", "connect", "listen", "parse_address"]

EXAMPLES = "host.example:7000, [::1]:7000 or unix:/run/guest.sock"
LOOPBACK = "127.0.0.1"
LONGEST_PATH = 107  # octets of sockaddr_un.sun_path without its NUL
CONNECT_S = 20.0  # to wait for a host that answers nothing at all
BACKLOG = 8  # callers who wait while one is listened to; most of them strangers

_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_.])?", re.ASCII)


@dataclass(frozen=True)
class TcpAddress:
    """A host, by name or number, and a port; port 0 has the kernel choose one to listen on."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this host can get there, as far as the address itself says."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


@dataclass(frozen=True)
class UnixAddress:
    """A socket in the file system."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"

    @property
    def is_loopback(self) -> bool:
        """Only this host can get there."""
        return True


Address = TcpAddress | UnixAddress


def parse_address(text: str, *, listening: bool = False) -> Address:
    """Take an address apart; with ``listening`` a port alone stands for loopback, and port 0 is one.

    Raises `AddressError`, with an example, for anything else.
    """
    scheme, _, path = text.partition(":")
    if scheme == "unix":
        return _unix(path)
    if listening and text.isascii() and text.isdigit():
        text = f"{LOOPBACK}:{text}"
    host, colon, port = text.rpartition(":")
    if not colon:
        raise AddressError(f"{text!r} is no address: write {EXAMPLES}")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and (not listening) <= int(port) <= 0xFFFF):
        lowest = 0 if listening else 1
        raise AddressError(f"{port!r} is no port ({lowest} to 65535): write {EXAMPLES}")
    return TcpAddress(_host(host), int(port))


def _unix(path: str) -> UnixAddress:
    if not path or "\0" in path:
        raise AddressError("unix: needs a path behind it, such as unix:/run/guest.sock")
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise AddressError(
            f"the path of a Unix socket is at most {LONGEST_PATH} octets long; choose a shorter one"
        )
    return UnixAddress(path)


def _host(text: str) -> str:
    if text.startswith("[") and text.endswith("]"):
        with contextlib.suppress(ValueError):
            ipaddress.IPv6Address(text[1:-1])  # a zone, as in fe80::1%eth0, included
            return text[1:-1]
        raise AddressError(f"{text} holds no IPv6 address: write {EXAMPLES}")
    if ":" in text:
        raise AddressError(f"an IPv6 address stands in brackets: write [{text}]:PORT, such as [::1]:7000")
    if not _HOST.fullmatch(text):
        raise AddressError(f"{text!r} is no host's name: write {EXAMPLES}")
    return text


def connect(address: Address, timeout_s: float | None = None) -> socket.socket:
    """Return a connection to ``address``. Raises `ConnectionLostError`, which says what to look at."""
    limit = CONNECT_S if timeout_s is None else timeout_s
    try:
        if isinstance(address, TcpAddress):
            return socket.create_connection((address.host, address.port), limit)
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(limit)
            sock.connect(address.path)
        except BaseException:
            sock.close()
            raise
        return sock
    except TimeoutError:
        raise ConnectionLostError(
            f"{address} did not answer for {limit:g} s: is the host up, and does a firewall let us through?"
        ) from None
    except (ConnectionRefusedError, FileNotFoundError):
        raise ConnectionLostError(
            f"nobody listens at {address}: start 'migstream receive' there first (it takes one migration, "
            "and does not listen while that is under way)"
        ) from None
    except OSError as exc:
        raise ConnectionLostError(f"{address} cannot be reached: {exc.strerror or exc}") from exc


@contextlib.contextmanager
def listen(address: Address) -> Iterator[tuple[socket.socket, Address]]:
    """Listen at ``address``; yield the socket and the address that it has got. Raises `AddressError`.

    The file of a Unix socket is its owner's alone, and is removed at the end; one that a receiver left
    behind is replaced.
    """
    try:
        sock = _bound(address)
    except OSError as exc:
        raise AddressError(
            f"cannot listen at {address}: {exc.strerror or exc}; choose another address"
        ) from exc
    with sock:
        sock.listen(BACKLOG)
        if isinstance(address, TcpAddress):
            yield sock, TcpAddress(*sock.getsockname()[:2])
            return
        try:
            yield sock, address
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(address.path)


def _bound(address: Address) -> socket.socket:
    if isinstance(address, TcpAddress):
        found = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, name = found[0]
        return _bind(socket.socket(family, kind, protocol), name)
    _remove_abandoned(address)
    sock = socket.socket(socket.AF_UNIX)
    os.fchmod(sock.fileno(), 0o600)  # on Linux the mode that bind gives the file, less the umask
    return _bind(sock, address.path)


def _bind(sock: socket.socket, name: str | tuple[object, ...]) -> socket.socket:
    try:
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(name)
    except BaseException:
        sock.close()
        raise
    return sock


def _remove_abandoned(address: UnixAddress) -> None:
    """Remove the socket of a process that is gone; leave any other file, for `bind` to complain of."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(address.path).st_mode):
            return
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(address.path)
            except ConnectionRefusedError:
                os.unlink(address.path)
